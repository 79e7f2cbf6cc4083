"""Kernels with one fault each, which the compile report must find; prints its findings as JSON.

A separate script, because nothing compiles in a process whose kernels are interpreted.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from compiled.cases import Case
from compiled.driver import activate
from compiled.report import Expected, inspect
from compiled.run import compile_cases
from fused_lora.kernels.config import GemmConfig, RankGradConfig


def gemm(arch: str, *config, dtype="bf16", rank=16) -> Case:
    return Case(arch, "lora_gemm", "dx", dtype, rank, "even", True, GemmConfig(*config))


# Fault, and a case that has it: warps, stages, descriptors, block_m, block_n, block_l, group_m,
# programs. Cases of one architecture are adjacent: each such group compiles in its own process.
PLANTED = {
    "clean": gemm("sm_80", 4, 3, False, 64, 64, 32),
    "spills": gemm("sm_80", 4, 3, False, 128, 256, 32),
    "shared memory": gemm("sm_80", 8, 8, False, 128, 256, 64),
    "own iteration": gemm("sm_80", 4, 1, False, 64, 64, 32),
    "own iteration, AMD": gemm("gfx942", 4, 1, False, 64, 64, 32),
    "own iteration, descriptors": gemm("sm_90", 4, 1, True, 64, 128, 64, 8, 132),
    "waits for all": Case(
        "sm_90", "rank_grad", "dA", "bf16", 64, "even", True, RankGradConfig(8, 2, False, 32, 128)
    ),
    "waits for all, sm_100": gemm("sm_100", 4, 1, True, 64, 128, 64, 8, 148),
    "does not compile": gemm("sm_100", 8, 2, True, 256, 512, 32, 8),  # more than all tensor memory
}


@triton.jit
def _traps(o_ptr):
    tl.inline_asm_elementwise(
        "{ trap; mov.u32 $0, 0; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


def main() -> None:
    found = {}
    rows = compile_cases(list(PLANTED.values()), jobs=1)
    for name, (case, row) in zip(PLANTED, rows, strict=True):
        assert case == PLANTED[name]
        found[name] = row.faults
    fake = activate("sm_80")
    (binary,) = fake.compile(lambda: _traps[(1,)](torch.empty(1)))
    found["traps"] = inspect(binary, Expected(matrix="none", pipelined=False)).faults
    fp32 = gemm("sm_80", 4, 2, False, 64, 64, 16, dtype="fp32")
    (binary,) = fake.compile(fp32.call())
    found["no matrix"] = inspect(binary, Expected()).faults
    print(json.dumps(found))


if __name__ == "__main__":
    main()
