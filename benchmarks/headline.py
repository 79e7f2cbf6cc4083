"""The README's headline, written from a results file so that the two cannot differ.

    python benchmarks/headline.py [--check] [README.md]

It stands between ``<!-- headline FILE.json -->`` and ``<!-- /headline -->``, once or more; FILE is
relative to the README. Of a CPU that emulates the table's dtype, it is those shapes that were
measured, and no means.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from harness.shapes import HEADLINE, MEANS, Shape
from report import records
from report.records import Report
from report.table import short

COLUMNS = {"eager": "eager formula", "peft": "PEFT (default)", "fused": "**fused-lora**"}
ROWS = ("bfloat16", 0.1)  # the dtype and dropout that the table shows
MEAN = "cpu-targets"
MARK = "<!-- headline "
MARKED = re.compile(r"(<!-- headline (\S+) -->\n).*?(?=<!-- /headline -->)", re.DOTALL)


class HeadlineError(ValueError):
    """A README without the markers, or results that lack what the headline shows."""


def updated(readme: Path) -> str:
    """The README's text with the headline made anew.

    Raises:
        HeadlineError: no markers, or a row that the results lack.
        FormatError, OSError: the results cannot be read.
    """
    text = readme.read_text()
    marks, found = text.count(MARK), len(MARKED.findall(text))
    if not marks or found < marks:
        raise HeadlineError(
            f"{readme}: expected <!-- headline FILE.json --> and <!-- /headline -->, got {marks} of"
            f" the first and {found} with the second"
        )
    return MARKED.sub(
        lambda found: found[1] + render(records.load(readme.parent / found[2]), found[2]), text
    )


def render(report: Report, path: str) -> str:
    """Where it was measured, the table, and the means."""
    dtype, dropout = ROWS
    machine = report.machine
    bound = "bound" if machine["thread_binding"] == "true" else "not bound"
    where = f"{machine['threads']} threads, {bound}" if machine["device"] == "cpu" else "a GPU"
    shapes = HEADLINE
    if is_partial := dtype in machine.get("emulated", ()):
        where += f", no instructions for {dtype}"
        shapes = [shape for shape in HEADLINE if report.row(shape, dtype, dropout)] or HEADLINE
    lines = [
        f"**Measured** on {machine['device_name']} ({where}, torch"
        f" {machine['versions']['torch'].partition('+')[0]}), {dtype}, dropout {dropout:g},",
        "forward + backward as a multiple of the bare frozen layer, and in brackets what autograd",
        f"keeps for backward as a multiple of `x` ([all numbers]({path})):",
        "",
        f"| M, K, N, rank | {' | '.join(COLUMNS.values())} |",
        "|---" * (1 + len(COLUMNS)) + "|",
        *(_line(report, shape) for shape in shapes),
        *([] if is_partial else ["", *_means(report)]),
    ]
    return "\n".join(lines) + "\n"


def _line(report: Report, shape: Shape) -> str:
    row = report.row(shape, *ROWS)
    if row is None or not COLUMNS.keys() <= row.results.keys():
        raise HeadlineError(
            f"expected {shape}, {ROWS[0]}, dropout {ROWS[1]:g} with {', '.join(COLUMNS)} in the"
            " results, got none: run benchmarks/run.py --full"
        )
    cells = [
        f"{short(result.ratio.median)} ({result.saved_bytes / row.x_bytes:.2f})"
        for result in (row.results[name] for name in COLUMNS)
    ]
    cells[-1] = f"**{cells[-1]}**"
    return f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |"


def _means(report: Report) -> list[str]:
    parts = []
    for (dtype, dropout), _ in report.groups():
        means = {
            rival: report.mean_speedup(MEAN, dtype, dropout, "fused", rival)
            for rival in ("peft", "eager")
        }
        if None in means.values():
            raise HeadlineError(f"expected every shape of {MEAN} in {dtype}, dropout {dropout:g}")
        text = " and ".join(f"{value:.2f} over {rival}" for rival, value in means.items())
        parts.append(f"{text} ({dtype}, dropout {dropout:g})")
    count = len(MEANS[MEAN])
    return [f"Geometric mean speed-ups at {count} fixed shapes:", ";\n".join(parts) + "."]


def main(argv: list[str] | None = None) -> int:
    """0 if the README is as it should be; 1 if ``--check`` finds it different; 2 on an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parents[1] / "README.md"
    parser.add_argument("readme", nargs="?", type=Path, default=default)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    args = parser.parse_args(argv)
    try:
        text = updated(args.readme)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if text == args.readme.read_text():
        return 0
    if args.check:
        print(
            f"error: {os.path.relpath(args.readme)} differs from its results: run"
            " python benchmarks/headline.py",
            file=sys.stderr,
        )
        return 1
    args.readme.write_text(text)
    print(f"wrote {args.readme}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
