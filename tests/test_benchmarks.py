"""The benchmarks: providers agree, rounds are fair, and the suites run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from harness import timing
from harness.shapes import Shape
from harness.timing import Quartiles
from layer import memory, providers, schedules
from layer.problem import SCALING, Layer, Problem, WrongResultError, verified

SMALL = Shape(70, 96, 80, 5)
COMPILED = ("compiled",)
GPU = ("fused-split", "fused-single-pass", "lorafusion-style")


@pytest.mark.parametrize("name", [n for n in providers.PROVIDERS if n not in COMPILED + GPU])
def test_provider(name):
    for dtype, p in [
        (torch.float32, 0.0),
        (torch.float32, 0.1),
        (torch.bfloat16, 0.0),
        (torch.bfloat16, 0.1),
    ]:
        try:
            verified(providers.PROVIDERS[name], Problem.make(SMALL, dtype, "cpu", p), name)
        except providers.UnavailableError as reason:
            if "the same layer" not in str(reason):
                pytest.skip(str(reason))


def test_compiled():
    problem = Problem.make(SMALL, torch.float32, "cpu", 0.1)
    verified(providers.PROVIDERS["compiled"], problem, "compiled")


@pytest.mark.parametrize(
    ("shape", "dtype", "p", "strategy"),
    [
        pytest.param(Shape(40, 64, 48, 5), torch.float32, 0.1, "split", id="split"),
        pytest.param(Shape(20, 64, 96, 8), torch.bfloat16, 0.0, "single_pass", id="single_pass"),
        pytest.param(Shape(70, 96, 80, 5), torch.float32, 0.1, "stored", id="stored mask, fp32"),
        pytest.param(Shape(130, 72, 40, 20), torch.bfloat16, 0.1, "stored", id="stored mask"),
        pytest.param(Shape(33, 40, 17, 4), torch.bfloat16, 0.0, "stored", id="no mask"),
    ],
)
def test_gpu_provider_interpreted(shape, dtype, p, strategy):
    pytest.importorskip("triton")
    from layer.stored_mask import StoredMask

    def make(problem):
        if strategy == "stored":
            return providers._schedule(problem, StoredMask)
        rounded = providers._rounded(problem.p)
        return providers._schedule(problem, schedules.Forced, strategy, p=rounded)

    verified(make, Problem.make(shape, dtype, "cpu", p), strategy)


@pytest.mark.parametrize("name", GPU)
def test_gpu_provider_is_left_out_of_a_cpu_run(name):
    with pytest.raises(providers.UnavailableError, match="CUDA"):
        providers.PROVIDERS[name](Problem.make(SMALL, torch.float32, "cpu", 0.0))


class _Faulty(providers._Eager):
    """Eager with one planted fault."""

    def __init__(self, problem: Problem, fault: str):
        super().__init__(problem)
        self.fault = fault

    def forward(self, x):
        p = self.p + (0.05 if self.fault == "rate" else 0.0)
        dropped = F.dropout(x, p) if self.p else x
        branch = F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        if self.fault == "mask":  # the values of one mask, the gradients of another
            other = F.linear(F.linear(F.dropout(x, p), self.lora_A), self.lora_B)
            branch = other + (branch - other).detach()
        scaling = SCALING * (1.01 if self.fault == "scaling" else 1.0)
        return self.linear(x) + scaling * branch


@pytest.mark.parametrize(
    ("fault", "p", "message"),
    [
        ("scaling", 0.0, "y has a relative error"),
        ("scaling", 0.1, "y has a relative error"),
        ("mask", 0.1, "y has a relative error"),
        ("rate", 0.1, "dropout keeps 0.8"),
    ],
)
def test_a_wrong_provider_is_refused(fault, p, message):
    def make(problem):
        module = _Faulty(problem, fault)
        return Layer(problem, module, module.lora_A, module.lora_B)

    with pytest.raises(WrongResultError, match=message):
        verified(make, Problem.make(SMALL, torch.float32, "cpu", p), "faulty")


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "loralib", None)
    providers._import.cache_clear()
    try:
        with pytest.raises(providers.UnavailableError, match=r"loralib .*pip install loralib"):
            providers.PROVIDERS["loralib"](Problem.make(SMALL, torch.float32, "cpu", 0.0))
    finally:
        providers._import.cache_clear()


def test_saved_and_peak_bytes():
    problem = Problem.make(Shape(256, 64, 128, 4), torch.float32, "cpu", 0.0)
    frozen = providers.PROVIDERS["frozen"](problem)
    eager = providers.PROVIDERS["eager"](problem)
    assert memory.saved_bytes(frozen) == 0
    assert memory.saved_bytes(eager) == problem.x.nbytes + 256 * 4 * 4  # x and S
    results = problem.dy.nbytes + problem.x.nbytes  # y and dx
    assert results <= memory.peak_bytes(frozen) < 2 * results
    assert memory.peak_bytes(eager) >= results + problem.dy.nbytes  # the scaled branch beside y


def test_rounds_are_interleaved_in_changing_order():
    calls = []
    times = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        device="cpu",
        seconds=0,
        min_rounds=20,
    )
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 20)
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]  # after the warm-ups
    assert {frozenset(r) for r in rounds} == {frozenset("abc")}
    assert {r[:2] for r in rounds} == {tuple(p) for p in ("ab", "ac", "ba", "bc", "ca", "cb")}


def test_rounds_end_at_the_most_of_them():
    times = timing.interleaved({"a": int}, device="cpu", seconds=60, min_rounds=2, max_rounds=7)
    assert len(times["a"]) == 7


def test_quartiles_and_paired_ratios():
    assert timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == Quartiles(3.0, 2.0, 4.0)
    assert timing.quartiles([7.0]) == Quartiles(7.0, 7.0, 7.0)
    # The second round was slow for both: a ratio of medians would be 2.5 / 2, or 3 / 1.
    found = timing.ratios({"base": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 4.0]}, "base")
    assert found == {"base": Quartiles(1, 1, 1), "other": Quartiles(2, 2, 2)}


def test_suites_run():
    suites = ["bench_layer.py", "bench_host_overhead.py", "bench_latency.py"]
    picked = "512x576 and (fused-512 or frozen) or unvalidated or patched or merged-1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-k", picked]
        + [f"benchmarks/layer/{name}" for name in suites],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_PROC_BIND": "false"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept for backward" in done.stdout
    assert "14 passed" in done.stdout
