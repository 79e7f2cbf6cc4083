"""Write the measured numbers of README.md and docs/performance.md from the results files.

    python benchmarks/headline.py [--check] [PAGE.md ...]

A block begins with ``<!-- KIND FILE.json ... -->`` and ends with ``<!-- /KIND -->``; files are
relative to the page. The kinds:

* ``headline STEP.json RUN.json ...``: four sentences for the README.
* ``step STEP.json``: a whole model's training step, from model_step.py.
* ``layer RUN.json``: one layer, from run.py. For a CPU that emulates the table's dtype the block
  has only the measured shapes, and no means.
* ``few-tokens RUN.json ...``: where the layer is slower than its fastest peer, over several runs.
* ``shared SHARED.json``: layers of one input and gated MLPs together, from shared_input.py.
* ``compiled FOLDER``: the kernels of every target, from compile_report.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness.shapes import HEADLINE, MEANS, Shape
from report import records
from report.records import Report, Row
from report.table import OURS, PEERS, short
from whole_model import recorded
from whole_model.recorded import BASE, Setting

PAGES = ("README.md", "docs/performance.md")
COLUMNS = {"eager": "eager formula", "peft": "PEFT (default)", OURS: "**fused-lora**"}
ROWS = ("bfloat16", 0.1)  # the dtype and dropout that the table shows
MEAN = "cpu-targets"
STEP_COLUMNS = {
    "peft-bf16": "PEFT, bfloat16 adapters",
    "fused": "`apply_lora`",
    "fused-alone": "`apply_lora`, every layer alone",
    "peft-patched": "PEFT + `patch_peft`",
}
ONE_LINE = "peft-patched"
WIDTH, FEW, MANY = 768, (1, 16, 128), 500  # of few-tokens: features, then numbers of tokens
FEWEST = (1, 16)  # the range of tokens in which the layer loses most
START = re.compile(r"<!-- (headline|step|layer|few-tokens|shared|compiled) ")
BLOCK = re.compile(
    r"(<!-- (headline|step|layer|few-tokens|shared|compiled) ([^>\n]+?) -->\n).*?(?=<!-- /\2 -->)",
    re.DOTALL,
)
COMPILED = re.compile(r"(\w+), compiled \((Triton [\d.]+)\), not run: (\d+) kernels, (\d+) unfit\n")


class HeadlineError(ValueError):
    """A page without the markers, or results that lack what a block shows."""


def updated(page: Path) -> str:
    """The page's text with every block regenerated.

    Raises:
        HeadlineError: no markers, or the results lack a row.
        FormatError, OSError: the results cannot be read.
    """
    text = page.read_text()
    starts, blocks = len(START.findall(text)), len(BLOCK.findall(text))
    if not starts or blocks < starts:
        raise HeadlineError(
            f"{page}: expected <!-- KIND FILE.json --> and <!-- /KIND -->, got {starts} start"
            f" markers, {blocks} of them closed"
        )

    def block(found: re.Match) -> str:
        files = found[3].split()
        lines = KINDS[found[2]]([page.parent / file for file in files], files)
        return found[1] + "\n".join(lines) + "\n"

    return BLOCK.sub(block, text)


def _headline(paths: list[Path], links: list[str]) -> list[str]:
    """A model's step, a layer's time, what it keeps, and where it loses."""
    if len(paths) < 2:
        raise HeadlineError(f"expected STEP.json RUN.json ..., got {' '.join(links)}")
    machine, settings = recorded.load(paths[0])
    reports = [records.load(path) for path in paths[1:]]
    first, (dtype, dropout) = reports[0], ROWS
    times = _range([setting.steps[ONE_LINE].ratio.median for setting in settings])
    memory = _range([setting.memory_ratio(ONE_LINE) for setting in settings])
    dropped = _mean_speedups(first, *ROWS)
    plain = _mean_speedups(first, dtype, 0.0)
    rows = [_row(first, shape) for shape in HEADLINE]
    kept = {
        name: _range([row.results[name].saved_bytes / row.x_bytes for row in rows])
        for name in (OURS, "peft")
    }
    least, most = FEWEST
    worst = max(
        (row for report in reports for row in report.rows if least <= row.shape.M <= most),
        key=_slowdown,
    )
    return [
        f"Measured on {recorded.where(machine)}:",
        "",
        f"* **One line on PEFT, whole models: {times} of PEFT's time per step, {memory} of its peak"
        f" memory** ([table]({_text(links[0])})).",
        f"* One layer, mean of {len(MEANS[MEAN])} shapes, {dtype}, dropout {dropout:g}:"
        f" **{dropped['peft']:.2f} times as fast as PEFT**, {dropped['eager']:.2f} times as fast as"
        f" the eager formula; without dropout {plain['peft']:.2f} and {plain['eager']:.2f}"
        f" ([table]({_text(links[1])})).",
        f"* Kept for backward, same setting: **{kept[OURS]} times the bytes of `x`**; PEFT keeps"
        f" {kept['peft']}.",
        f"* Where it loses: with {least} to {most} tokens it takes up to {_slowdown(worst):.2f}"
        f" times the fastest peer's time ({worst.dtype}, dropout {worst.dropout:g}).",
    ]


def _step(paths: list[Path], links: list[str]) -> list[str]:
    """Time and peak memory as multiples of PEFT's, a line per model and dropout."""
    machine, settings = recorded.load(_only(paths))
    lines = [
        f"**Measured** on {recorded.where(machine)}, {settings[0].dtype}: a step's time and, in"
        " brackets, its peak memory,",
        f"as multiples of PEFT's with its default float32 adapters ([table]({_text(links[0])}),"
        f" [all numbers]({links[0]})):",
        "",
        f"| | PEFT | {' | '.join(STEP_COLUMNS.values())} |",
        "|---" * (2 + len(STEP_COLUMNS)) + "|",
    ]
    return [*lines, *map(_step_line, settings)]


