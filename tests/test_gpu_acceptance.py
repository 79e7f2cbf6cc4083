"""The steps of benchmarks/gpu_acceptance.py on a CPU, where kernels are interpreted."""

import json

import pytest
import torch

pytest.importorskip("triton")
import acceptance
import gpu_acceptance
from acceptance import Gpu, Step
from fused_lora import dispatch, dropout, tuned
from fused_lora.kernels import ops
from fused_lora.tune import Layer

SHAPES = [(17, 40, 24, 4)]


class Cpu(Gpu):
    """A device whose graphs are calls, and whose clock says what it is told."""

    def __init__(self):
        super().__init__(torch.device("cpu"))

    def environment(self):
        return {"device_name": "Interpreted (CPU)", "versions": {"torch": "2"}}

    def capture(self, step):
        results = step()

        def replay():
            for old, new in zip(results, step(), strict=True):
                old.copy_(new)

        return results, replay

    def timer(self, graphs):
        return lambda calls: {name: [2.0 if graphs else 1.0] * 8 for name in calls}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path))
    dispatch.clear_decisions()
    yield
    monkeypatch.undo()
    dispatch.clear_decisions()


def test_numerics_are_the_tests_of_the_kernels():
    step = acceptance.numerics(Cpu(), select="test_shrink or test_repeats_bitwise[split-0.0]")
    assert step.passed, step.failures
    assert step.summary == "7 tests against float64, 0 skipped"


def test_numerics_that_select_nothing_fail():
    assert not acceptance.numerics(Cpu(), select="no such test").passed


def test_a_failing_test_is_named():
    nowhere = Cpu()
    nowhere.device = torch.device("meta")
    step = acceptance.numerics(nowhere, select="test_sum_partials and shape0")
    (failure,) = step.failures
    assert failure.startswith("test_sum_partials[shape0]: ")


@pytest.mark.parametrize("run", [acceptance.repeatability, acceptance.graphs])
def test_strategies_repeat_and_replay(run):
    step = run(Cpu(), SHAPES)
    assert step.passed, step.failures
    assert step.summary.startswith("15 calls")  # three strategies, two with dropout, three dtypes


def test_results_that_differ_from_run_to_run_are_found(monkeypatch):
    forward, count = ops.forward, []

    def noisy(*args):
        y, S = forward(*args)
        count.append(0)
        return y + 1e-2 * len(count), S

    monkeypatch.setattr(ops, "forward", noisy)
    assert len(acceptance.repeatability(Cpu(), SHAPES).failures) == 15
    assert any("a replay and an eager" in f for f in acceptance.graphs(Cpu(), SHAPES).failures)


def test_a_mask_that_does_not_change_is_found(monkeypatch):
    monkeypatch.setattr(dropout, "draw_seed", lambda device: torch.tensor(3))
    failures = acceptance.graphs(Cpu(), SHAPES).failures
    assert len(failures) == 6
    assert all("two replays drop the same entries" in line for line in failures)


def test_a_backward_with_another_mask_is_found(monkeypatch):
    backward = ops.backward

    def other_mask(dy, x, weight, A, B, S, scaling, words, *args):
        return backward(
            dy, x, weight, A, B, S, scaling, None if words is None else words.flip(0), *args
        )

    monkeypatch.setattr(ops, "backward", other_mask)
    failures = acceptance.graphs(Cpu(), SHAPES).failures
    assert len(failures) == 6
    assert all("by the mask of dx, y: relative RMS" in line for line in failures)


def test_tuning_reports_both_clocks_and_keeps_one():
    layer = Layer(80, 32, 48, 4, torch.float32)
    step = acceptance.tuning(Cpu(), [layer])
    assert step.passed, step.failures
    forward = step.details[0]
    assert forward["microseconds"] == {"split": 1e6, "addmm": 1e6}
    assert forward["in graphs"] == {"split": 2e6, "addmm": 2e6}
    call = tuned.Call("forward", torch.float32, 80, 32, 48, 4, False)
    assert tuned.lookup(call, torch.device("cpu")).microseconds["split"] == 1e6


def test_a_wrong_candidate_fails_tuning(monkeypatch):
    forward = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a: tuple(2 * t for t in forward(*a)))
    step = acceptance.tuning(Cpu(), [Layer(80, 32, 48, 4, torch.float32)])
    assert not step.passed
    assert "split left out" in step.failures[0]


def test_what_was_measured_is_set_beside_what_was_modelled():
    layers = [Layer(80, 32, 48, 4, torch.float32, p) for p in (0.0, 0.1)]
    acceptance.tuning(Cpu(), layers)
    details = acceptance.comparison(Cpu(), layers).details
    assert len(details) == 4
    for row in details:
        for name, ratio in row["measured / modelled"].items():
            assert ratio * row["modelled µs"][name] == pytest.approx(1e6)


def test_the_benchmark_is_over_the_frozen_layer(monkeypatch):
    monkeypatch.setattr(acceptance, "PROVIDERS", ["eager", "fused", "fused-split"])
    (row,) = acceptance.benchmark(Cpu(), [Layer(16, 32, 48, 4, torch.float32, 0.1)], 0.1).details
    assert set(row["ratios"]) == {"frozen", "eager", "fused"}
    assert row["ratios"]["frozen"] == 1.0
    assert "fused-split" in row["left out"]


def test_everything_runs_and_the_verdict_names_what_failed(tmp_path):
    def broken():
        raise RuntimeError("no\ndetails")

    planned = {
        "good": lambda: Step("fine", details=[{"call": "a", "ratios": {"eager": 1.5}}]),
        "broken": broken,
        "bad": lambda: Step("wrong", ["one", "two"]),
    }
    done = gpu_acceptance.accept(planned)
    assert gpu_acceptance.verdict(done) == "FAIL: broken (1), bad (2)"
    assert gpu_acceptance.verdict({"good": done["good"]}) == "PASS"
    path = gpu_acceptance.write(tmp_path, Cpu().environment(), done)
    assert path.name == "interpreted-cpu.json"
    content = json.loads(path.read_text())
    assert content["verdict"] == "FAIL: broken (1), bad (2)"
    assert content["steps"]["broken"]["failures"] == ["RuntimeError: no"]
    text = path.with_suffix(".md").read_text()
    assert "**FAIL: broken (1), bad (2)**" in text
    assert "| call | eager |\n|---|---|\n| a | 1.5 |" in text


def test_the_steps_are_planned_for_every_shape():
    assert list(gpu_acceptance.steps(Cpu(), True, 1.0)) == [
        "numerics",
        "bitwise repeatability",
        "CUDA graphs",
        "tuning",
        "benchmark",
        "measured over modelled",
    ]
    quick, full = gpu_acceptance.layers(True), gpu_acceptance.layers(False)
    assert set(quick) < set(full)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_without_a_gpu_nothing_runs(capsys):
    assert gpu_acceptance.main([]) == 2
    assert "expected a GPU" in capsys.readouterr().err
