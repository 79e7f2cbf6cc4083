"""The steps of ``gpu_acceptance.py``: generators of rows, each yielded as soon as it is known.

A row is a dictionary for a JSON line. ``case`` names what was run; ``passed`` is there where it can
fail, with ``failures``, a line each. A row that is ``skipped`` says why.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from harness import checkout

sys.path.append(str(checkout.ROOT / "tests"))

import torch
from torch import Tensor

from fused_lora import fused_lora_linear
from fused_lora.kernels import launch
from fused_lora.ops import dropout
from fused_lora.ops.triton_impl import described, is_sticky
from fused_lora.strategy import cost, devices, traffic, tuning_cache
from fused_lora.tune import Layer, tune
from gpu import probe as probes
from gpu.devices import Gpu, P, Rehearsal
from harness.shapes import Shape
from layer.measure import FAILED, measure
from layer.providers import PROVIDERS
from support import (
    assert_as_good_as_eager,
    in_eager,
    in_float64,
    make_inputs,
)

Row = dict
Case = tuple[str, Callable[[], Row]]
ROOT = checkout.ROOT
RUNS = 3
MAX_SIGMAS = 6  # of a binomial: one correct mask in 10⁹ is refused
NOT_ON_A_GPU = "two_to_the_31"  # a file on a disk stands for its memory
TESTS = ("test_kernels.py", "test_layer.py", "test_observers.py::test_cuda_graphs")
TEST_SECONDS = 60  # of one test
LAYER_SECONDS = 2.5  # of one layer's benchmark
COMPILED_SECONDS = 30.0  # that a row with torch.compile may take
CORE = ("eager", "peft", "addmm", "fused", "fused-bf16", "fused-split")


class Allowance:
    """The seconds that a step may start new cases in."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def run(self, cases: Iterable[Case], least: float = 0.0) -> Iterator[Row]:
        """The row of each case; of those that no time is left for, that it was skipped.

        An error is the row of its case alone, unless nothing runs on the device after it.

        Args:
            least: seconds without which no case is started.
        """
        for case, run in cases:
            if self.end - time.monotonic() <= least:
                yield {"case": case, "skipped": "no time left in this step's share of the budget"}
                continue
            print(case, file=sys.stderr, flush=True)
            try:
                row = run()
            except Exception as error:
                if is_sticky(error):
                    raise
                row = _judged(described(error))
            yield {"case": case} | row


