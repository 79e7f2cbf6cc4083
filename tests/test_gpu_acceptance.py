"""The steps of benchmarks/gpu_acceptance.py and its page, with interpreted kernels."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import gpu_acceptance
from fused_lora.kernels import select_config, strategies
from fused_lora.ops import dispatch, dropout
from fused_lora.strategy import tuning_cache
from fused_lora.strategy.timing import Times
from fused_lora.tune import Layer
from gpu import numerics_rows, probe, steps, summary
from gpu.steps import Allowance, Gpu, Rehearsal
from layer import measure
from support import assert_error, by_default, swept

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_acceptance.py"
LAYER = Layer(80, 32, 48, 4, torch.float32)
FOREVER = Allowance(math.inf)


class Cpu(Rehearsal):
    """A rehearsal with fixed times: 1 s on the device and 2 s on the host per call."""

    layers = (LAYER,)
    test_processes = 1

    def __init__(self):
        super().__init__(torch.device("cpu"))

    def call_times(self, calls):
        return {name: Times([1.0] * 8, [2.0] * 8) for name in calls}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path))
    dispatch.clear_decisions()
    yield
    monkeypatch.undo()
    dispatch.clear_decisions()


@pytest.fixture
def in_bfloat16(monkeypatch):
    """The strategies' calls in one dtype: enough to find a planted fault."""
    every = steps._every_call
    monkeypatch.setattr(
        steps, "_every_call", lambda shapes: [c for c in every(shapes) if c[2] is torch.bfloat16]
    )


def failures(rows) -> list[str]:
    return [text for row in summary.failed(list(rows)) for text in row["failures"]]


def test_the_preflight_names_the_machine_and_checks_both_implementations():
    environment, *checks = steps.preflight(Cpu(), FOREVER)
    assert environment["case"] == "environment"
    assert {"torch", "triton"} <= environment["versions"].keys()
    assert "rehearsal" in environment
    assert [row["case"] for row in checks] == [
        "triton:split",
        "triton:seeded",
        "triton:addmm",
        "torch",
    ]
    assert all(row["passed"] for row in checks)


def test_a_preflight_with_wrong_numbers_fails(monkeypatch):
    forward = strategies.forward
    monkeypatch.setattr(strategies, "forward", lambda *a: tuple(1.1 * t for t in forward(*a)))
    found = failures(steps.preflight(Cpu(), FOREVER))
    assert len(found) == 6  # three strategies, two runs
    assert all(text.split(": ")[1] == "y" for text in found)


def test_numerics_are_the_tests_of_the_kernels():
    in_the_sweep = "test_sampled and 4d and addmm and 123 and torch.float16"
    shrink = "test_shrink and 63 and not members and not segments"
    select = f"{shrink} or test_repeats_bitwise[split-0.0] or ({in_the_sweep})"
    (row,) = steps.numerics(Cpu(), FOREVER, select)
    assert row["passed"]
    assert row["tests"] == {"passed": 7, "failed": 0, "near": 0, "skipped": 0}


def test_numerics_that_select_nothing_fail():
    rows = list(steps.numerics(Cpu(), FOREVER, "no such test"))
    assert summary.verdict([{"step": "numerics"} | row for row in rows]) != "PASS"


@swept
def test_a_failing_test_is_a_row_of_its_own():
    nowhere = Cpu()
    nowhere.device = torch.device("meta")
    failed, total = steps.numerics(nowhere, FOREVER, "test_thin_pair and 63")
    assert failed["case"].endswith("::test_thin_pair[(63, 72, 16, torch.bfloat16, 1)]")
    assert failed["failures"][0]
    assert total["tests"]["failed"] == 1
    assert not total["passed"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (pytest.ExitCode.OK, True),
        (pytest.ExitCode.TESTS_FAILED, True),  # all of them near their bounds
        (pytest.ExitCode.INTERRUPTED, False),
        (pytest.ExitCode.INTERNAL_ERROR, False),
    ],
)
def test_tests_that_were_not_run_to_the_end_have_not_passed(
    status, expected, tmp_path, monkeypatch
):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("FUSED_LORA_ROWS", str(tmp_path / "rows"))
    counts = {"passed": 5, "failed": 0, "near": 1, "skipped": 0}
    monkeypatch.setattr(numerics_rows, "_counts", counts)
    numerics_rows.pytest_sessionfinish(None, status)
    (row,) = summary.load(tmp_path / "rows")
    assert (row["passed"], row["tests"]) == (expected, counts)


