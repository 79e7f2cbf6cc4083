"""The picture of model_step.py: a step's time and memory, and the loss curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from report.plot import COLORS
from whole_model.trainers import PARTS

if TYPE_CHECKING:
    from whole_model.loss_curves import Check
    from whole_model.results import Result, Row

SHADES = {"forward": 0.5, "backward": 0.75, "optimizer": 1.0}
COLOR = COLORS | {"peft-patched": "#fc8d59", "fused-alone": "#fdbb84"}


def draw(checks: list[Check], rows: list[Row], title: str) -> Figure:
    """One row of panels per model: time and memory in every setting, then the losses."""
    settings = len(rows) // len(checks)
    columns = 2 * settings + 1
    figure = Figure(figsize=(3.1 * columns, 0.6 + 3.3 * len(checks)), layout="constrained")
    figure.suptitle(f"a training step, {title}", fontsize=10)
    grid = figure.subplots(len(checks), columns, squeeze=False)
    for line, (panels, found) in enumerate(zip(grid, checks, strict=True)):
        own = rows[line * settings : (line + 1) * settings]
        for panel, row in zip(panels, own, strict=False):
            _times(panel, row.results)
            panel.set_title(f"{row.setting.model}, dropout {row.setting.dropout:g}", fontsize=9)
        for panel, row in zip(panels[settings:], own, strict=False):
            _memory(panel, row.results)
            panel.set_title(f"{row.setting.model}, dropout {row.setting.dropout:g}", fontsize=9)
        _losses(panels[-1], found)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
    return figure


def _times(panel, results: dict[str, Result]) -> None:
    """Stacked parts of a step; the whiskers span the quartiles of whole steps."""
    bottom = [0.0] * len(results)
    for part in PARTS:
        heights = [1e3 * result.parts[part].median for result in results.values()]
        for place, (name, height) in enumerate(zip(results, heights, strict=True)):
            panel.bar(
                place, height, 0.7, bottom[place], color=COLOR[name], alpha=SHADES[part], lw=0
            )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for place, result in enumerate(results.values()):
        q = result.seconds
        panel.vlines(place, 1e3 * q.q1, 1e3 * q.q3, color="0.15", lw=1.5)
        panel.annotate(
            f"{result.ratio.median:.2f}", (place, 1e3 * q.q3), (0, 3),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    panel.set_ylabel("ms per step; on top: ratio to peft", fontsize=8)
    panel.set_xlabel("bottom to top: " + ", ".join(PARTS), fontsize=7)
    panel.margins(y=0.12)
    _name(panel, results)


def _memory(panel, results: dict[str, Result]) -> None:
    heights = [result.step_bytes / 1e6 for result in results.values()]
    drawn = panel.bar(range(len(results)), heights, 0.7, color=[COLOR[name] for name in results])
    panel.bar_label(drawn, fmt="%.4g", padding=2, fontsize=8)
    panel.set_ylabel("MB, peak of a step without weights", fontsize=8)
    panel.margins(y=0.12)
    _name(panel, results)


def _losses(panel, found: Check) -> None:
    for index, (name, curve) in enumerate(found.losses.items()):
        dashes = (index * 2, (2, 2 * len(found.losses) - 2))  # interleaved, so equal curves show
        panel.plot(range(1, len(curve) + 1), curve, color=COLOR[name], ls=dashes, lw=2, label=name)
    panel.set_title(f"{found.model}, errors ≤ {found.tolerance:.0e}", fontsize=9)
    panel.set_xlabel("step", fontsize=8)
    panel.set_ylabel("loss, dropout 0", fontsize=8)
    panel.legend(frameon=False, fontsize=7)


def _name(panel, results: dict[str, Result]) -> None:
    panel.set_xticks(range(len(results)), list(results), rotation=25, ha="right")
