"""A report's plots: speed-up, overhead over the frozen layer, memory; as PNG and SVG.

``python benchmarks/plot.py FILE.json`` redraws them beside the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from harness.shapes import MEANS
from harness.timing import Quartiles
from report import records
from report.records import Report, Row

# Text in SVG files stays text, and the same report produces the same file.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fused-lora"}

OURS = "fused"
ROW_INCHES, BAR_INCHES = 0.2, 0.1
# A provider has the same colour in every plot; this library's stand out.
COLORS = {
    "floor": "#222222", "eager": "#8da0cb", "tutorial": "#a6d8e8", "peft": "#e78ac3",
    "peft-bf16": "#f4c6dd", "loralib": "#b3a16d", "torchtune": "#e5c494", "compiled": "#b3b3b3",
    "addmm": "#a6d854", "fused": "#d7301f", "fused-bf16": "#fc8d59", "fused-split": "#fdbb84",
    "fused-single-pass": "#fdd49e", "lorafusion-style": "#66c2a5",
}  # fmt: skip


def draw(report: Report, stem: Path) -> list[Path]:
    """Write ``STEM-speedup``, ``-overhead`` and ``-memory``, each as PNG and SVG.

    The plots show the shapes of the longest list in :data:`shapes.MEANS` that the report has in
    full; without such a list, all shapes.
    """
    report = Report(report.machine, _shown(report))
    peers = [n for n in report.providers() if n not in ("frozen", "floor") and OURS not in n]
    adapted = [name for name in report.providers() if name != "frozen"]
    kept = [name for name in adapted if name != "floor"]
    figures = {}
    if OURS in report.providers() and peers:
        figures["speedup"] = _bars(
            report, peers, lambda row, name: _alone(row.speedup(OURS, name)),
            f"speed-up of {OURS} over each (times)", 1.0,
        )  # fmt: skip
    figures["overhead"] = _bars(
        report, adapted, _overhead, "time over the frozen layer's (%), lines: middle half", 0.0
    )
    figures["memory"] = _bars(
        report, kept, _memory, "kept for backward (multiples of x's bytes)", 0.0
    )
    paths = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = stem.with_name(f"{stem.name}-{name}.{kind}")
            figure.savefig(path, dpi=130, metadata={"Date": None} if kind == "svg" else None)
            paths.append(path)
    return paths


def _shown(report: Report) -> list[Row]:
    shapes = {row.shape for row in report.rows}
    complete = [listed for listed in MEANS.values() if shapes.issuperset(listed)]
    listed = max(complete, key=len, default=shapes)
    return [row for row in report.rows if row.shape in listed]


def _overhead(row: Row, name: str) -> Quartiles:
    ratio = row.results[name].ratio
    return Quartiles(*(100 * (r - 1) for r in (ratio.median, ratio.q1, ratio.q3)))


def _memory(row: Row, name: str) -> Quartiles:
    return _alone(row.results[name].saved_bytes / row.x_bytes)


def _alone(value: float) -> Quartiles:
    return Quartiles(value, value, value)


def _bars(
    report: Report, names: list[str], value: Callable[[Row, str], Quartiles], axis: str, base: float
) -> Figure:
    """Horizontal bars from ``base``: one panel per dtype and dropout, one group per shape."""
    groups = list(report.groups())
    rows = max(len(found) for _, found in groups)
    height = 1.9 + rows * (ROW_INCHES + BAR_INCHES * len(names))
    figure = Figure(figsize=(max(8.0, 3.6 * len(groups)), height), layout="constrained")
    figure.suptitle(f"forward + backward, {records.label(report.machine)}", fontsize=11, wrap=True)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=len(groups) > 1)[0]
    for panel, ((dtype, dropout), found) in zip(panels, groups, strict=True):
        _panel(panel, found, names, value, base)
        panel.set_title(f"{dtype}, dropout {dropout:g}", fontsize=10)
        panel.set_xlabel(axis, fontsize=9)
    panels[0].set_ylabel("M x K x N, rank")
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known, loc="outside lower center", ncols=7, frameon=False)
    return figure


def _panel(panel, rows: list[Row], names: list[str], value, base: float) -> None:
    width = 0.85 / len(names)
    for index, name in enumerate(names):
        values = [value(row, name) if name in row.results else _alone(math.nan) for row in rows]
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(rows))]
        panel.barh(
            places,
            [v.median - base for v in values],
            0.9 * width,
            left=base,
            xerr=[[v.median - v.q1 for v in values], [v.q3 - v.median for v in values]],
            error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
            color=COLORS[name],
            label=name,
        )
    panel.axvline(base, color="0.2", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [str(row.shape) for row in rows], fontsize=8)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    panel.margins(y=0.01)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