def preflight(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Versions, and the strategies against float64, plain and as repeated launches."""
    yield {"case": "environment", **gpu.environment()}
    shape = (17, 40, 24, 4) if isinstance(gpu, Rehearsal) else (512, 1024, 1024, 16)
    torch.manual_seed(0)
    with gpu.device:
        inputs, dy = make_inputs(*shape, torch.bfloat16), torch.randn(shape[0], shape[2]).bfloat16()
    exact, eager = in_float64(inputs, dy), in_eager(inputs, dy)
    for impl in ("triton:split", "triton:addmm", "torch"):
        failures = []
        for run in ("first", "second"):
            leaves = {k: inputs[k].detach().requires_grad_() for k in ("x", "lora_A", "lora_B")}
            y = fused_lora_linear(**inputs | leaves, impl=impl)
            gradients = torch.autograd.grad(y, list(leaves.values()), dy)
            found = dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *gradients), strict=True))
            try:
                assert_as_good_as_eager(found, exact, eager)
            except AssertionError as error:
                failures.append(f"{run} run: {error}")
        yield {"case": impl, "passed": not failures, "failures": failures}


def probe(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Every candidate tile beside the vendor's products; see ``probe.py``."""
    for shape in gpu.probed:
        cases = (
            (probes.named(race, shape), partial(_raced, gpu, race, shape))
            for race in probes.races(gpu.device, *shape)
        )
        for row in allowance.run(cases):
            yield from row.get("rows", [row])


def _raced(gpu: Gpu, race: probes.Race, shape) -> Row:
    return {"rows": list(probes.run(gpu, race, shape))}


def numerics(gpu: Gpu, allowance: Allowance, select: str = "") -> Iterator[Row]:
    """The kernels' and the layer's tests against float64, on this device, several at a time.

    Args:
        select: as pytest's ``-k``; everything that can run on a GPU by default.
    """
    benchmarks = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        outer = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment = outer | {
            "FUSED_LORA_TEST_DEVICE": gpu.device.type,
            "FUSED_LORA_ROWS": str(path),
            "TRITON_INTERPRET": "1" if isinstance(gpu, Rehearsal) else "0",
            "PYTHONPATH": os.pathsep.join([benchmarks, os.environ.get("PYTHONPATH", "")]),
        }
        options = ["-q", "-p", "no:cacheprovider", "-p", "gpu.numerics_rows", "--tb=short"]
        options += ["-k", select or f"not {NOT_ON_A_GPU}"]
        if importlib.util.find_spec("xdist") and gpu.test_processes > 1:
            options += ["-n", str(gpu.test_processes)]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        running = subprocess.Popen(command, stdout=sys.stderr, cwd=ROOT, env=environment)
        finished, text, ended = False, "", None
        with path.open(encoding="utf-8") as file:
            while ended is None:
                time.sleep(0.2)
                ended = running.poll()  # before the last look: nothing is written after it
                *lines, text = (text + file.read()).split("\n")
                for row in map(json.loads, lines):
                    finished = finished or row["case"] == "all tests"
                    yield row
    if not finished:
        yield {"case": "all tests", "passed": False, "failures": [f"pytest ended with {ended}"]}


def repeatability(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Every strategy's results are the same bits each time."""
    return allowance.run(_calls(gpu, _repeats))


def _repeats(gpu: Gpu, *call) -> Row:
    step = _step(gpu, *call)[0]
    results = []
    for _ in range(RUNS):
        torch.manual_seed(0)
        results.append([t.clone() for t in step()])
    columns = zip(*results, strict=True)
    same = all(torch.equal(t, first) for first, *rest in columns for t in rest)
    return _judged(None if same else f"{RUNS} runs differ")


def graphs(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Captured calls compute what eager ones do, on new inputs and with a new mask each time."""
    return allowance.run(_calls(gpu, _replays))


def _replays(gpu: Gpu, shape, dtype: torch.dtype, p: float, impl: str) -> Row:
    step, inputs, dy = _step(gpu, shape, dtype, p, impl)
    results, replay = gpu.capture(step)
    with torch.no_grad():
        inputs["x"].copy_(torch.randn_like(inputs["x"]))
    wrong = _wrong_masks(inputs, dy, results, replay) if p else _differs(step, results, replay)
    return _judged(wrong)


def _judged(failure: str | None) -> Row:
    return {"passed": failure is None, "failures": [] if failure is None else [failure]}


def _calls(gpu: Gpu, run: Callable[..., Row]) -> Iterator[Case]:
    """``run`` for every call of :func:`_every_call`."""
    for impl, shape, dtype, p in _every_call(gpu.small):
        case = f"{impl} of {shape} in {dtype}, dropout {p}"
        yield case, partial(run, gpu, shape, dtype, p, impl)


def _every_call(shapes):
    """``(impl, shape, dtype, p)`` of each strategy that can run."""
    dtypes = torch.bfloat16, torch.float16, torch.float32
    for shape, dtype, p in itertools.product(shapes, dtypes, (0.0, P)):
        for strategy in tuning_cache.Call(
            "forward", dtype, *shape, dropped=p > 0
        ).kernel_strategies:
            yield f"triton:{strategy}", shape, dtype, p


def _step(gpu: Gpu, shape, dtype: torch.dtype, p: float, impl: str):
    """A forward and backward as a function of nothing, its inputs, and the cotangent.

    With dropout the weight is zero: ``dx`` is then zero where an entry is dropped, and only there.
    """
    torch.manual_seed(0)
    M, _, N, _ = shape
    with gpu.device:
        inputs = make_inputs(*shape, dtype)
        dy = torch.randn(M, N).to(dtype)
    if p:
        inputs["weight"].zero_()
        for positive in (inputs["lora_A"], inputs["lora_B"], dy):
            positive.abs_()  # no sum of theirs is zero by chance
    leaves = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]

    def step() -> tuple[Tensor, ...]:
        y = fused_lora_linear(**inputs, dropout_p=p, impl=impl)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return step, inputs, dy


def _differs(step, results, replay) -> str | None:
    replay()
    if all(torch.equal(a, b) for a, b in zip(results, step(), strict=True)):
        return None
    return "a replay and an eager call differ"


def _wrong_masks(inputs: dict, dy: Tensor, results, replay) -> str | None:
    masks = []
    for _ in range(2):
        replay()
        kept = results[1] != 0
        masks.append(kept)
        probability = dropout.keep_count(P) / dropout.KEEP_ALL
        spread = (probability * (1 - probability) / kept.numel()) ** 0.5
        share = kept.double().mean().item()
        if abs(share - probability) > MAX_SIGMAS * spread:
            return f"{share:.4f} of the entries kept, expected {probability:.4f}"
        ours = dict(zip(("y", "dx", "dA", "dB"), results, strict=True))
        given = inputs | {"bias": inputs["bias"].detach()}
        mask = kept.double() / probability
        exact, eager = in_float64(given, dy, mask), in_eager(given, dy, mask)
        try:
            assert_as_good_as_eager(ours, exact, eager)
        except AssertionError as error:
            return f"by the mask of dx, {error}"
    return "two replays drop the same entries" if torch.equal(*masks) else None


def tuning(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Tune layer by layer: the device's time from CUDA graphs, the host's beside it."""
    return allowance.run((named(layer), partial(_tuned, gpu, layer)) for layer in gpu.layers)


def _tuned(gpu: Gpu, layer: Layer) -> Row:
    lines: list[str] = []
    entries = tune([layer], gpu.device, timer=gpu.call_times, report=lines.append)
    wrong = [line for line in lines if "left out" in line or "nothing to keep" in line]
    kept = {call.direction: asdict(entry) for call, entry in entries.items()}
    return {"passed": not wrong, "failures": wrong} | kept


def benchmark(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Everyone who computes the layer, verified, then timed; over the frozen layer's time.

    The core of the providers first for every layer, then all of them, where time is left.
    """
    for name, providers, least in (("core", CORE, 0.0), ("all", PROVIDERS, COMPILED_SECONDS)):
        cases = (
            (f"{named(layer)}, {name} providers", partial(_timed, gpu, layer, providers))
            for layer in gpu.layers
        )
        yield from allowance.run(cases, least)


def _timed(gpu: Gpu, layer: Layer, providers: Iterable[str]) -> Row:
    row = measure(
        Shape(*layer[:4]),
        str(layer.dtype).removeprefix("torch."),
        layer.p,
        device=gpu.device.type,
        providers=providers,
        seconds=LAYER_SECONDS,
        skip_failures=True,
    )
    ours = [
        f"{name} {why}"
        for name, why in row.skipped.items()
        if name.startswith("fused") and why.startswith(FAILED)
    ]
    return {"passed": not ours, "failures": ours} | {
        "rounds": row.rounds,
        "frozen_ms": 1e3 * row.results["frozen"].seconds.median,
        "ratios": {name: result.ratio.median for name, result in row.results.items()},
        "results": {name: asdict(result) for name, result in row.results.items()},
        "left out": row.skipped,
    }


def comparison(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """What tuning measured over what the model expected; nothing to pass or fail."""
    device = devices.device_of(gpu.device)
    for layer in gpu.layers:
        M, K, N, R, dtype, p = layer
        aligned = K * dtype.itemsize % 16 == N * dtype.itemsize % 16 == 0
        for direction, inner, columns in (("forward", K, N), ("backward", N, K)):
            call = tuning_cache.Call(direction, dtype, M, K, N, R, p > 0, aligned)
            entry = tuning_cache.lookup(call, gpu.device)
            if entry is None:
                continue
            product = traffic.Product(
                M, inner, columns, R, dtype.itemsize, dtype.itemsize, call.masked,
                direction == "forward",
            )  # fmt: skip
            row = {"case": call.key}
            for name in entry.microseconds:
                kernels = traffic.product(device, name, product)
                if direction == "backward":
                    kernels += traffic.rank_gradients(device, name, product)
                busy = 1e6 * cost.seconds(kernels, device)
                host = 1e6 * cost.host_seconds(kernels, repeated=launch.REPEATS)
                row[name] = {
                    "modelled_us": busy,
                    "measured / modelled": entry.microseconds[name] / busy,
                    "modelled_host_us": host,
                    "host measured / modelled": entry.host_microseconds[name] / host,
                }
            yield row


def named(layer: Layer) -> str:
    """A layer in a row."""
    M, K, N, R, dtype, p = layer
    return f"{M}x{K}x{N}x{R} {str(dtype).removeprefix('torch.')}, dropout {p}"
