"""The command benchmarks/gpu_acceptance.py, run as a process: kills, hangs, crashes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
import gpu_acceptance
from fused_lora.strategy import tuning_cache
from gpu import summary
from support import by_default, swept

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_acceptance.py"


def start(out, *arguments, script=SCRIPT, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, "--out", out, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "FUSED_LORA_CACHE"} | environment,
    )  # fmt: skip


def wait_for(path: Path, step: str) -> list[dict]:
    """Wait for a row of ``step``; returns all rows so far."""
    for _ in range(1200):
        rows = summary.load(path) if path.exists() else []
        if any(row["step"] == step for row in rows):
            return rows
        time.sleep(0.1)
    raise AssertionError(f"no row of {step}")


def processes_of(out) -> list[int]:
    """Live processes whose environment contains ``out``: those of the steps."""
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
    """The steps that depend on each other; test_gpu_acceptance.py tests the rows of the others."""
    rest = ["preflight", "probe", "tuning", "comparison"]
    asked = reversed(rest)
    running = start(tmp_path / "a", "--budget", 300, "--commit", "abc", "--only", *asked)
    out, err = running.communicate()
    assert running.returncode == 0, out + err
    assert out.splitlines()[-1] == "PASS"
    rows = summary.load(tmp_path / "a" / "rows.jsonl")
    assert rows[0]["commit"] == "abc"
    assert list(dict.fromkeys(row["step"] for row in rows)) == ["run", *rest]
    page = (tmp_path / "a" / "summary.md").read_text()
    assert "**PASS**" in page
    assert "commit abc" in page
    assert "interpreted: times are not a GPU's" in page
    assert "| layer | direction | kept |" in page
    assert json.loads((tmp_path / "a" / "tuned.json").read_text())["format"] == tuning_cache.FORMAT


# signal, and the step that is running when it arrives
KILLS = [(signal.SIGTERM, "probe"), (signal.SIGKILL, "probe"), (signal.SIGKILL, "numerics")]


@pytest.mark.parametrize("case", by_default(KILLS[1:2], KILLS), ids=str)
def test_killed_half_way_it_leaves_what_it_has(case, tmp_path):
    number, step = case
    out = tmp_path / "out"
    running = start(out, "--only", "preflight", step, "repeatability")
    wait_for(out / "rows.jsonl", step)
    assert processes_of(out)
    running.send_signal(number)
    running.wait(20)
    rows = summary.load(out / "rows.jsonl")
    assert [row["case"] for row in rows if row.get("passed")][:4] == [
        "triton:split", "triton:seeded", "triton:addmm", "torch",
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


# A sitecustomize.py that replaces steps when ``gpu.steps`` is imported.
PLANT = """
import importlib.abc, importlib.util, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "gpu.steps":
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


@swept
def test_a_step_that_dies_costs_itself_alone(tmp_path):
    planted = "'repeatability': raises, 'graphs': ends, 'tuning': aborts"
    steps = ("repeatability", "graphs", "tuning", "comparison")
    path = tmp_path / "out" / "rows.jsonl"
    path.parent.mkdir()
    old = {"step": "repeatability", "passed": False, "failures": ["of an earlier run"]}
    path.write_text(json.dumps(old) + '\n{"step": "cut o')
    out, err = start_planted(tmp_path, planted, "--only", *steps).communicate()
    rows = summary.load(path)[1:]
    assert rows[0]["step"] == "run"
    wrong = {row["step"]: row["failures"][0] for row in summary.failed(rows)}
    assert wrong.keys() == set(steps[:3]), out + err
    assert "RuntimeError: sticky" in wrong["repeatability"]
    assert "ended with status 9" in wrong["graphs"]
    assert "ended with status -6" in wrong["tuning"]
    assert {"step": "graphs", "case": "before"}.items() <= rows[2].items()
    assert "comparison: 0 rows" in out  # the step after them was run
    assert out.splitlines()[-1] == "FAIL: repeatability (1), graphs (1), tuning (1)"


@swept
def test_a_step_that_hangs_costs_itself_alone(tmp_path):
    arguments = ("--budget", 30, "--only", "graphs", "comparison")
    begin = time.monotonic()
    running = start_planted(tmp_path, "'graphs': hangs", *arguments)
    out, err = running.communicate()
    assert time.monotonic() - begin < 40
    assert running.returncode == 1, out + err
    rows = summary.load(tmp_path / "out" / "rows.jsonl")
    (wrong,) = summary.failed(rows)
    assert wrong["step"] == "graphs"
    assert "stopped after 17 s, its limit" in wrong["failures"][0]
    assert "in hangs" in (tmp_path / "out" / "log.txt").read_text()  # its traceback
    assert any(row.get("case") == "before" for row in rows)
    assert "comparison: " in out


def test_a_failed_preflight_ends_the_run(tmp_path):
    arguments = ("--only", "preflight", "comparison")
    running = start_planted(tmp_path, "'preflight': fails", *arguments)
    out, _ = running.communicate()
    assert running.returncode == 1
    assert "the other steps would be meaningless" in out
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


@swept
def test_it_runs_from_a_bare_checkout(tmp_path):
    """The package need not be installed: the finder of an editable install is removed."""
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
    command = [
        sys.executable,
        "-c",
        "import harness.checkout, fused_lora; print(fused_lora.__file__)",
    ]
    where = os.pathsep.join([str(tmp_path / "plant"), str(tmp_path / "benchmarks")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path / "plant", check=True,
        env=os.environ | {"PYTHONPATH": where},
    )  # fmt: skip
    assert Path(done.stdout.strip()) == tmp_path / "fused_lora" / "__init__.py"
