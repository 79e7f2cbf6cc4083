"""Check whole runs of the suite against the library's performance targets on a CPU.

    python benchmarks/targets.py RESULTS.json [RESULTS.json ...] [--provider fused-bf16]

A shape misses its target against the peers only if it is behind in two thirds of the runs; every
other figure is the median over the runs. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from report import records
from report.records import Report, Row
from report.table import OURS, PEERS

BEHIND = 1.05  # multiple of the best peer's time
MOST_BEHIND = 2 / 3  # share of the runs at which a shape misses its target
MEAN = "cpu-targets"
# dtype, dropout, compared with, minimum speed-up
SPEEDUPS = (
    ("bfloat16", 0.1, "peft", 1.4),
    ("bfloat16", 0.0, "peft", 1.2),
    ("bfloat16", 0.0, "eager", 1.05),
    ("float32", 0.0, "eager", 1.05),
)
# Limits apply up to MAX_RANK without dropout: layers at least LARGE wide are compared with the
# frozen layer, smaller ones with their bare products.
MAX_RANK, LARGE = 16, 2048
MAX_OVER_FROZEN, MAX_OVER_FLOOR = 1.08, 0.05


@dataclass(frozen=True)
class Verdict:
    """One target: the value found, and whether it meets the target."""

    name: str
    found: str
    met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'}  {self.name}: {self.found}"


def verdicts(reports: list[Report], provider: str = OURS) -> Iterator[Verdict]:
    """Check every target on the rows that all ``reports`` share and that have :data:`table.OURS`.

    Args:
        provider: whose results to check; rows without it use :data:`table.OURS`.
    """
    shared = [[report.row(*row.key) for report in reports] for row in reports[0].rows]
    shared = [runs for runs in shared if all(row and OURS in row.results for row in runs)]
    for runs in shared:
        yield from _beside_peers(runs, provider)
    for dtype, p, over, least in SPEEDUPS:
        names = [provider if _has(report, dtype, provider) else OURS for report in reports]
        found = [
            report.mean_speedup(MEAN, dtype, p, name, over)
            for report, name in zip(reports, names, strict=True)
        ]
        if None not in found:
            value = statistics.median(found)
            name = f"{dtype}, dropout {p:g}, over {over}, mean of {MEAN}, at least {least}"
            yield Verdict(name, f"{value:.2f}", value >= least)
    for runs in shared:
        bare = all("floor" in row.results for row in runs)
        if bare and runs[0].dropout == 0 and runs[0].shape.R <= MAX_RANK:
            yield _beside_the_products(runs, provider)


def _has(report: Report, dtype: str, provider: str) -> bool:
    return all(provider in row.results for row in report.rows if row.dtype == dtype)


def _ours(row: Row, provider: str) -> str:
    return provider if provider in row.results else OURS


def _label(row: Row) -> str:
    return f"{row.shape}, {row.dtype}, dropout {row.dropout:g}"


def _beside_peers(runs: list[Row], provider: str) -> Iterator[Verdict]:
    times = []  # per run, as a multiple of the best peer's
    for row in runs:
        ours = _ours(row, provider)
        rivals = [1 / row.speedup(ours, peer) for peer in PEERS if peer in row.results]
        if rivals:
            times.append(max(rivals))
    if times:
        behind = sum(time > BEHIND for time in times)
        yield Verdict(
            f"{_label(runs[0])}, at most {BEHIND:g} of the best peer's time",
            " ".join(f"{time:.2f}" for time in times),
            behind < MOST_BEHIND * len(times),
        )


def _beside_the_products(runs: list[Row], provider: str) -> Verdict:
    shape = runs[0].shape
    ratio = statistics.median(row.results[_ours(row, provider)].ratio.median for row in runs)
    if min(shape.K, shape.N) >= LARGE:
        most, limit = MAX_OVER_FROZEN, f"{MAX_OVER_FROZEN:g} of the frozen layer"
    else:
        floor = statistics.median(row.results["floor"].ratio.median for row in runs)
        most, limit = floor + MAX_OVER_FLOOR, f"the bare products' {floor:.2f} + {MAX_OVER_FLOOR:g}"
    return Verdict(f"{_label(runs[0])}, at most {limit}", f"{ratio:.2f}", ratio <= most)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every target is met, 1 if not, 2 for files without comparable results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--provider", default=OURS)
    options = parser.parse_args(arguments)
    try:
        reports = [records.load(path) for path in options.results]
    except (OSError, records.FormatError) as error:
        print(error, file=sys.stderr)
        return 2
    devices = {report.machine["device"] for report in reports}
    found = list(verdicts(reports, options.provider)) if devices == {"cpu"} else []
    if not found:
        print(f"expected results of a CPU that share a row, got {devices}", file=sys.stderr)
        return 2
    print(*found, sep="\n")
    missed = sum(not verdict.met for verdict in found)
    print(f"{len(found) - missed} of {len(found)} met, in {len(reports)} runs")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
