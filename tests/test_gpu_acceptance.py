"""benchmarks/gpu_acceptance.py on a CPU, where kernels are interpreted."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import acceptance
import acceptance_report
import gpu_acceptance
import numerics_rows
import probe
from acceptance import Allowance, Gpu, Rehearsal
from fused_lora import dispatch, dropout, tuned
from fused_lora.kernels import configs, ops
from fused_lora.timing import Times
from fused_lora.tune import Layer
from support import assert_error

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_acceptance.py"
LAYER = Layer(80, 32, 48, 4, torch.float32)
FOREVER = Allowance(math.inf)


class Cpu(Rehearsal):
    """A device whose clock says what it is told."""

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


def failures(rows) -> list[str]:
    return [text for row in acceptance_report.failed(list(rows)) for text in row["failures"]]


# The steps


def test_the_preflight_names_the_machine_and_checks_both_implementations():
    environment, *checks = acceptance.preflight(Cpu(), FOREVER)
    assert environment["case"] == "environment"
    assert {"torch", "triton"} <= environment["versions"].keys()
    assert "rehearsal" in environment
    assert [row["case"] for row in checks] == ["triton:split", "triton:addmm", "torch"]
    assert all(row["passed"] for row in checks)


def test_a_preflight_with_wrong_numbers_fails(monkeypatch):
    forward = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a: tuple(1.1 * t for t in forward(*a)))
    found = failures(acceptance.preflight(Cpu(), FOREVER))
    assert len(found) == 4  # two strategies, two runs
    assert all(text.split(": ")[1] == "y" for text in found)


def test_numerics_are_the_tests_of_the_kernels():
    select = "test_shrink or test_repeats_bitwise[split-0.0]"
    (row,) = acceptance.numerics(Cpu(), FOREVER, select)
    assert row["passed"]
    assert row["tests"] == {"passed": 7, "failed": 0, "near": 0, "skipped": 0}


def test_numerics_that_select_nothing_fail():
    rows = list(acceptance.numerics(Cpu(), FOREVER, "no such test"))
    assert acceptance_report.verdict([{"step": "numerics"} | row for row in rows]) != "PASS"


def test_a_failing_test_is_a_row_of_its_own():
    nowhere = Cpu()
    nowhere.device = torch.device("meta")
    failed, total = acceptance.numerics(nowhere, FOREVER, "test_sum_partials and shape0")
    assert failed["case"].endswith("::test_sum_partials[shape0]")
    assert failed["failures"][0]
    assert total["tests"]["failed"] == 1
    assert not total["passed"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (pytest.ExitCode.OK, True),
        (pytest.ExitCode.TESTS_FAILED, True),  # near their bounds, all of them
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
    (row,) = acceptance_report.load(tmp_path / "rows")
    assert (row["passed"], row["tests"]) == (expected, counts)


# error, dtype, and whether it is reported apart
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
    assert (acceptance_report.verdict(rows) == "PASS") is expected
    said = acceptance_report.line("numerics", rows)
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
    assert acceptance_report.verdict(rows) == expected


@pytest.mark.parametrize("run", [acceptance.repeatability, acceptance.graphs])
def test_strategies_repeat_and_replay(run):
    rows = list(run(Cpu(), FOREVER))
    assert len(rows) == 15  # three strategies, two with dropout, three dtypes
    assert all(row["passed"] for row in rows)


def test_results_that_differ_from_run_to_run_are_found(monkeypatch):
    forward, count = ops.forward, []

    def noisy(*args):
        y, S = forward(*args)
        count.append(0)
        return y + 1e-2 * len(count), S

    monkeypatch.setattr(ops, "forward", noisy)
    assert len(failures(acceptance.repeatability(Cpu(), FOREVER))) == 15
    assert any("a replay and an eager" in f for f in failures(acceptance.graphs(Cpu(), FOREVER)))


def test_a_mask_that_does_not_change_is_found(monkeypatch):
    monkeypatch.setattr(dropout, "draw_seed", lambda device: torch.tensor(3))
    found = failures(acceptance.graphs(Cpu(), FOREVER))
    assert len(found) == 6
    assert all("two replays drop the same entries" in line for line in found)


def test_a_backward_with_another_mask_is_found(monkeypatch):
    backward = ops.backward

    def other_mask(dy, x, weight, A, B, S, scaling, words, *args):
        return backward(
            dy, x, weight, A, B, S, scaling, None if words is None else words.flip(0), *args
        )

    monkeypatch.setattr(ops, "backward", other_mask)
    found = failures(acceptance.graphs(Cpu(), FOREVER))
    assert len(found) == 6
    assert all("by the mask of dx, y: relative RMS" in line for line in found)


def test_tuning_keeps_both_clocks():
    (row,) = acceptance.tuning(Cpu(), FOREVER)
    assert row["passed"]
    for name in ("split", "addmm", "torch"):
        assert row["forward"]["microseconds"][name] == 1e6
        assert row["backward"]["host_microseconds"][name] == 2e6
    call = tuned.Call("forward", torch.float32, 80, 32, 48, 4, False)
    assert tuned.lookup(call, torch.device("cpu")).microseconds["split"] == 1e6


def test_a_wrong_candidate_fails_tuning(monkeypatch):
    forward = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a: tuple(2 * t for t in forward(*a)))
    (line, *_) = failures(acceptance.tuning(Cpu(), FOREVER))
    assert "split left out" in line


def test_what_was_measured_is_set_beside_what_was_modelled():
    list(acceptance.tuning(Cpu(), FOREVER))
    rows = list(acceptance.comparison(Cpu(), FOREVER))
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

    providers = {name: acceptance.PROVIDERS[name] for name in ("frozen", "eager", "fused")}
    for held in (acceptance.PROVIDERS, __import__("measure").PROVIDERS):
        monkeypatch.setitem(held, "peft", broken)
    monkeypatch.setattr(acceptance, "PROVIDERS", providers | {"peft": broken})
    monkeypatch.setattr(acceptance, "CORE", ("eager", "peft", "fused"))
    monkeypatch.setattr("measure.MIN_SECONDS", 0.1)
    monkeypatch.setattr(acceptance, "LAYER_SECONDS", 0.1)
    core, everyone = acceptance.benchmark(Cpu(), FOREVER)
    for row in (core, everyone):
        assert row["passed"]
        assert row["ratios"].keys() == {"frozen", "eager", "fused"}
        assert row["ratios"]["frozen"] == 1.0
        assert row["left out"]["peft"] == "failed: RuntimeError: no"


def test_a_layer_of_ours_that_raises_fails_the_benchmark(monkeypatch):
    forward = acceptance.PROVIDERS["fused"]

    def wrong(problem):
        layer = forward(problem)
        layer.module.scaling = 7.0
        return layer

    monkeypatch.setitem(acceptance.PROVIDERS, "fused", wrong)
    monkeypatch.setattr(acceptance, "CORE", ("eager", "fused"))
    row = next(acceptance.benchmark(Cpu(), FOREVER))
    assert not row["passed"]
    assert row["failures"][0].startswith("fused failed: WrongResultError")
    assert "eager" in row["ratios"]


def test_a_case_that_raises_is_a_row_and_the_next_are_run(monkeypatch):
    """A capture that fails, say; but not an error after which the device is unusable."""
    tune, errors = acceptance.tune, [RuntimeError("no\ndetails")]

    def fail_first(*args, **kwargs):
        if errors:
            raise errors.pop()
        return tune(*args, **kwargs)

    monkeypatch.setattr(acceptance, "tune", fail_first)
    gpu = Cpu()
    gpu.layers = (LAYER._replace(M=90), LAYER)
    first, second = acceptance.tuning(gpu, FOREVER)
    assert (first["passed"], first["failures"]) == (False, ["RuntimeError: no"])
    assert second["passed"]
    errors.append(torch.AcceleratorError("lost"))
    with pytest.raises(torch.AcceleratorError):
        list(acceptance.tuning(gpu, FOREVER))


def test_cases_that_no_time_is_left_for_are_said():
    spent = Allowance(-1.0)
    assert len(list(acceptance.preflight(Cpu(), spent))) == 4  # what all else stands on
    steps = (
        acceptance.probe,
        acceptance.repeatability,
        acceptance.graphs,
        acceptance.tuning,
        acceptance.benchmark,
    )
    for step in steps:
        assert all("no time left" in row["skipped"] for row in step(Cpu(), spent))


def test_the_probe_tries_every_candidate_of_every_kernel():
    rows = list(acceptance.probe(Cpu(), FOREVER))
    assert not failures(rows)
    ran = {row["case"].split()[0]: row["ran"] for row in rows}
    assert ran.keys() == {"copy", "mask", "gemm", "add", "shrink", "rank_grad"}
    kinds = {name.split()[0] for names in ran.values() for name in names}
    assert {"mm", "addmm_", "seeded", "lora_gemm", "lora_add", "copy_", "dropout_mask"} <= kinds
    assert any("masked" in name for name in ran["gemm"])
    tiles = configs.shrink_candidates(configs.INTERPRETER, 2, 8, describable=True)
    assert len(ran["shrink"]) == 1 + 3 * len(tiles)  # the vendor's, and three numbers of splits
    few = Cpu()
    few.probed = ((16, 128, 64, 8),)
    ran = {row["case"].split()[0]: row["ran"] for row in acceptance.probe(few, FOREVER)}
    assert any(name.startswith("single_pass") for name in ran["gemm"])


def test_a_candidate_that_fails_is_a_row_and_the_others_are_timed(monkeypatch):
    gpu = Cpu()
    gpu.device_seconds = lambda calls: {name: [2e-6, 1e-6, 3e-6] for name in calls}

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource\ndetails")

    monkeypatch.setattr(probe, "lora_gemm", broken)
    rows = [row for row in acceptance.probe(gpu, FOREVER) if row["case"].startswith("gemm")]
    wrong = acceptance_report.failed(rows)
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
    assert preflight[1] >= 6  # forward and backward of two strategies
    assert probing[1] >= 50
    assert probing[1] + preflight[1] == len(acceptance_plan.binaries)
    names = {binary[0] for binary in acceptance_plan.binaries}
    expected = {"shrink", "lora_gemm", "lora_add", "rank_grad", "single_pass", "dropout_mask"}
    assert {f"_{name}" for name in expected} <= names
    assert probing[2] < gpu_acceptance.STEPS["probe"]
    again = acceptance_plan.plan(Gpu(torch.device("meta")))
    assert next(again)[1] == 0
    again.close()


# The command


def start(out, *arguments, script=SCRIPT, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, "--out", out, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "FUSED_LORA_CACHE"} | environment,
    )  # fmt: skip


def wait_for(path: Path, step: str) -> list[dict]:
    """The rows, once one of ``step`` is there."""
    for _ in range(1200):
        rows = acceptance_report.load(path) if path.exists() else []
        if any(row["step"] == step for row in rows):
            return rows
        time.sleep(0.1)
    raise AssertionError(f"no row of {step}")


def processes_of(out) -> list[int]:
    """Live processes whose environment names ``out``, as those of the steps do."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if str(out) in (folder / "environ").read_text(errors="replace") and state != "Z":
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_steps_run_in_order_and_are_written(tmp_path):
    """Those that stand on each other; the others' rows have tests of their own above."""
    rest = ["preflight", "probe", "tuning", "comparison"]
    asked = reversed(rest)
    running = start(tmp_path / "a", "--budget", 300, "--commit", "abc", "--only", *asked)
    out, err = running.communicate()
    assert running.returncode == 0, out + err
    assert out.splitlines()[-1] == "PASS"
    rows = acceptance_report.load(tmp_path / "a" / "rows.jsonl")
    assert rows[0]["commit"] == "abc"
    assert list(dict.fromkeys(row["step"] for row in rows)) == ["run", *rest]
    page = (tmp_path / "a" / "summary.md").read_text()
    assert "**PASS**" in page
    assert "commit abc" in page
    assert "interpreted: no time is a GPU's" in page
    assert "| layer | direction | kept |" in page
    assert json.loads((tmp_path / "a" / "tuned.json").read_text())["format"] == tuned.FORMAT


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
    acceptance_report.write(tmp_path / "page.md", rows)
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
    assert acceptance_report.load(tmp_path / "rows") == [{"step": "a"}]


