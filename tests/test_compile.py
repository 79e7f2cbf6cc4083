"""Every launch of a real call, compiled for GPUs that are not here: it fits, and nothing spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_lora.kernels import configs

SCRIPT = Path(__file__).with_name("compile_kernels.py")
NO_MATRIX = {"_sum_partials", "_dropout_mask"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_shipped_configs_compile_clean(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, arch], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == NO_MATRIX | {
        "_shrink",
        "_lora_gemm",
        "_lora_add",
        "_rank_grad",
        "_single_pass",
    }
    limit = configs.SHARED_BYTES.get(arch, configs.DEFAULT_SHARED_BYTES)
    for row in rows:
        assert row["spill"] == 0, row
        assert row["shared"] <= limit, row
        float32 = "torch.float32, torch.float32" in row["case"]  # "ieee" dots are FMA loops
        if arch.startswith("sm_") and row["kernel"] not in NO_MATRIX and not float32:
            assert row["matrix"] > 0, row


@pytest.mark.parametrize("arch", configs.GEMM_TABLE)
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100, 256, 1000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_gets_a_config_that_fits(arch, rank, itemsize):
    shared = configs.SHARED_BYTES.get(arch, configs.DEFAULT_SHARED_BYTES)
    target = configs.Target(arch, sms=100, shared_bytes=shared)
    if arch == "interpreter":
        target = configs.INTERPRETER
    for M in (1, 64, 512, 32_768):
        for N in (17, 1024, 16_384):
            chosen = [
                configs.gemm_config(target, itemsize, M, N, rank, aligned=N != 17),
                configs.shrink_config(target, itemsize, M, N, rank, describable=N != 17),
                configs.rank_grad_config(target, itemsize, M, N, rank, describable=N != 17),
                configs.add_config(target, itemsize),
            ]
            if rank <= configs.SINGLE_PASS_MAX_RANK:
                chosen.append(
                    configs.single_pass_config(target, itemsize, M, rank, describable=N != 17)
                )
            for config in chosen:
                assert configs.is_valid(config, target, itemsize, rank), config


def test_an_unknown_gpu_gets_the_conservative_tile():
    target = configs.Target("sm_75", sms=40, shared_bytes=configs.DEFAULT_SHARED_BYTES)
    config = configs.gemm_config(target, 2, 4096, 4096, 16, aligned=True)
    assert (config.block_m, config.block_n, config.num_warps) == (64, 64, 4)
    assert not config.descriptors