# error, dtype, and whether it is reported separately, as near its bound
NEAR = [
    (1.9, torch.float32, True),
    (2.1, torch.float32, False),
    (float("nan"), torch.float32, False),
    (1.9, torch.bfloat16, False),
]


@pytest.mark.parametrize("case", NEAR, ids=str)
def test_only_float32_results_near_their_bound_are_reported_apart(case):
    error, dtype, expected = case
    with pytest.raises(AssertionError) as caught:
        assert_error("y", error * 1e-7, 1e-7, dtype)
    assert numerics_rows.is_near(str(caught.value)) is expected
    row = {"step": "numerics", "passed": False, "near": expected, "failures": ["y"]}
    rows = [{"step": "numerics", "passed": True}, row]
    assert (summary.verdict(rows) == "PASS") is expected
    said = summary.line("numerics", rows)
    assert ("1 float32 results within twice their bound" in said) is expected
    assert ("1 FAILED" in said) is not expected


# rows, and the verdict
VERDICTS = [
    ([], "FAIL: nothing was checked"),
    ([("graphs", "skipped")], "FAIL: nothing was checked"),
    ([("graphs", "passed")], "PASS"),
    ([("graphs", "passed"), ("tuning", "skipped")], "PASS; no time was left for tuning (1)"),
    (
        [("graphs", "passed"), ("numerics", "skipped"), ("tuning", "skipped")],
        "INCOMPLETE: no time was left for numerics (1)",
    ),
    ([("graphs", "failed"), ("numerics", "skipped"), ("graphs", "failed")], "FAIL: graphs (2)"),
]


@pytest.mark.parametrize("case", VERDICTS, ids=lambda case: case[1])
def test_the_verdict_does_not_pass_over_what_was_not_run(case):
    given, expected = case
    kinds = {"passed": {"passed": True}, "failed": {"passed": False}, "skipped": {"skipped": "no"}}
    rows = [{"step": step} | kinds[kind] for step, kind in given]
    assert summary.verdict(rows) == expected


@pytest.mark.parametrize("run", by_default([steps.graphs], [steps.repeatability, steps.graphs]))
def test_strategies_repeat_and_replay(run):
    rows = list(run(Cpu(), FOREVER))
    assert len(rows) == 19  # four strategies, three with dropout, three dtypes; no seeded float16
    assert all(row["passed"] for row in rows)


def test_results_that_differ_from_run_to_run_are_found(monkeypatch, in_bfloat16):
    forward, count = strategies.forward, []

    def noisy(*args):
        y, S = forward(*args)
        count.append(0)
        return y + 1e-2 * len(count), S

    monkeypatch.setattr(strategies, "forward", noisy)
    assert len(failures(steps.repeatability(Cpu(), FOREVER))) == 7
    assert any("a replay and an eager" in f for f in failures(steps.graphs(Cpu(), FOREVER)))


def test_a_mask_that_does_not_change_is_found(monkeypatch, in_bfloat16):
    monkeypatch.setattr(dropout, "draw_seed", lambda device: torch.tensor(3))
    found = failures(steps.graphs(Cpu(), FOREVER))
    assert len(found) == 3
    assert all("two replays drop the same entries" in line for line in found)


def test_a_backward_with_another_mask_is_found(monkeypatch, in_bfloat16):
    backward = strategies.backward

    def other_mask(operands, strategy):
        if operands.keep_bits is not None:
            operands = operands._replace(keep_bits=operands.keep_bits.flip(0))
        return backward(operands, strategy)

    monkeypatch.setattr(strategies, "backward", other_mask)
    found = failures(steps.graphs(Cpu(), FOREVER))
    assert len(found) == 3
    assert all("by the mask of dx, y: relative RMS" in line for line in found)


def test_tuning_keeps_both_clocks():
    (row,) = steps.tuning(Cpu(), FOREVER)
    assert row["passed"]
    for name in ("split", "addmm", "torch"):
        assert row["forward"]["microseconds"][name] == 1e6
        assert row["backward"]["host_microseconds"][name] == 2e6
    call = tuning_cache.Call("forward", torch.float32, 80, 32, 48, 4, False)
    assert tuning_cache.lookup(call, torch.device("cpu")).microseconds["split"] == 1e6


