"""The steps of ``gpu_acceptance.py``: generators that yield each row as soon as it is computed.

A row is a dictionary for a JSON line. ``case`` names what was run. Cases that can fail have
``passed`` and ``failures``, one line per failure. A skipped case has the reason as ``skipped``.
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
from fused_lora.kernels.config import is_aligned
from fused_lora.ops import dropout
from fused_lora.ops.triton_impl import described, is_sticky
from fused_lora.strategy import cost, devices, schedule, traffic, tuning_cache
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
MAX_SIGMAS = 6  # of a binomial distribution: refuses one correct mask in 10⁹
NOT_ON_A_GPU = "two_to_the_31"  # a test whose huge tensor is a sparse file
TESTS = (
    "test_kernels.py",
    "test_kernels_in_sequence.py",
    "test_kernels_segments.py",
    "test_kernels_segments_gemm.py",
    "test_kernels_shipped.py",
    "test_layer.py",
    "test_projections.py::test_kernels",
    "test_observers.py::test_cuda_graphs",
)
TEST_SECONDS = 60  # of one test
LAYER_SECONDS = 2.5  # per layer of the benchmark
COMPILED_SECONDS = 30.0  # what a row with torch.compile may take
CORE = ("eager", "peft", "addmm", "fused", "fused-bf16", "fused-split")


class Allowance:
    """The seconds during which a step may start new cases."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def run(self, cases: Iterable[Case], least: float = 0.0) -> Iterator[Row]:
        """Run each case and yield its row; without enough time left, yield that it was skipped.

        An error fails only its own case, unless it leaves the device unusable: then it is raised.

        Args:
            least: the seconds that must be left to start a case.
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
    """Versions, and the strategies against float64: a first launch, and a repeated one."""
    yield {"case": "environment", **gpu.environment()}
    shape = (17, 40, 24, 4) if isinstance(gpu, Rehearsal) else (512, 1024, 1024, 16)
    torch.manual_seed(0)
    with gpu.device:
        inputs, dy = make_inputs(*shape, torch.bfloat16), torch.randn(shape[0], shape[2]).bfloat16()
    exact, eager = in_float64(inputs, dy), in_eager(inputs, dy)
    for impl in ("triton:split", "triton:seeded", "triton:addmm", "torch"):
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
    """Every candidate tile against the vendor's products; see ``probe.py``."""
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
    """The kernels' and the layer's tests against float64, on this device, in parallel processes.

    Args:
        select: the expression for pytest's ``-k``; by default, every test that a GPU can run.
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
        options += ["-m", "", "-k", select or f"not {NOT_ON_A_GPU}"]  # both tiers
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
                ended = running.poll()  # before the read: so that the last read gets every row
                *lines, text = (text + file.read()).split("\n")
                for row in map(json.loads, lines):
                    finished = finished or row["case"] == "all tests"
                    yield row
    if not finished:
        yield {"case": "all tests", "passed": False, "failures": [f"pytest ended with {ended}"]}


def repeatability(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Every strategy's results are bitwise reproducible."""
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
    """Replays of a CUDA graph match eager calls on new inputs, with a new mask each time."""
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
    """A forward and backward as a function without arguments, its inputs, and ``dy``.

    With dropout the weight is zero, so that ``dx`` is zero exactly where an entry is dropped.
    """
    torch.manual_seed(0)
    M, _, N, _ = shape
    with gpu.device:
        inputs = make_inputs(*shape, dtype)
        dy = torch.randn(M, N).to(dtype)
    if p:
        inputs["weight"].zero_()
        for positive in (inputs["lora_A"], inputs["lora_B"], dy):
            positive.abs_()  # so that no sum of products is zero by chance
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
    """Tune layer by layer, by device times from CUDA graphs and host times."""
    return allowance.run((named(layer), partial(_tuned, gpu, layer)) for layer in gpu.layers)


def _tuned(gpu: Gpu, layer: Layer) -> Row:
    lines: list[str] = []
    entries = tune([layer], gpu.device, timer=gpu.call_times, report=lines.append)
    wrong = [line for line in lines if "left out" in line or "nothing to keep" in line]
    kept = {call.direction: asdict(entry) for call, entry in entries.items()}
    return {"passed": not wrong, "failures": wrong} | kept


def benchmark(gpu: Gpu, allowance: Allowance) -> Iterator[Row]:
    """Verify and time the providers of the layer; ratios are to the frozen layer's time.

    First the core providers for every layer, then all providers while time is left.
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
    """Ratios of tuning's measured times to the modelled ones; nothing passes or fails."""
    device = devices.device_of(gpu.device)
    for layer in gpu.layers:
        M, K, N, R, dtype, p = layer
        aligned = is_aligned(K * dtype.itemsize, N * dtype.itemsize)
        for direction, inner, columns in (("forward", K, N), ("backward", N, K)):
            call = tuning_cache.Call(direction, dtype, M, K, N, R, p > 0, aligned)
            entry = tuning_cache.lookup(call, gpu.device)
            if entry is None:
                continue
            product = traffic.Product(
                M, inner, columns, R, dtype.itemsize, dtype.itemsize, call.masked,
                direction == "forward", direction == "backward",
            )  # fmt: skip
            row = {"case": call.key}
            for name in entry.microseconds:
                kernels = schedule.direction(device, name, product)
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
    """Name of a layer in the rows."""
    M, K, N, R, dtype, p = layer
    return f"{M}x{K}x{N}x{R} {str(dtype).removeprefix('torch.')}, dropout {p}"