def _step_line(setting: Setting) -> str:
    base = setting.steps[BASE]
    cells = [f"{base.seconds.median:.2f} s ({base.peak_bytes / 1e9:.2f} GB)"]
    for name in STEP_COLUMNS:
        if name in setting.steps:  # absent for a float32 base: no bfloat16 adapters
            ratio = setting.steps[name].ratio.median
            cells.append(f"{ratio:.2f} ({setting.memory_ratio(name):.2f})")
        else:
            cells.append("-")
    return f"| {setting.label} | {' | '.join(cells)} |"


def _layer(paths: list[Path], links: list[str]) -> list[str]:
    """Where it was measured, the table, and the means."""
    report = records.load(_only(paths))
    dtype, dropout = ROWS
    machine = report.machine
    bound = "bound" if machine["thread_binding"] == "true" else "not bound"
    where = f"{machine['threads']} threads, {bound}" if machine["device"] == "cpu" else "a GPU"
    shapes = HEADLINE
    if is_partial := dtype in machine.get("emulated", ()):
        where += f", no instructions for {dtype}"
        shapes = [shape for shape in HEADLINE if report.row(shape, dtype, dropout)] or HEADLINE
    return [
        f"**Measured** on {machine['device_name']} ({where}, torch"
        f" {recorded.torch_version(machine)}), {dtype}, dropout {dropout:g},",
        "forward + backward as a multiple of the bare frozen layer, and in brackets what autograd",
        f"keeps for backward as a multiple of `x` ([table]({_text(links[0])}),"
        f" [all numbers]({links[0]})):",
        "",
        f"| M, K, N, rank | {' | '.join(COLUMNS.values())} |",
        "|---" * (1 + len(COLUMNS)) + "|",
        *(_layer_line(report, shape) for shape in shapes),
        *([] if is_partial else ["", *_means(report)]),
    ]


def _row(report: Report, shape: Shape) -> Row:
    row = report.row(shape, *ROWS)
    if row is None or not COLUMNS.keys() <= row.results.keys():
        raise HeadlineError(
            f"expected {shape}, {ROWS[0]}, dropout {ROWS[1]:g} with {', '.join(COLUMNS)} in the"
            " results, got none: run benchmarks/run.py --full"
        )
    return row


def _layer_line(report: Report, shape: Shape) -> str:
    row = _row(report, shape)
    cells = [
        f"{short(result.ratio.median)} ({result.saved_bytes / row.x_bytes:.2f})"
        for result in (row.results[name] for name in COLUMNS)
    ]
    cells[-1] = f"**{cells[-1]}**"
    return f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |"


def _means(report: Report) -> list[str]:
    parts = []
    for (dtype, dropout), _ in report.groups():
        means = _mean_speedups(report, dtype, dropout)
        text = " and ".join(f"{value:.2f} over {rival}" for rival, value in means.items())
        parts.append(f"{text} ({dtype}, dropout {dropout:g})")
    count = len(MEANS[MEAN])
    return [f"Geometric mean speed-ups at {count} fixed shapes:", ";\n".join(parts) + "."]


def _mean_speedups(report: Report, dtype: str, dropout: float) -> dict[str, float]:
    means = {
        rival: report.mean_speedup(MEAN, dtype, dropout, OURS, rival) for rival in ("peft", "eager")
    }
    if None in means.values():
        raise HeadlineError(f"expected every shape of {MEAN} in {dtype}, dropout {dropout:g}")
    return means


