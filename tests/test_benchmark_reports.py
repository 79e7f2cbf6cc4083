"""What a benchmark run reports: files, means, comparison, targets, the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from benchmark_rows import report_of, result_of

import plot
import targets
from harness import shapes
from harness.shapes import Shape
from harness.timing import Quartiles
from report import compare, records, table
from report.records import Report


def test_a_mean_is_over_shapes_without_repeats():
    for name, listed in shapes.MEANS.items():
        assert len(set(listed)) == len(listed), name
    assert set(shapes.HEADLINE) <= set(shapes.MEANS[targets.MEAN]) <= set(shapes.CPU_FULL)


def test_a_report_survives_its_file(tmp_path):
    report = report_of()
    json_path, csv_path = report.save(tmp_path / "cpu-2026-01-31")
    assert records.load(json_path) == report
    lines = csv_path.read_text().splitlines()
    assert len(lines) == 1 + 4 * len(report.rows)
    assert lines[0].startswith("M,K,N,R,dtype,dropout,provider,rounds,seconds_median")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "expected the JSON of benchmarks/run.py"),
        ("{}", "KeyError"),
        ("[]", "TypeError"),
        (json.dumps({"schema": records.SCHEMA + 1}), "expected schema"),
        (json.dumps({"schema": records.SCHEMA, "machine": {}, "rows": [{}]}), "KeyError"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(records.FormatError, match=message):
        records.load(path)


def test_means():
    report = report_of()
    slow = math.ceil(len(shapes.CPU_TARGETS) / 2)
    expected = (4.5**slow * 2.0 ** (7 - slow)) ** (1 / 7)
    found = report.mean_speedup("cpu-targets", "bfloat16", 0.1, "fused", "peft")
    assert found == pytest.approx(expected)
    assert report.mean_speedup("cpu-targets", "bfloat16", 0.0, "fused", "peft") is None
    assert report.mean_speedup("cpu-targets", "bfloat16", 0.1, "fused", "loralib") is None
    part = report_of(shapes.CPU_TARGETS[1:])
    assert part.mean_speedup("cpu-targets", "bfloat16", 0.1, "fused", "peft") is None


def test_table():
    text = table.render(report_of())
    for line in (
        "measured on a processor (2 threads, OMP_PROC_BIND true), torch 2.13.0+cpu, 2026-01-31,"
        " 0123456789ab",
        "worst over peft: 2.00x at 512x768x768 r8",
        "worst over the best peer: 1.20x at 512x576x576 r8",
        "geometric mean of the 7 of cpu-targets: 3.18x over peft, 1.20x over eager",
        "skipped loralib in 14 rows: not installed",
    ):
        assert line in text.splitlines()
    row = next(line for line in text.splitlines() if line.startswith("960x4096x4096 r64"))
    assert row.split()[2:] == [
        *("9", "1", "1.00", "1.50", "5.62", "1.25", "1.24-1.26", "4.50x", "1.20x", "1.20x")
    ]


def test_pictures_show_the_longest_complete_list(tmp_path):
    other = Shape(8, 8, 8, 2)
    path, _ = report_of((*shapes.CPU_TARGETS, other)).save(tmp_path / "cpu")
    assert plot.main([str(path)]) == 0
    text = (tmp_path / "cpu-memory.svg").read_text()
    assert all(str(shape) in text for shape in shapes.CPU_TARGETS)
    assert str(other) not in text
    part, _ = report_of((other,)).save(tmp_path / "part")
    assert plot.main([str(part)]) == 0
    assert str(other) in (tmp_path / "part-memory.svg").read_text()


@pytest.mark.parametrize(
    ("fused", "spread", "verdict"),
    [(1.25, 0.01, "same"), (1.28, 0.01, "slower"), (1.28, 0.03, "same"), (1.20, 0.01, "faster")],
)
def test_compare_knows_noise(fused, spread, verdict):
    old, new = report_of(shapes.CPU_QUICK), report_of(shapes.CPU_QUICK, fused, spread)
    found = compare.changes(old, new)
    verdicts = {c.provider: c.verdict for c in found}
    assert verdicts == {"eager": "same", "peft": "same", "fused": verdict}
    assert len(found) == 3 * len(new.rows)
    text = compare.render(old, new)
    assert f"{verdict}: fused, 512x576x576 r8, bfloat16, dropout 0.1: 1.25" in text or (
        verdict == "same" and "24 same" in text
    )


def test_compare_says_that_the_machine_is_another():
    old = report_of()
    new = replace(old, machine=old.machine | {"threads": 8})
    assert "note: threads was 2 and is 8" in compare.render(old, new)
    for emulated, said in (([], False), (["bfloat16"], True)):
        new = replace(old, machine=old.machine | {"emulated": emulated})
        text = compare.render(old, new)
        assert ("note: emulated was None and is ['bfloat16']" in text) is said
        assert ("note:" in text) is said


def _without_dropout(fused: float, addmm: float, floor: float) -> Report:
    report = report_of(fused=fused)
    for row in report.rows:
        row.results.update(addmm=result_of(addmm), floor=result_of(floor))
    return replace(report, rows=[replace(row, dropout=0.0) for row in report.rows])


def test_targets_are_met_and_missed():
    found = list(targets.verdicts([_without_dropout(1.06, 1.05, 1.02)]))
    assert all(verdict.met for verdict in found)
    # Per dtype, 7 shapes against the best peer and 6 against the products; then the 3 means
    # without dropout, of 4.
    assert len(found) == 2 * (7 + 6) + 3

    found = list(targets.verdicts([_without_dropout(1.49, 1.3, 1.42)]))
    missed = [str(verdict) for verdict in found if not verdict.met]
    assert len(missed) == 2 * (7 + 6) + 2, missed  # 2: the means over eager, 1.5 / 1.49
    for shape, limit in (
        ("512x2048x2048 r16", "1.08 of the frozen layer"),
        ("1024x768x3072 r16", "the bare products' 1.42 + 0.05"),
    ):
        assert f"MISSED  {shape}, float32, dropout 0, at most {limit}: 1.49" in missed


def test_a_shape_is_behind_in_two_runs_of_three(tmp_path, capsys):
    runs = [_without_dropout(fused, 1.05, 1.02) for fused in (1.2, 1.06, 1.06)]
    assert all(verdict.met for verdict in targets.verdicts(runs))
    runs[1] = runs[0]
    behind = [verdict for verdict in targets.verdicts(runs) if not verdict.met]
    assert any(verdict.found == "1.14 1.14 1.01" for verdict in behind)

    paths = [run.save(tmp_path / str(i))[0] for i, run in enumerate(runs)]
    assert targets.main(list(map(str, paths))) == 1
    assert "met, in 3 runs" in capsys.readouterr().out
    assert targets.main([str(tmp_path / "gone.json")]) == 2
    assert "gone.json" in capsys.readouterr().err

    gpu = replace(runs[0], machine=runs[0].machine | {"device": "cuda"})
    with_dropout = report_of()
    for nothing in ((gpu,), (runs[0], with_dropout)):
        files = [run.save(tmp_path / f"nothing{i}")[0] for i, run in enumerate(nothing)]
        assert targets.main(list(map(str, files))) == 2
        assert "expected results of a CPU" in capsys.readouterr().err


def test_targets_of_another_provider():
    report = _without_dropout(1.49, 1.05, 1.02)
    for row in report.rows:
        if row.dtype == "bfloat16":
            row.results["fused-bf16"] = result_of(1.06)
    missed = [v for v in targets.verdicts([report], "fused-bf16") if not v.met]
    assert missed
    assert all("float32" in verdict.name for verdict in missed)


@pytest.fixture
def runner(monkeypatch):
    """benchmarks/run.py; the OpenMP setting of its import must not reach child processes."""
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    import run

    return run


def test_run(runner, tmp_path, capsys):
    options = ["--shapes", "24,32,40,4", "64,48,32,2", "--dtype", "bfloat16", "--seconds", "0.1"]
    options += ["--providers", "eager,peft,fused,fused-split", "--out", str(tmp_path)]
    assert runner.main([*options, "--dropout", "0", "0.1"]) == 0
    out = capsys.readouterr().out
    for text in (
        "bfloat16, dropout 0.1",
        "24x32x40 r4",
        "worst over peft: ",
        "skipped fused-split in 4 rows: Triton's kernels run on CUDA",
    ):
        assert text in out
    stem = next(tmp_path.glob("cpu-*.json"))
    report = records.load(stem)
    assert [row.key for row in report.rows] == [
        (shape, "bfloat16", p)
        for p in (0.0, 0.1)
        for shape in (Shape(24, 32, 40, 4), Shape(64, 48, 32, 2))
    ]
    for row in report.rows:
        assert list(row.results) == ["frozen", "eager", "peft", "fused"]
        assert row.results["frozen"].ratio == Quartiles(1.0, 1.0, 1.0)
        assert row.results["fused"].saved_bytes < row.results["peft"].saved_bytes
    pictures = {path.suffix: path for path in tmp_path.glob("cpu-*-*-*-speedup.*")}
    assert pictures.keys() == {".png", ".svg"}
    assert pictures[".png"].read_bytes().startswith(b"\x89PNG")
    assert "24x32x40 r4" in pictures[".svg"].read_text()
    assert len(list(tmp_path.glob("cpu-*"))) == 8  # two data files, three pictures in two formats
    assert runner.main([*options, "--dropout", "0.1", "--compare", str(stem)]) == 0
    assert "against " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "1,2,3"], "expected M,K,N,R as four positive numbers, got 1,2,3"),
        (["--shapes", "1,2,0,4"], "expected M,K,N,R as four positive numbers"),
        (["--models", "gpt9"], "expected names of gpt2, "),
        (["--providers", "eager,nobody"], "got nobody"),
        (["--dropout", "1"], "expected a probability in [0, 1), got 1"),
        (["--dtype", "int8"], "invalid choice"),
        (["--tokens", "5"], "expected --models with --tokens"),
        (["--models", "gpt2", "--tokens", "1.5"], "expected a positive whole number, got 1.5"),
        (["--models", "gpt2", "--shapes", "1,2,3,4"], "expected --models or --shapes, got both"),
        (["--quick", "--full"], "not allowed with"),
        (["--compare", "gone.json"], "gone.json"),
        (["--out", __file__], "test_benchmark_reports.py"),
        (["--seconds", "-1"], "expected a number above 0, got -1"),
    ],
)
def test_run_says_what_is_wrong_with_an_option(runner, options, message, capsys):
    try:
        status = runner.main(options)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_models_rows(runner):
    args = runner.parse(["--models", "gpt2,llama3-8b", "--tokens", "64"])
    assert runner.shapes(args)[:2] == [Shape(64, 768, 2304, 16), Shape(64, 768, 768, 16)]
    assert Shape(64, 4096, 14336, 16) in runner.shapes(args)


def test_a_set_leaves_out_what_a_cpu_emulates_for_hours(runner, monkeypatch, capsys):
    monkeypatch.setattr(runner.machine, "emulated", lambda device: ["bfloat16", "float16"])
    small, large = Shape(512, 576, 576, 8), Shape(512, 2048, 2048, 16)
    for size, count in (("--quick", 1), ("--full", 8)):
        found = runner.keys(runner.parse([size, "--dropout", "0", "--device", "cpu"]))
        narrow = [shape for shape, dtype, _ in found if dtype == "bfloat16"]
        assert small in narrow
        assert large not in narrow
        assert len(narrow) == count
        assert (large, "float32", 0.0) in found
        assert "large rows of bfloat16, which this CPU" in capsys.readouterr().err
    asked = ["--shapes", "512,2048,2048,16", "--dtype", "bfloat16", "--dropout", "0"]
    assert runner.keys(runner.parse(asked)) == [(large, "bfloat16", 0.0)]
    assert runner.keys(runner.parse(["--quick", "--dtype", "float32", "--dropout", "0"])) == [
        (shape, "float32", 0.0) for shape in shapes.CPU_QUICK
    ]
    assert not capsys.readouterr().err