def test_a_wrong_candidate_fails_tuning(monkeypatch):
    forward = strategies.forward
    monkeypatch.setattr(strategies, "forward", lambda *a: tuple(2 * t for t in forward(*a)))
    (line, *_) = failures(steps.tuning(Cpu(), FOREVER))
    assert "split left out" in line


def test_what_was_measured_is_set_beside_what_was_modelled():
    list(steps.tuning(Cpu(), FOREVER))
    rows = list(steps.comparison(Cpu(), FOREVER))
    assert len(rows) == 2
    for row in rows:
        for name in ("split", "addmm", "torch"):
            found = row[name]
            assert found["measured / modelled"] * found["modelled_us"] == pytest.approx(1e6)
            assert found["host measured / modelled"] * found["modelled_host_us"] == pytest.approx(
                2e6
            )


def test_the_benchmark_leaves_out_a_peer_that_raises_and_keeps_the_row(monkeypatch):
    def broken(problem):
        raise RuntimeError("no\ndetails")

    providers = {name: steps.PROVIDERS[name] for name in ("frozen", "eager", "fused")}
    for held in (steps.PROVIDERS, measure.PROVIDERS):
        monkeypatch.setitem(held, "peft", broken)
    monkeypatch.setattr(steps, "PROVIDERS", providers | {"peft": broken})
    monkeypatch.setattr(steps, "CORE", ("eager", "peft", "fused"))
    monkeypatch.setattr("layer.measure.MIN_SECONDS", 0.1)
    monkeypatch.setattr(steps, "LAYER_SECONDS", 0.1)
    core, everyone = steps.benchmark(Cpu(), FOREVER)
    for row in (core, everyone):
        assert row["passed"]
        assert row["ratios"].keys() == {"frozen", "eager", "fused"}
        assert row["ratios"]["frozen"] == 1.0
        assert row["left out"]["peft"] == "failed: RuntimeError: no"


def test_a_layer_of_ours_that_raises_fails_the_benchmark(monkeypatch):
    forward = steps.PROVIDERS["fused"]

    def wrong(problem):
        layer = forward(problem)
        layer.module.scaling = 7.0
        return layer

    monkeypatch.setitem(steps.PROVIDERS, "fused", wrong)
    monkeypatch.setattr(steps, "CORE", ("eager", "fused"))
    row = next(steps.benchmark(Cpu(), FOREVER))
    assert not row["passed"]
    assert row["failures"][0].startswith("fused failed: WrongResultError")
    assert "eager" in row["ratios"]


def test_a_case_that_raises_is_a_row_and_the_next_are_run(monkeypatch):
    """A capture that fails, for example; an error that leaves the device unusable is raised."""
    tune, errors = steps.tune, [RuntimeError("no\ndetails")]

    def fail_first(*args, **kwargs):
        if errors:
            raise errors.pop()
        return tune(*args, **kwargs)

    monkeypatch.setattr(steps, "tune", fail_first)
    gpu = Cpu()
    gpu.layers = (LAYER._replace(M=90), LAYER)
    first, second = steps.tuning(gpu, FOREVER)
    assert (first["passed"], first["failures"]) == (False, ["RuntimeError: no"])
    assert second["passed"]
    errors.append(torch.AcceleratorError("lost"))
    with pytest.raises(torch.AcceleratorError):
        list(steps.tuning(gpu, FOREVER))


def test_cases_that_no_time_is_left_for_are_said():
    """Every case that is skipped for lack of time has a row that says so."""
    spent = Allowance(-1.0)
    assert len(list(steps.preflight(Cpu(), spent))) == 5  # always run: all else depends on it
    named = (
        steps.probe,
        steps.repeatability,
        steps.graphs,
        steps.tuning,
        steps.benchmark,
    )
    for step in named:
        assert all("no time left" in row["skipped"] for row in step(Cpu(), spent))


