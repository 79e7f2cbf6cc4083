"""A report as text: ratios to the frozen layer, speed-ups, worst cases, means."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from harness.shapes import MEANS
from report.records import Report, Row, label

OURS = "fused"
RIVALS = ("peft", "eager")  # PEFT with its defaults, and the textbook formula
PEERS = ("eager", "tutorial", "peft-bf16", "loralib", "torchtune", "addmm")


def render(report: Report) -> str:
    """The whole report, with one section per dtype and dropout."""
    parts = [
        label(report.machine),
        "forward + backward as a multiple of the frozen layer's, medians of paired rounds;"
        f" on the right {OURS}'s middle half, and its speed-up",
    ]
    for (dtype, dropout), rows in report.groups():
        parts += ["", f"{dtype}, dropout {dropout:g}", *_section(rows)]
        parts += _means(report, dtype, dropout)
    parts += ["", *_skipped(report)]
    return "\n".join(parts).rstrip() + "\n"


def _section(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.results))
    rivals = [rival for rival in RIVALS if {rival, OURS} <= set(names)]
    head = ["M x K x N, rank", "rounds", "ms", *names, "middle half"]
    head += [*(f"over {rival}" for rival in rivals), "over best peer"]
    cells = [
        [
            str(row.shape),
            str(row.rounds),
            f"{1e3 * row.results['frozen'].seconds.median:.3g}",
            *(_ratio(row, name) for name in names),
            _spread(row),
            *(_times(row.speedup(OURS, rival)) for rival in rivals),
            _times(_over_best(row)),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in [head, *cells]
    ]
    worst = [
        _worst(rows, rival, partial(Row.speedup, provider=OURS, over=rival)) for rival in rivals
    ]
    return [*lines, *filter(None, [*worst, _worst(rows, "the best peer", _over_best)])]


def _ratio(row: Row, name: str) -> str:
    return short(row.results[name].ratio.median) if name in row.results else "-"


def _spread(row: Row) -> str:
    if OURS not in row.results:
        return "-"
    ratio = row.results[OURS].ratio
    return f"{short(ratio.q1)}-{short(ratio.q3)}"


def short(ratio: float) -> str:
    """Two decimals, or three below 0.1."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def _times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def _over_best(row: Row) -> float:
    """The speed-up over the fastest of PEERS; NaN if the row has none."""
    speedups = [row.speedup(OURS, peer) for peer in PEERS if peer in row.results]
    return min(speedups, default=math.nan)


def _worst(rows: list[Row], rival: str, speedup: Callable[[Row], float]) -> str | None:
    known = [row for row in rows if not math.isnan(speedup(row))]
    if not known:
        return None
    row = min(known, key=speedup)
    return f"worst over {rival}: {speedup(row):.2f}x at {row.shape}"


def _means(report: Report, dtype: str, dropout: float) -> list[str]:
    lines = []
    for mean, shapes in MEANS.items():
        values = {rival: report.mean_speedup(mean, dtype, dropout, OURS, rival) for rival in RIVALS}
        parts = [f"{value:.2f}x over {rival}" for rival, value in values.items() if value]
        if parts:
            lines.append(f"geometric mean of the {len(shapes)} of {mean}: {', '.join(parts)}")
    return lines


def _skipped(report: Report) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for row in report.rows:
        for item in row.skipped.items():
            reasons[item] = reasons.get(item, 0) + 1
    return [f"skipped {name} in {n} rows: {why}" for (name, why), n in reasons.items()]
