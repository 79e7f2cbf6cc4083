"""The steps of ``gpu_acceptance.py``: each runs on a device and says what it found.

A step that a GPU must pass returns a :class:`Step`; whatever it raises is a failure too.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import machine
from fused_lora import cost, devices, dropout, fused_lora_linear, traffic, tuned
from fused_lora.kernels import configs
from fused_lora.timing import device_seconds
from fused_lora.tune import Layer, tune
from measure import measure
from providers import PROVIDERS
from shapes import Shape
from support import (
    assert_as_good_as_eager,
    in_eager,
    in_float64,
    make_inputs,
)

ROOT = Path(__file__).parents[1]
REPEATS = 3
P = 0.1
MAX_SIGMAS = 6  # of a binomial: one correct mask in 10⁹ is refused
# A file on a disk stands for its memory.
NOT_ON_A_GPU = "two_to_the_31"


@dataclass
class Step:
    """What a step found.

    Attributes:
        failures: one line each; none if it passed.
        summary: one line.
        details: for the JSON file.
    """

    summary: str
    failures: list[str] = field(default_factory=list)
    details: object = None

    @property
    def passed(self) -> bool:
        return not self.failures


class Gpu:
    """The device that everything runs on; what the tests replace."""

    def __init__(self, device: torch.device):
        self.device = device

    def environment(self) -> dict:
        """What the results hold for."""
        properties = torch.cuda.get_device_properties(self.device)
        return machine.describe(self.device) | {
            "arch": configs.target_of(self.device).arch,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "tuned_for": tuned.environment(self.device),
        }

    def capture(self, step: Callable[[], tuple[Tensor, ...]]):
        """``(results, replay)``: a CUDA graph of ``step``, whose results each replay renews."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        return results, graph.replay

    def timer(self, graphs: bool):
        """For :func:`fused_lora.tune.tune`."""
        return partial(device_seconds, device=self.device, graphs=graphs)


def numerics(gpu: Gpu, select: str = "") -> Step:
    """The kernels' and the layer's tests against float64, on this device.

    Args:
        select: as pytest's ``-k``; everything that can run on a GPU by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = os.environ | {"FUSED_LORA_TEST_DEVICE": gpu.device.type}
        environment["TRITON_INTERPRET"] = "1" if gpu.device.type == "cpu" else "0"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            + ["-k", select or f"not {NOT_ON_A_GPU}"]
            + [str(ROOT / "tests" / name) for name in ("test_kernels.py", "test_layer.py")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=False,
        )
        if not report.is_file():
            return Step("the tests did not run", [done.stdout[-1000:] + done.stderr[-1000:]])
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failures = [
        f"{case.get('name')}: {problem.get('message', '').partition(chr(10))[0]}"
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    skipped = sum(part.tag == "skipped" for case in cases for part in case)
    if len(cases) == skipped:
        failures.append("expected tests to run, got none")
    return Step(f"{len(cases) - skipped} tests against float64, {skipped} skipped", failures)


def repeatability(gpu: Gpu, shapes: Iterable[tuple[int, int, int, int]]) -> Step:
    """Every strategy's results are the same bits each time."""
    failures, count = [], 0
    for impl, shape, dtype, p in _every_call(shapes):
        step = _step(gpu, shape, dtype, p, impl)[0]
        results = []
        for _ in range(REPEATS):
            torch.manual_seed(0)
            results.append([t.clone() for t in step()])
        count += 1
        if not all(torch.equal(t, same[0]) for same in zip(*results, strict=True) for t in same):
            failures.append(f"{impl} of {shape} in {dtype}, dropout {p}: {REPEATS} runs differ")
    return Step(f"{count} calls, {REPEATS} runs of each", failures)