def test_the_probe_tries_every_candidate_of_every_kernel():
    rows = list(steps.probe(Cpu(), FOREVER))
    assert not failures(rows)
    ran = {row["case"].split()[0]: row["ran"] for row in rows}
    assert ran.keys() == {"copy", "mask", "gemm", "add", "shrink", "rank_grad", "pair", "backward"}
    kinds = {name.split()[0] for names in ran.values() for name in names}
    assert {"mm", "addmm_", "seeded", "lora_gemm", "lora_add", "copy_", "dropout_mask"} <= kinds
    assert any("masked" in name for name in ran["gemm"])
    tiles = select_config.shrink_candidates(select_config.INTERPRETER, 2, 8, describable=True)
    assert len(ran["shrink"]) == 1 + 3 * len(tiles)  # the vendor's, and tiles with 3 split counts
    few = Cpu()
    few.probed = ((16, 128, 64, 8),)
    ran = {row["case"].split()[0]: row["ran"] for row in steps.probe(few, FOREVER)}
    assert any(name.startswith("single_pass") for name in ran["gemm"])


def test_a_candidate_that_fails_is_a_row_and_the_others_are_timed(monkeypatch):
    gpu = Cpu()
    gpu.device_seconds = lambda calls: {name: [2e-6, 1e-6, 3e-6] for name in calls}

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource\ndetails")

    monkeypatch.setattr(probe, "lora_gemm", broken)
    rows = [row for row in steps.probe(gpu, FOREVER) if row["case"].startswith("gemm")]
    wrong = summary.failed(rows)
    assert wrong
    assert all(row["name"].startswith("lora_gemm") for row in wrong)
    assert "out of resource" in wrong[0]["failures"][0]
    mm = next(row for row in rows if row["name"] == "mm")
    assert mm["us"] == 2.0
    assert mm["gb_per_s"] == round(2 * (96 * 128 + 64 * 128 + 96 * 64) / 2e-6 / 1e9, 1)


def test_the_largest_shapes_come_first():
    gpu = Gpu(torch.device("meta"))
    for shapes in (gpu.layers, gpu.probed):
        sizes = [M * K * N for M, K, N, *_ in shapes]
        assert sizes == sorted(sizes, reverse=True)


def test_the_plan_counts_the_binaries_of_real_sizes_once():
    import acceptance_plan

    acceptance_plan.binaries.clear()
    steps = acceptance_plan.plan(Gpu(torch.device("meta")))
    preflight, probing = next(steps), next(steps)
    steps.close()
    assert preflight[0] == "preflight"
    assert preflight[1] >= 6  # forward and backward of the strategies
    assert probing[1] >= 50
    assert probing[1] + preflight[1] == len(acceptance_plan.binaries)
    names = {binary[0] for binary in acceptance_plan.binaries}
    expected = {"shrink", "lora_gemm", "lora_add", "rank_grad", "single_pass", "thin_pair"}
    assert {f"_{name}" for name in expected} <= names
    assert probing[2] < gpu_acceptance.STEPS["probe"]
    again = acceptance_plan.plan(Gpu(torch.device("meta")))
    assert next(again)[1] == 0
    again.close()


def test_the_page_has_every_figure_and_every_failure(tmp_path):
    rows = [
        {"step": "run", "commit": "abc", "date": "today"},
        {"step": "preflight", "case": "environment", "device_name": "A GPU", "arch": "sm_90"},
        {"step": "probe", "case": "gemm 1x2x3", "name": "mm", "us": 2.5, "gb_per_s": 9},
        {"step": "probe", "case": "gemm", "name": "bad", "passed": False, "failures": ["no room"]},
        {"step": "numerics", "case": "t", "passed": False, "near": True, "failures": ["by 3 %"]},
        {"step": "benchmark", "case": "a", "frozen_ms": 1.25, "ratios": {"fused": 1.1}},
        {"step": "benchmark", "case": "b", "frozen_ms": 2.5, "ratios": {"eager": 1.3, "fused": 1}},
    ]
    summary.write(tmp_path / "page.md", rows)
    page = (tmp_path / "page.md").read_text()
    for text in (
        "# A GPU\n\n**FAIL: probe (1)**\n",
        "- commit abc, today\n",
        "- probe, gemm: no room\n",
        "## Float32 results within twice their bound\n\nThe bounds hold for exact sums",
        "- numerics, t: by 3 %\n",
        "| layer | frozen ms | fused | eager |\n|---|---|---|---|\n| a | 1.250 | 1.100 |  |\n"
        "| b | 2.500 | 1.000 | 1.300 |\n",
        "| gemm 1x2x3 | mm | 2.5 | 9 |\n",
    ):
        assert text in page


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    (tmp_path / "rows").write_text('{"step": "a"}\n{"step": "b", "us"')
    assert summary.load(tmp_path / "rows") == [{"step": "a"}]
