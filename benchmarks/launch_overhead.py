"""Host time of launches and of small layers: ``python benchmarks/launch_overhead.py``.

First, microseconds per launch: with Triton's own look-up ("plain"), and repeated by
``kernels/launch.py``; "step" is the six launches of a training step with dropout. The driver is
a stub that runs nothing: no GPU is needed and nothing is compiled. With ``--launcher`` only the
driver is a stub: Triton compiles, and launches through its function in C (needs gcc).

Then forward and backward of a 16×16 layer on one CPU thread, where host overhead dominates: this
library's, PEFT's, and a bare ``autograd.Function`` of the same products without validation or
dispatch. Variants are interleaved. Each number is the fastest of many rounds, since disturbances
only add time. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[1] / "tests"))

if "--launcher" in sys.argv:  # its stub must be loaded before PyTorch
    import launch_real

    folder = tempfile.TemporaryDirectory()
    stub, active_driver = launch_real.make_driver(Path(folder.name))
    stub.recording.value = 0

import launch_cases
import torch
from torch import nn

import fused_lora
from fused_lora import fused_lora_linear
from fused_lora.kernels import launch

STEP = "step, 6 launches"
LAUNCH_TARGET = 8.0  # µs
STEP_TARGET = 45.0
PEFT_TARGET = 0.85  # of PEFT's time
BARE_TARGET = 15.0  # µs more than the bare Function
SCALING = 2.0
CALLS = 50  # per round: spreads the cost of reading the clock


def fastest(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds per call of each variant, in its fastest round of :data:`CALLS` calls."""
    best = dict.fromkeys(variants, float("inf"))
    for run in variants.values():
        for _ in range(CALLS):
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def launches(seconds: float) -> bool:
    """Print the table of launches; return whether every repeated launch meets the target."""
    if "--launcher" not in sys.argv:
        launch_cases.make_driver("sm_90")
        launch_cases.Binary.recorded = False
    rows = {
        "lora_gemm": launch_cases.gemm(keep_bits=True),
        "lora_gemm, 3 descriptors": launch_cases.gemm(keep_bits=True, descriptors=True),
        "single_pass, 2 descriptors": launch_cases.single(descriptors=True),
        "lora_add": launch_cases.add(),
        "dropout_mask": launch_cases.mask(32_768),
        STEP: step(),
    }
    print(f"{'µs a launch':<28}{'plain':>8}{'repeated':>10}")
    met = True
    for name, run in rows.items():
        found = fastest({"plain": plain(run), "repeated": run}, seconds / len(rows))
        print(f"{name:<28}{found['plain']:>8.1f}{found['repeated']:>10.1f}")
        met &= found["repeated"] <= (STEP_TARGET if name == STEP else LAUNCH_TARGET)
    return met


def step() -> Callable[[], None]:
    """The launches of a training step with dropout, two of them with three descriptors each."""
    runs = (
        launch_cases.masked_shrink(),
        launch_cases.gemm(descriptors=True),
        launch_cases.pair(),
        launch_cases.gemm(keep_bits=True, descriptors=True),
        launch_cases.gradient(),
    )

    def run():
        for launches in runs:
            launches()

    return run


def plain(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` with its launches looked up by Triton, not repeated."""

    def runs():
        launch.REPEATS = False
        run()
        launch.REPEATS = True

    return runs


class Bare(torch.autograd.Function):
    """The layer's products and nothing else."""

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, scaling):
        S = torch.mm(x, A.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, A, B, S)
        ctx.scaling = scaling
        return nn.functional.linear(x, weight, bias).addmm_(S, B.t())

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B, S = ctx.saved_tensors
        G = torch.mm(dy, B).mul_(ctx.scaling)
        dx = torch.mm(dy, weight).addmm_(G, A)
        return dx, None, torch.mm(G.t(), x), torch.mm(dy.t(), S), None, None


def layers(size: int = 16, rank: int = 4) -> dict[str, Callable[[], object]]:
    """A forward and backward of each variant, on the same tensors."""
    x = torch.randn(size, size, requires_grad=True)
    dy = torch.ones(size, size)
    linear = nn.Linear(size, size).requires_grad_(False)
    ours = fused_lora.FusedLoRALinear.from_linear(linear, rank=rank, alpha=SCALING * rank)
    A, B = ours.lora_A, ours.lora_B
    inputs = x, linear.weight, A, B, linear.bias
    made = {
        "bare Function": lambda: Bare.apply(*inputs, SCALING),
        "fused_lora_linear": lambda: fused_lora_linear(*inputs, scaling=SCALING),
        "FusedLoRALinear": lambda: ours(x),
    }
    try:
        import peft
    except ImportError:
        print("PEFT is not installed: no comparison with it", file=sys.stderr)
    else:
        config = peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=SCALING * rank)
        theirs = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
        made["PEFT"] = lambda: theirs(x)

    def step(forward):
        def run():
            x.grad = A.grad = B.grad = None
            forward().backward(dy)

        return run

    return {name: step(forward) for name, forward in made.items()}


def small_layers(seconds: float) -> bool:
    """Print the table of layers; return whether this library's layer meets both targets."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = fastest(layers(), seconds)
    bare = found["bare Function"]
    print(f"\n{'forward + backward, 16x16':<28}{'µs':>8}{'over bare':>12}{'of PEFT':>10}")
    for name, time_ in found.items():
        ratio = f"{time_ / found['PEFT']:>10.2f}" if "PEFT" in found else ""
        print(f"{name:<28}{time_:>8.1f}{time_ - bare:>+12.1f}{ratio}")
    ours = found["fused_lora_linear"], found["FusedLoRALinear"]
    met = ours[0] <= bare + BARE_TARGET
    return met and ("PEFT" not in found or ours[1] <= PEFT_TARGET * found["PEFT"])


def main() -> int:
    """Exit status: 0 if every target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="per table")
    parser.add_argument("--launcher", action="store_true", help="with Triton's launcher in C")
    seconds = parser.parse_args().seconds
    met = launches(seconds), small_layers(seconds)
    for name, ok in zip(("launches", "layers"), met, strict=True):
        print(f"{name}: target {'met' if ok else 'missed'}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
