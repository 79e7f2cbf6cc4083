"""The pages' numbers and picture: written from results files, and equal to the committed ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_rows import report_of, result_of

import headline
import plot
import targets
from harness import shapes
from harness.shapes import Shape
from report import records, table
from whole_model import recorded

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def _step_file(path: Path, tiny: bool = False, providers=("peft", "fused", "peft-patched")) -> Path:
    """A file of model_step.py: ours takes 0.75 of PEFT's time, and 0.5 with dropout 0.1."""
    rows = []
    for dropout, ratio in ((0.0, 0.75), (0.1, 0.5)):
        results = {}
        for name in providers:
            own = 1.0 if name == "peft" else ratio
            quartiles = {"median": own, "q1": own, "q3": own}
            results[name] = {"seconds": quartiles, "ratio": quartiles}
            results[name] |= {"held_bytes": 10**9, "step_bytes": int(own * 10**9)}
        setting = {"model": "gpt2", "dtype": "bfloat16", "dropout": dropout, "tiny": tiny}
        rows.append({"setting": setting, "results": results})
    data = {"machine": report_of().machine, "checks": [], "rows": rows}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def page(tmp_path):
    (tmp_path / "results").mkdir()
    report_of().save(tmp_path / "results" / "cpu")
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- layer results/cpu.json -->\nold\n<!-- /layer -->\nafter\n")
    return path


def test_a_layers_block(page, capsys):
    assert headline.main(["--check", str(page)]) == 1
    assert "differs from its results" in capsys.readouterr().err
    assert headline.main([str(page)]) == 0
    text = page.read_text()
    assert text.startswith(
        "before\n<!-- layer results/cpu.json -->\n**Measured** on a processor (2 threads, bound"
    )
    assert text.endswith("<!-- /layer -->\nafter\n")
    assert "| 512, 768, 768, 8 | 1.50 (2.00) | 2.50 (0.00) | **1.25 (1.00)** |" in text
    assert "3.18 over peft and 1.20 over eager (bfloat16, dropout 0.1)" in text
    assert headline.main(["--check", str(page)]) == 0