def _few_tokens(paths: list[Path], links: list[str]) -> list[str]:
    """Our time as a multiple of the fastest peer's: the range over runs, per number of tokens."""
    reports = [records.load(path) for path in paths]
    groups = [key for key, _ in reports[0].groups()]
    heads = [f"{dtype}, {f'dropout {p:g}' if p else 'no dropout'}" for dtype, p in groups]
    runs = ", ".join(f"[{i}]({link})" for i, link in enumerate(links, 1))
    lines = [
        f"**Measured** on {recorded.where(reports[0].machine)}: the layer's time as a multiple of"
        f" the fastest peer's (of {', '.join(PEERS)}),",
        f"from the lowest to the highest of {len(reports)} runs ({runs}):",
        "",
        f"| tokens | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for tokens in FEW:
        cells = [_slowdowns(reports, key, partial(_is_few, tokens=tokens)) for key in groups]
        lines.append(f"| {tokens}, {WIDTH} x {WIDTH} | {' | '.join(cells)} |")
    cells = [_slowdowns(reports, key, lambda row: row.shape.M >= MANY) for key in groups]
    return [*lines, f"| {MANY} or more, every shape | {' | '.join(cells)} |"]


def _is_few(row: Row, tokens: int) -> bool:
    return row.shape[:3] == (tokens, WIDTH, WIDTH)


def _slowdowns(reports: list[Report], key, chosen: Callable[[Row], bool]) -> str:
    rows = [row for report in reports for row in report.rows if (row.dtype, row.dropout) == key]
    found = [_slowdown(row) for row in rows if chosen(row)]
    if not found:
        raise HeadlineError(
            f"expected rows of every number of tokens in {key[0]}, dropout {key[1]:g}, got none"
        )
    return _range(found)


def _slowdown(row: Row) -> float:
    """Our time as a multiple of the fastest peer's."""
    return max(1 / row.speedup(OURS, peer) for peer in PEERS if peer in row.results)


def _shared(paths: list[Path], links: list[str]) -> list[str]:
    """Together as multiples of the same layers alone, and of PEFT's: a line per case."""
    path = _only(paths)
    try:
        data = json.loads(path.read_text())
        rows = [_shared_line(row) for row in data["rows"]]
        where = recorded.where(data["machine"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise HeadlineError(f"{path}: expected the JSON of shared_input.py") from error
    return [
        f"**Measured** on {where}: a step's CPU seconds, its peak memory and what is kept for"
        " backward,",
        "as multiples of those of the same layers alone, and in brackets of PEFT's"
        f" ([table]({_text(links[0])}), [all numbers]({links[0]})):",
        "",
        "| | CPU seconds | peak | kept |",
        "|---|---|---|---|",
        *rows,
    ]


def _shared_line(row: dict) -> str:
    case, names = row["case"], {"qkv": "q, k, v", "mlp": "gated MLP"}
    autocast = "float32, bfloat16 autocast" if case["autocast"] else case["dtype"]
    dropout = f"dropout {case['dropout']:g}" if case["dropout"] else "no dropout"
    about = f"{names[case['module']]} {case['width']}/{case['inner']}, {autocast}, {dropout}"
    seconds = {name: found["median"] for name, found in row["seconds"].items()}
    cells = [
        f"{found['together']:.2f} ({found['together'] / found['peft']:.2f})"
        for found in (seconds, row["peak"], row["kept"])
    ]
    return f"| {' | '.join([about, *cells])} |"


def _compiled(paths: list[Path], links: list[str]) -> list[str]:
    """A line per target, from the first lines of its table."""
    folder, link = _only(paths), links[0]
    files = [file for file in folder.glob("*.txt") if not file.name.startswith("search-")]
    found = {file.stem: COMPILED.match(file.read_text()) for file in files}
    if not found or None in found.values():
        raise HeadlineError(f"expected the tables of benchmarks/compile_report.py in {folder}")
    total = sum(int(match[3]) for match in found.values())
    tritons = " and ".join(sorted({match[2] for match in found.values()}))
    lines = [f"**Compiled** by {tritons}, not run: {total:,} kernels.", ""]
    lines += ["| target | kernels | unfit | tiles | search |", "|---|---|---|---|---|"]
    for arch in sorted(found, key=lambda arch: (arch.startswith("gfx"), len(arch), arch)):
        kernels, unfit = int(found[arch][3]), found[arch][4]
        lines.append(
            f"| {arch} | {kernels:,} | {unfit} | [table]({link}/{arch}.txt) |"
            f" [candidates]({link}/search-{arch}.txt) |"
        )
    return lines


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _only(paths: list[Path]) -> Path:
    if len(paths) != 1:
        raise HeadlineError(f"expected one file in a block, got {len(paths)}")
    return paths[0]


def _text(link: str) -> str:
    """The text table beside a run's JSON file."""
    return link.removesuffix(".json") + ".txt"


KINDS = {
    "headline": _headline,
    "step": _step,
    "layer": _layer,
    "few-tokens": _few_tokens,
    "shared": _shared,
    "compiled": _compiled,
}


def main(argv: list[str] | None = None) -> int:
    """0 if every page is up to date now; 1 if ``--check`` finds a difference; 2 on an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).parents[1]
    parser.add_argument("pages", nargs="*", type=Path, default=[root / page for page in PAGES])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page differs"
    )
    args = parser.parse_args(argv)
    try:
        texts = {page: updated(page) for page in args.pages}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changed = {page: text for page, text in texts.items() if text != page.read_text()}
    for page, text in changed.items():
        if args.check:
            print(
                f"error: {os.path.relpath(page)} differs from its results: run"
                " python benchmarks/headline.py",
                file=sys.stderr,
            )
        else:
            page.write_text(text)
            print(f"wrote {page}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
