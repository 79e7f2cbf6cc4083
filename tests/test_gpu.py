"""Runs the tests of the kernels and of the layer on a GPU, compiled; skipped without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu import summary

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_acceptance.py"
SECONDS = 1200


def visible_gpus() -> dict[str, str]:
    """The environment with the GPUs that conftest hides, and without the interpreter."""
    hidden = os.environ["FUSED_LORA_HIDDEN_GPUS"]
    changed = {"TRITON_INTERPRET", "FUSED_LORA_HIDDEN_GPUS", "CUDA_VISIBLE_DEVICES"}
    environment = {k: v for k, v in os.environ.items() if k not in changed}
    return environment if hidden == "all" else environment | {"CUDA_VISIBLE_DEVICES": hidden}


@pytest.mark.skipif("FUSED_LORA_TEST_DEVICE" in os.environ, reason="runs on that device already")
def test_the_kernels_and_the_layer_on_the_gpu(tmp_path):
    command = [sys.executable, SCRIPT, "--only", "preflight", "numerics", "--budget", SECONDS]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path)],
        capture_output=True, text=True, env=visible_gpus(), check=False,
    )  # fmt: skip
    if done.returncode == 2:
        pytest.skip("needs a GPU")
    rows = summary.load(tmp_path / "rows.jsonl")
    assert summary.failed(rows) == []
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif("FUSED_LORA_TEST_DEVICE" in os.environ, reason="FUSED_LORA_TEST_DEVICE is set")
def test_a_gpu_is_hidden_from_all_other_tests():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("hidden", ["all", "", "1,2"])
def test_the_gpus_that_were_visible_are_so_again(hidden, monkeypatch):
    """A child process sees the GPUs that were visible before conftest hid them."""
    monkeypatch.setenv("FUSED_LORA_HIDDEN_GPUS", hidden)
    visible = visible_gpus()
    assert visible.get("CUDA_VISIBLE_DEVICES", "all") == hidden
    assert "TRITON_INTERPRET" not in visible