def graphs(gpu: Gpu, shapes: Iterable[tuple[int, int, int, int]]) -> Step:
    """Captured calls compute what eager ones do, on new inputs and with a new mask each time."""
    failures, count = [], 0
    for impl, shape, dtype, p in _every_call(shapes):
        step, inputs, dy = _step(gpu, shape, dtype, p, impl)
        results, replay = gpu.capture(step)
        with torch.no_grad():
            inputs["x"].copy_(torch.randn_like(inputs["x"]))
        problem = (
            _wrong_masks(inputs, dy, results, replay) if p else _differs(step, results, replay)
        )
        count += 1
        if problem:
            failures.append(f"{impl} of {shape} in {dtype}, dropout {p}: {problem}")
    return Step(f"{count} calls captured and replayed", failures)


def _every_call(shapes):
    """``(impl, shape, dtype, p)`` of each strategy that can run."""
    dtypes = torch.bfloat16, torch.float16, torch.float32
    for shape, dtype, p in itertools.product(shapes, dtypes, (0.0, P)):
        for strategy in tuned.Call("forward", dtype, *shape, dropped=p > 0).strategies:
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


def tuning(gpu: Gpu, layers: Iterable[Layer]) -> Step:
    """Tune with CUDA graphs, kept nowhere, and without, kept for the user; all candidates right."""
    layers, lines, found = list(layers), [], {}
    cache = os.environ.get("FUSED_LORA_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSED_LORA_CACHE"] = folder
        try:
            found["graphs"] = tune(
                layers, gpu.device, timer=gpu.timer(graphs=True), report=lines.append
            )
        finally:
            del os.environ["FUSED_LORA_CACHE"]
            if cache is not None:
                os.environ["FUSED_LORA_CACHE"] = cache
    found["eager"] = tune(layers, gpu.device, timer=gpu.timer(graphs=False), report=lines.append)
    details = [
        {
            "call": call.key,
            "strategy": entry.strategy,
            "microseconds": dict(entry.microseconds),
            "in graphs": dict(found["graphs"][call].microseconds)
            if call in found["graphs"]
            else {},
        }
        for call, entry in found["eager"].items()
    ]
    wrong = [line for line in lines if "left out" in line or "nothing to keep" in line]
    return Step(f"{len(details)} entries in {tuned.cache_path()}", wrong, details)


def comparison(gpu: Gpu, layers: Iterable[Layer]) -> Step:
    """What tuning measured over what the model expected; nothing to pass or fail."""
    device, details = devices.device_of(gpu.device), []
    for layer in dict.fromkeys(layers):
        M, K, N, R, dtype, p = layer
        aligned = K * dtype.itemsize % 16 == N * dtype.itemsize % 16 == 0
        for direction, inner, columns in (("forward", K, N), ("backward", N, K)):
            call = tuned.Call(direction, dtype, M, K, N, R, p > 0, aligned)
            entry = tuned.lookup(call, gpu.device)
            if entry is None:
                continue
            masked = None if not p else "operand" if direction == "forward" else "output"
            product = traffic.Product(
                M, inner, columns, R, dtype.itemsize, dtype.itemsize, masked, direction == "forward"
            )
            modelled = {
                name: 1e6 * cost.seconds(traffic.product(device, name, product), device)
                for name in entry.microseconds
            }
            ratios = {name: entry.microseconds[name] / modelled[name] for name in modelled}
            details.append(
                {"call": call.key, "modelled µs": modelled, "measured / modelled": ratios}
            )
    return Step(f"{len(details)} calls", [], details)


def benchmark(gpu: Gpu, layers: Iterable[Layer], seconds: float) -> Step:
    """Everyone who computes the layer, verified, then timed; over the frozen layer's time."""
    details = []
    for layer in layers:
        dtype = str(layer.dtype).removeprefix("torch.")
        row = measure(
            Shape(*layer[:4]),
            dtype,
            layer.p,
            device=gpu.device.type,
            providers=PROVIDERS,
            seconds=seconds,
        )
        ratios = {name: result.ratio.median for name, result in row.results.items()}
        milliseconds = 1e3 * row.results["frozen"].seconds.median
        details.append(
            {"layer": str(row.shape), "dtype": dtype, "dropout": layer.p, "ms": milliseconds}
            | {"ratios": ratios, "left out": row.skipped}
        )
    return Step(f"{len(details)} layers", [], details)
