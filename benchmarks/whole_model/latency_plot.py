"""The plot of adapter_latency.py: extra latency against depth, with its quartiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from whole_model.results import Point

# Text in SVG files stays text, and the same points produce the same file.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fused-lora"}

LINES = {
    "bottleneck": ("#8da0cb", "s"),
    "LoRA, unmerged": ("#fc8d59", "o"),
    "LoRA, merged": ("#d7301f", "^"),
    "LoRA, unloaded": ("#66c2a5", "v"),
}


def draw(points: list[Point], title: str) -> Figure:
    """One panel per text length; the bands are the quartiles over the rounds."""
    lengths = sorted({point.tokens for point in points})
    figure = Figure(figsize=(max(6.5, 4.5 * len(lengths)), 4.2), layout="constrained")
    figure.suptitle(f"latency over the plain model's, {title}", fontsize=9, wrap=True)
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for panel, tokens in zip(panels, lengths, strict=True):
        own = [point for point in points if point.tokens == tokens]
        depths = [point.depth for point in own]
        for name, (color, marker) in LINES.items():
            extra = [point.extra[name] for point in own]
            low, high = ([1e3 * getattr(e, q) for e in extra] for q in ("q1", "q3"))
            panel.fill_between(depths, low, high, color=color, alpha=0.25, lw=0)
            medians = [1e3 * e.median for e in extra]
            panel.plot(depths, medians, color=color, marker=marker, ms=4, label=name)
        panel.axhline(0, color="0.2", lw=0.8)
        panel.set_title(f"1 text of {tokens} token{'s' * (tokens > 1)}", fontsize=10)
        panel.set(xlabel="layers", ylabel="extra ms per call, median and quartiles")
        panel.set_xticks(depths)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    return figure