def test_every_page_is_checked(page, capsys):
    other = page.with_name("other.md")
    other.write_text(page.read_text())
    assert headline.main([str(page), str(other)]) == 0
    assert capsys.readouterr().out.count("wrote ") == 2
    other.write_text(other.read_text().replace("1.25", "1.05"))
    assert headline.main(["--check", str(page), str(other)]) == 1
    assert "other.md differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "text", "message"),
    [
        (shapes.CPU_TARGETS, "no markers", "expected <!-- KIND FILE.json -->"),
        (
            shapes.CPU_TARGETS,
            "<!-- layer results/cpu.json -->\n<!-- /layer -->\n<!-- layer b.json -->\n",
            "got 2 start markers, 1 of them closed",
        ),
        (shapes.CPU_TARGETS, "<!-- layer gone.json -->\n<!-- /layer -->", "gone.json"),
        (shapes.CPU_TARGETS, "<!-- layer a b -->\n<!-- /layer -->", "expected one file"),
        (shapes.CPU_TARGETS, "<!-- headline a -->\n<!-- /headline -->", "expected STEP.json"),
        (shapes.CPU_TARGETS, "<!-- step results/cpu.json -->\n<!-- /step -->", "model_step.py"),
        (
            shapes.CPU_TARGETS,
            "<!-- few-tokens results/cpu.json -->\n<!-- /few-tokens -->",
            "expected rows of every number of tokens in bfloat16, dropout 0.1",
        ),
        (
            shapes.CPU_TARGETS,
            "<!-- compiled results -->\n<!-- /compiled -->",
            "tables of benchmarks/compile_report.py",
        ),
        (shapes.CPU_QUICK, None, "expected 960x4096x4096 r64"),
        (shapes.HEADLINE, None, "expected every shape of cpu-targets"),
    ],
    ids=[
        *("no markers", "no end", "no file", "two files", "no run", "another file", "few tokens"),
        *("no tables", "no row", "no mean"),
    ],
)
def test_a_block_says_what_is_missing(page, capsys, rows, text, message):
    report_of(rows).save(page.parent / "results" / "cpu")
    before = text or page.read_text()
    page.write_text(before)
    assert headline.main([str(page)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert page.read_text() == before


def test_a_block_of_a_cpu_that_emulates_is_of_what_it_measured(page):
    few = report_of(shapes.CPU_QUICK, fused=0.0234)
    emulating = replace(few, machine=few.machine | {"emulated": ["bfloat16", "float16"]})
    emulating.save(page.parent / "results" / "other")
    mark = "<!-- layer results/other.json -->\n<!-- /layer -->\n"
    page.write_text(page.read_text() + mark)
    assert headline.main([str(page)]) == 0
    first, second = page.read_text().split("after\n")
    assert "no instructions" not in first
    assert "3.18 over peft" in first
    assert "(2 threads, bound, no instructions for bfloat16, torch 2.13.0)" in second
    assert "| 512, 768, 768, 8 | 1.50 (2.00) | 2.50 (0.00) | **0.023 (1.00)** |" in second
    assert "960, 4096" not in second
    assert "over peft" not in second
    assert "no instructions for bfloat16 and float16" in table.render(emulating)


def _written(page: Path, kind: str, files: str) -> str:
    page.write_text(f"<!-- {kind} {files} -->\n<!-- /{kind} -->\n")
    assert headline.main([str(page)]) == 0
    return page.read_text()


def test_a_steps_block(page):
    _step_file(page.with_name("step.json"))
    text = _written(page, "step", "step.json")
    assert (
        "| GPT-2 124M, no dropout | 1.00 s (2.00 GB) | - | 0.75 (0.88) | - | 0.75 (0.88) |" in text
    )
    assert (
        "| GPT-2 124M, dropout 0.1 | 1.00 s (2.00 GB) | - | 0.50 (0.75) | - | 0.50 (0.75) |" in text
    )


def test_the_headline_has_ranges_means_and_what_is_lost(page):
    _step_file(page.with_name("step.json"))
    few = [Shape(m, 768, 768, 8) for m in (1, 16, 128)]
    rows = [*report_of((*shapes.CPU_TARGETS, *few)).rows]
    rows += [replace(row, dropout=0.0) for row in rows]
    slow = {(1, 0.1): 2.4, (16, 0.1): 1.8, (128, 0.1): 9.0}  # eager, the best peer, takes 1.5
    for i, row in enumerate(rows):
        if ratio := slow.get((row.shape.M, row.dropout)):
            rows[i] = replace(row, results=row.results | {"fused": result_of(ratio)})
    for name, own in (("a", rows), ("b", rows)):
        replace(report_of(), rows=own).save(page.with_name(name))
    text = _written(page, "headline", "step.json a.json b.json")
    for said in (
        "0.50 to 0.75 of PEFT's time per step, 0.75 to 0.88 of its peak memory",
        "**3.18 times as fast as PEFT**, 1.20 times as fast as the eager formula; without dropout"
        " 3.18",
        "**1.00 times the bytes of `x`**; PEFT keeps 0.00",
        "with 1 to 16 tokens it takes up to 1.60 times the fastest peer's time (bfloat16, dropout"
        " 0.1)",
    ):
        assert said in text, said
    text = _written(page, "few-tokens", "a.json b.json")
    assert "| 1, 768 x 768 | 1.60 | 1.60 | 0.83 | 0.83 |" in text
    assert "| 128, 768 x 768 | 6.00 | 6.00 | 0.83 | 0.83 |" in text
    assert "| 500 or more, every shape | 0.83 | 0.83 | 0.83 | 0.83 |" in text


def test_a_compiled_block_adds_up(page):
    folder = page.parent / "results"
    for arch, kernels, unfit in (("sm_100", 1200, 0), ("gfx942", 30, 1), ("sm_80", 4, 0)):
        first = f"{arch}, compiled (Triton 3.7.1), not run: {kernels} kernels, {unfit} unfit\n"
        (folder / f"{arch}.txt").write_text(first + "more\n")
    (folder / "search-sm_80.txt").write_text("candidates\n")
    text = _written(page, "compiled", "results")
    assert "by Triton 3.7.1, not run: 1,234 kernels" in text
    targets_found = [line.split(" | ")[:3] for line in text.splitlines() if "[table]" in line]
    assert targets_found == [
        *(["| sm_80", "4", "0"], ["| sm_100", "1,200", "0"], ["| gfx942", "30", "1"])
    ]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"tiny": True}, "got those of --quick"),
        ({"providers": ("peft", "fused")}, "expected steps of peft, peft-patched, fused"),
    ],
    ids=["tiny", "no patch"],
)
def test_steps_that_no_page_may_show(tmp_path, file, message):
    with pytest.raises(records.FormatError, match=message):
        recorded.load(_step_file(tmp_path / "step.json", **file))


def test_the_readmes_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import PIL.Image

    path = _step_file(tmp_path / "step.json")
    assert plot.main([str(path), str(tmp_path / "picture")]) == 0
    assert capsys.readouterr().out.count("wrote ") == 2
    for theme, page_color in (("light", (255, 255, 255)), ("dark", (13, 17, 23))):
        file = tmp_path / f"picture-{theme}.png"
        assert file.stat().st_size < 80_000
        picture = PIL.Image.open(file).convert("RGBA")
        assert picture.width > 1500
        corner = picture.getpixel((2, 2))
        assert corner[3] == 255  # opaque
        assert max(abs(a - b) for a, b in zip(corner, page_color, strict=False)) <= 2
    assert plot.main([]) == 2
    assert "expected a results file" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("{}")
    assert plot.main([str(tmp_path / "none.json")]) == 2
    assert "expected the JSON of benchmarks/run.py" in capsys.readouterr().err


def test_committed_pages_are_what_their_results_say(capsys):
    assert headline.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["cpu-2026-11-25", "avx2/cpu-2026-11-26"])
def test_committed_tables_are_those_of_their_files(name):
    report = records.load(RESULTS / f"{name}.json")
    assert table.render(report).rstrip() == (RESULTS / f"{name}.txt").read_text().rstrip()


def test_committed_targets_are_those_of_three_runs(capsys):
    runs = [str(RESULTS / f"cpu-2026-11-25{run}.json") for run in ("", "-run2", "-run3")]
    both = (RESULTS / "cpu-2026-11-25-targets.txt").read_text().split("$ ")[1:]
    for text, options in zip(both, ([], ["--provider", "fused-bf16"]), strict=True):
        assert targets.main([*runs, *options]) == 1
        assert text.partition("\n")[2].rstrip() == capsys.readouterr().out.rstrip()
