"""Compile what the launchers would launch on a GPU that is not here: ``compile_kernels.py sm_90``.

The operations run on CPU tensors over a fake driver, so specialisation, alignment and configs are
those of a real call; nothing is executed. Prints one JSON object a kernel: name, shared memory,
registers, spilled bytes, matrix instructions. Needs TRITON_INTERPRET to be unset.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lora import dropout
from fused_lora.kernels import configs, ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 188}
# strategy, M, K, N, R, dtype, adapter dtype, dropout
CASES = [
    ("split", 2048, 1024, 4096, 16, BF16, BF16, True),
    ("split", 2048, 4096, 1024, 64, BF16, FP32, True),
    ("split", 2048, 1024, 4096, 256, FP16, FP16, True),
    ("split", 512, 1024, 1024, 16, BF16, BF16, False),
    ("split", 512, 1003, 1001, 100, BF16, BF16, True),
    ("split", 512, 1032, 1048, 8, BF16, BF16, True),
    ("addmm", 512, 1024, 2048, 128, BF16, BF16, True),
    ("addmm", 512, 1003, 1001, 8, BF16, FP32, True),
    ("addmm", 512, 1024, 2048, 32, FP32, FP32, True),
    ("addmm", 512, 1024, 2048, 256, FP32, FP32, True),
    ("single_pass", 16, 1024, 4096, 16, BF16, BF16, False),
    ("single_pass", 64, 1032, 4096, 64, FP16, FP32, False),
    ("beside", 512, 1024, 2048, 16, BF16, FP32, True),
    ("beside", 512, 1003, 1001, 100, FP16, FP16, True),
    ("beside float32", 512, 1024, 2048, 256, BF16, FP32, True),
]


class FakeDriver:
    """A GPU that loads every binary, records it, and runs nothing."""

    def __init__(self, arch: str):
        self.target = (
            GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
            if arch.startswith("sm_")
            else GPUTarget("hip", arch, 64)
        )
        shared = configs.SHARED_BYTES.get(arch, configs.DEFAULT_SHARED_BYTES)
        self.binaries = []
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: {"max_shared_mem": shared},
        )

    def load_binary(self, name, binary, shared, device):
        self.binaries.append((name, binary, shared))
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *args: None

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def inspect(binary: bytes, arch: str) -> dict:
    """Registers, spilled bytes and matrix instructions of a cubin or hsaco."""
    if not arch.startswith("sm_"):
        return {"spill": _note(binary, b".vgpr_spill_count")}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    matrix = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass.stdout))
    return {"registers": int(registers), "spill": int(stack), "matrix": matrix}


def _note(binary: bytes, key: bytes) -> int:
    """An integer of the code object's MessagePack notes."""
    at = binary.index(key) + len(key)
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(binary[at])
    return binary[at] if size is None else int.from_bytes(binary[at + 1 : at + 1 + size], "big")


def run(case: tuple) -> None:
    """Both directions of one case."""
    strategy, M, K, N, R, dtype, adapter_dtype, dropped = case
    x, dy = torch.zeros(M, K, dtype=dtype), torch.zeros(M, N, dtype=dtype)
    weight = torch.zeros(N, K, dtype=dtype)
    A, B = torch.zeros(R, K, dtype=adapter_dtype), torch.zeros(N, R, dtype=adapter_dtype)
    scale, words = torch.tensor(1.0), None
    if dropped:
        words = dropout.empty_words(M, K, x.device)
        ops.dropout_mask(words, torch.tensor(1), 58_982, dropout.DIGITS)
    base = None
    if strategy.startswith("beside"):  # a base of a kind that has no weight here
        weight, base = None, dy.float() if strategy.endswith("float32") else dy
    _, S = ops.forward(x, weight, A, B, torch.zeros(N), scale, words, 1.0, strategy, base)
    ops.backward(dy, x, weight, A, B, S, scale, words, 1.0, (True, True, True), strategy)


def main(arch: str) -> int:
    """1 if anything spills, 2 if it cannot be told."""
    if arch not in configs.GEMM_TABLE:
        print(f"expected one of {', '.join(configs.GEMM_TABLE)}, got {arch!r}", file=sys.stderr)
        return 2
    if ops.INTERPRETED:
        print("expected TRITON_INTERPRET to be unset: nothing would be compiled", file=sys.stderr)
        return 2
    spilling = 0
    fake = FakeDriver(arch)
    driver.set_active(fake)
    target = configs.Target(
        arch, SMS.get(arch, 304), configs.SHARED_BYTES.get(arch, configs.DEFAULT_SHARED_BYTES)
    )
    configs.target_of = lambda device: target
    for case in CASES:
        first = len(fake.binaries)
        run(case)
        for name, binary, shared in fake.binaries[first:]:
            row = {"case": str(case), "kernel": name, "shared": shared, **inspect(binary, arch)}
            spilling += row["spill"] > 0
            print(json.dumps(row), flush=True)
    print(f"{arch}: {len(fake.binaries)} kernels compiled, {spilling} spill", file=sys.stderr)
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