# The signal, and the step that runs when it comes
KILLS = [(signal.SIGTERM, "probe"), (signal.SIGKILL, "probe"), (signal.SIGKILL, "numerics")]


@pytest.mark.parametrize("case", KILLS, ids=str)
def test_killed_half_way_it_leaves_what_it_has(case, tmp_path):
    number, step = case
    out = tmp_path / "out"
    running = start(out, "--only", "preflight", step, "repeatability")
    wait_for(out / "rows.jsonl", step)
    assert processes_of(out)
    running.send_signal(number)
    running.wait(20)
    rows = acceptance_report.load(out / "rows.jsonl")
    assert [row["case"] for row in rows if row.get("passed")][:3] == [
        "triton:split", "triton:addmm", "torch",
    ]  # fmt: skip
    assert "repeatability" not in {row["step"] for row in rows}
    for _ in range(50):
        if not processes_of(out):
            break
        time.sleep(0.1)
    assert processes_of(out) == []
    if number == signal.SIGTERM:
        assert running.returncode == 1
        assert rows[-1]["failures"] == ["interrupted"]
        assert "FAIL: run (1)" in (out / "summary.md").read_text()


# Replaces steps when their module is imported.
PLANT = """
import importlib.abc, importlib.util, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "acceptance":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            vars(module).update(planted)
        spec.loader.exec_module = exec_module
        return spec

def raises(gpu, allowance):
    raise RuntimeError("sticky")
    yield

def ends(gpu, allowance):
    yield {"case": "before", "passed": False, "near": True, "failures": ["by 3 %"]}
    os._exit(9)

def aborts(gpu, allowance):
    os.abort()
    yield

def hangs(gpu, allowance):
    yield {"case": "before"}
    time.sleep(600)

def fails(gpu, allowance):
    yield {"case": "numbers", "passed": False, "failures": ["wrong"]}

planted = {PLANTED}
sys.meta_path.insert(0, Finder())
"""


