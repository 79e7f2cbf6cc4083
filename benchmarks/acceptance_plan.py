"""How long ``gpu_acceptance.py`` would take on an H100: kernels counted, seconds modelled.

    python benchmarks/acceptance_plan.py

The launches of every step are intercepted, on meta tensors of the real sizes, and the binaries that
Triton would compile for them are counted. Each counts once: later steps find it in Triton's cache.
Runs without a GPU and measures no time. TRITON_INTERPRET=1, which this sets, runs the kernels'
tests (about a minute).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from fused_lora.kernels import dropout as mask_kernel
from fused_lora.kernels import (
    launch,
    lora_add,
    lora_gemm,
    rank_grad,
    select_config,
    shrink,
    single_pass,
    strategies,
    thin_pair,
)
from fused_lora.kernels.operands import BackwardOperands, ForwardOperands
from fused_lora.ops import dropout
from fused_lora.strategy import cost, schedule, traffic, tuning_cache
from fused_lora.strategy.devices import KNOWN
from gpu import probe, steps
from gpu.budget import BUDGET, SOFT, STEPS
from gpu.devices import TEST_PROCESSES

H100 = KNOWN["h100"]
LAUNCHERS = (lora_add, lora_gemm, mask_kernel, rank_grad, shrink, single_pass, thin_pair)
META = torch.device("meta")

# On one core of an AMD EPYC, Triton 3.6 compiles a kernel of the probe in 0.25 s and builds the
# launcher of each signature with gcc in 0.3 s.
COMPILE_SECONDS = 0.6
START_SECONDS = 12.0  # per step: imports and a CUDA context; on the EPYC the imports alone take 4
TEST_SECONDS = 0.15  # per test of the kernels, without compiling
ROW_SECONDS = steps.LAYER_SECONDS + 1.5  # per row of the benchmark: its rounds, and its checks
PROBE_REPEATS = 3 + 1 + 15  # runs of a call: warm-up, capture, rounds
TUNE_REPEATS = 2 * 3 + 1 + 30 * 3 + 30  # 2 warm-ups of 3, capture, host and device rounds
FLUSH_SECONDS = 2 * H100.cache / H100.bandwidth  # overwriting L2 before a timed call

binaries: set[tuple] = set()


def key(kernel, made: launch.Arguments) -> tuple:
    """Identifies a binary: launches that differ in it need a binary each."""
    operands = []
    for operand in made.operands:
        if isinstance(operand, launch.Tile):
            operands.append((operand.tensor.dtype, operand.block, operand.transposed))
        elif operand is None:  # such as the table of segments, where there are none
            operands.append(None)
        else:
            operands.append((operand.dtype, operand.data_ptr() % 16 == 0))
    numbers = tuple(None if n is None else (n == 1, n % 16 == 0) for n in made.numbers)
    constants = tuple(sorted((k, str(v)) for k, v in made.constants.items()))
    return kernel.__name__, tuple(operands), numbers, constants, tuple(made.options.items())


@contextmanager
def counted(run: bool) -> Iterator[None]:
    """Count the binaries of all launches; ``run``: whether to launch them too."""

    def record(kernel, arguments, config, tensors, scalars, *flags):
        binaries.add(key(kernel, arguments(config, *tensors, *flags)))
        if run:
            launch.launch(kernel, arguments, config, tensors, scalars, *flags)

    with pytest.MonkeyPatch.context() as patch:
        for module in LAUNCHERS:
            patch.setattr(module, "launch", record)
        yield


def both_ways(shape, dtype: torch.dtype, p: float, strategy: str) -> None:
    """A forward and backward with ``strategy`` on meta tensors."""
    M, K, N, R = shape
    make = partial(torch.empty, dtype=dtype, device=META)
    x, dy, weight, bias = make(M, K), make(M, N), make(N, K), make(N)
    A, B = make(R, K), make(N, R)
    scale = torch.empty((), device=META)
    seed, keep_bits, inv_keep = None, None, 1.0
    if p:
        seed, keep_bits = (
            torch.empty((), dtype=torch.int64, device=META),
            dropout.empty_keep_bits(M, K, META),
        )
        inv_keep = 1.1
    forward = ForwardOperands(x, weight, A, B, bias, scale, seed, dropout.keep_count(p))
    _, S = strategies.forward(forward, strategy, keep_bits)
    backward = BackwardOperands(dy, x, weight, A, B, S, scale, keep_bits, inv_keep)
    strategies.backward(backward, strategy)


def seconds_of(layer: steps.Layer) -> float:
    """Modelled device time of a layer, both directions, summed over its strategies."""
    M, K, N, R, dtype, p = layer
    total = 0.0
    for direction, inner, columns in (("forward", K, N), ("backward", N, K)):
        call = tuning_cache.Call(direction, dtype, M, K, N, R, p > 0)
        case = traffic.Product(
            M, inner, columns, R, dtype.itemsize,
            masked=call.masked, backward=direction == "backward",
        )  # fmt: skip
        for name in call.strategies:
            total += cost.seconds(schedule.direction(H100, name, case), H100)
    return total


def plan(gpu: steps.Gpu) -> Iterator[tuple[str, int, float]]:
    """``(step, number of binaries that no earlier step needs, modelled seconds)`` of each step."""

    def new(before: int) -> int:
        return len(binaries) - before

    def serial(count: int, device_seconds: float = 0.0) -> float:
        return START_SECONDS + count * COMPILE_SECONDS + device_seconds

    with counted(run=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_config, "target_of", lambda device: H100.target)
        before = len(binaries)
        for strategy in ("split", "seeded", "addmm"):
            both_ways((512, 1024, 1024, 16), torch.bfloat16, 0.0, strategy)
        yield "preflight", new(before), serial(new(before))

        before, busy = len(binaries), 0.0
        for case in gpu.probed:
            for race in probe.races(META, *case):
                for call in race.calls.values():
                    call()
                # Assumed for every call: twice its time at full bandwidth or sustained GEMM speed.
                flops = 2.0 * case[0] * case[1] * case[2] if race.what == "gemm" else 0.0
                each = 2 * max(race.moved / H100.bandwidth, flops / (cost.SUSTAINED * H100.flops))
                busy += len(race.calls) * PROBE_REPEATS * (each + FLUSH_SECONDS)
        yield "probe", new(before), serial(new(before), busy)

    before, collected = len(binaries), Collected()
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "", "-k", f"not {steps.NOT_ON_A_GPU}"]
    arguments += [str(steps.ROOT / "tests" / name) for name in steps.TESTS]
    with counted(run=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_config, "target_of", lambda device: H100.target)
        pytest.main(arguments, plugins=[collected])
    work = new(before) * COMPILE_SECONDS + collected.tests * TEST_SECONDS
    yield "numerics", new(before), 2 * START_SECONDS + work / TEST_PROCESSES

    with counted(run=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_config, "target_of", lambda device: H100.target)
        before, calls = len(binaries), list(steps._every_call(gpu.small))
        for impl, shape, dtype, p in calls:
            both_ways(shape, dtype, p, impl.partition(":")[2])
        yield "repeatability", new(before), serial(new(before), 0.05 * len(calls))
        yield "graphs", 0, serial(0, 0.1 * len(calls))

        before, busy = len(binaries), 0.0
        for layer in gpu.layers:
            call = tuning_cache.Call("forward", layer.dtype, *layer[:4], layer.p > 0)
            for strategy in call.kernel_strategies:
                both_ways(layer[:4], layer.dtype, layer.p, strategy)
            busy += TUNE_REPEATS * (seconds_of(layer) + 6 * FLUSH_SECONDS)
        yield "tuning", new(before), serial(new(before), busy)

    yield "benchmark", 0, serial(0, len(gpu.layers) * ROW_SECONDS)
    yield "comparison", 0, START_SECONDS


class Collected:
    """A pytest plugin that counts tests."""

    tests = 0

    def pytest_collection_finish(self, session) -> None:
        self.tests = len(session.items)


def main() -> int:
    """Print the table. Exit status: 1 if a step would be stopped or skip its last cases."""
    lines, spent, short = [], 0.0, []
    shares = dict(STEPS)
    for step, count, seconds in plan(steps.Gpu(META)):
        limit = (BUDGET - spent) * shares[step] / sum(shares.values())
        del shares[step]
        lines.append(f"{step:<15}{count:>9}{seconds:>10.0f}{limit:>8.0f}")
        spent += seconds
        short += [step] * (seconds > SOFT * limit)
    print("modelled on an H100, not measured: kernels compiled first in a step, seconds, its limit")
    print(f"{'step':<15}{'kernels':>9}{'seconds':>10}{'limit':>8}")
    print("\n".join(lines))
    print(f"{'all':<15}{len(binaries):>9}{spent:>10.0f}{BUDGET:>8}")
    for step in short:
        print(f"{step} would be cut short", file=sys.stderr)
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