def start_planted(tmp_path, planted: str, *arguments) -> subprocess.Popen:
    (tmp_path / "sitecustomize.py").write_text(PLANT.replace("PLANTED", planted))
    path = os.pathsep.join([str(tmp_path), str(SCRIPT.parent)])
    return start(tmp_path / "out", *arguments, PYTHONPATH=path)


def test_a_step_that_dies_costs_itself_alone(tmp_path):
    planted = "'repeatability': raises, 'graphs': ends, 'tuning': aborts"
    steps = ("repeatability", "graphs", "tuning", "comparison")
    path = tmp_path / "out" / "rows.jsonl"
    path.parent.mkdir()
    old = {"step": "repeatability", "passed": False, "failures": ["of an earlier run"]}
    path.write_text(json.dumps(old) + '\n{"step": "cut o')
    out, err = start_planted(tmp_path, planted, "--only", *steps).communicate()
    rows = acceptance_report.load(path)[1:]
    assert rows[0]["step"] == "run"
    wrong = {row["step"]: row["failures"][0] for row in acceptance_report.failed(rows)}
    assert wrong.keys() == set(steps[:3]), out + err
    assert "RuntimeError: sticky" in wrong["repeatability"]
    assert "ended with status 9" in wrong["graphs"]
    assert "ended with status -6" in wrong["tuning"]
    assert {"step": "graphs", "case": "before"}.items() <= rows[2].items()
    assert "comparison: 0 rows" in out  # what comes after them was run
    assert out.splitlines()[-1] == "FAIL: repeatability (1), graphs (1), tuning (1)"


def test_a_step_that_hangs_costs_itself_alone(tmp_path):
    arguments = ("--budget", 21, "--only", "graphs", "comparison")
    begin = time.monotonic()
    running = start_planted(tmp_path, "'graphs': hangs", *arguments)
    out, err = running.communicate()
    assert time.monotonic() - begin < 40
    assert running.returncode == 1, out + err
    rows = acceptance_report.load(tmp_path / "out" / "rows.jsonl")
    (wrong,) = acceptance_report.failed(rows)
    assert wrong["step"] == "graphs"
    assert "stopped after 12 s, its limit" in wrong["failures"][0]
    assert "in hangs" in (tmp_path / "out" / "log.txt").read_text()  # a traceback before its end
    assert any(row.get("case") == "before" for row in rows)
    assert "comparison: " in out


def test_a_failed_preflight_ends_the_run(tmp_path):
    arguments = ("--only", "preflight", "comparison")
    running = start_planted(tmp_path, "'preflight': fails", *arguments)
    out, _ = running.communicate()
    assert running.returncode == 1
    assert "nothing after it would mean anything" in out
    assert "comparison" not in out
    assert out.splitlines()[-1] == "FAIL: preflight (1)"


def test_without_a_gpu_nothing_runs(tmp_path):
    running = start(tmp_path, TRITON_INTERPRET="0")
    out, err = running.communicate()
    assert running.returncode == 2
    assert "expected a GPU" in err
    assert "TRITON_INTERPRET=1" in err
    assert out == "preflight: 0 rows\n"


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "soon"])
def test_a_budget_must_be_a_time(budget, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_acceptance.main(["--budget", budget])
    assert "expected a positive number of seconds" in capsys.readouterr().err


def test_it_runs_from_a_bare_checkout(tmp_path):
    """Nothing is installed there: the finder of an editable install is taken away."""
    for name in ("benchmarks", "fused_lora", "kernels", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        for finder in [f for f in sys.meta_path if 'editable' in str(f).lower()]:\n"
        "            sys.meta_path.remove(finder)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    script = tmp_path / "benchmarks" / "gpu_acceptance.py"
    running = start(
        tmp_path / "out", "--only", "preflight", script=script, PYTHONPATH=str(tmp_path / "plant")
    )
    out, err = running.communicate()
    assert running.returncode == 0, out + err + (tmp_path / "out" / "log.txt").read_text()
    command = [sys.executable, "-c", "import checkout, fused_lora; print(fused_lora.__file__)"]
    where = os.pathsep.join([str(tmp_path / "plant"), str(tmp_path / "benchmarks")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path / "plant", check=True,
        env=os.environ | {"PYTHONPATH": where},
    )  # fmt: skip
    assert Path(done.stdout.strip()) == tmp_path / "fused_lora" / "__init__.py"
