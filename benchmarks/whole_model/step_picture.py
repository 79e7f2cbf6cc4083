"""The README's picture: a whole model's training step by PEFT, and by PEFT with one more line.

Drawn twice from one results file, for light and for dark pages. Both pictures have an opaque
background, so each is readable on any page.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from matplotlib.figure import Figure

from whole_model.recorded import BASE, Setting, where

WIDTH, HEIGHT, DPI = 8.3, 3.7, 190  # inches: about twice the width of a README's column in pixels
BAR = 0.36
SHADES = 64  # palette size: few colours, and anti-aliased text
OURS = "peft-patched"
RANK, BATCH = 16, (4, 128)  # of model_step.py, whose files do not name them
BARS = {BASE: "PEFT", OURS: "PEFT + patch_peft"}


@dataclass(frozen=True)
class Theme:
    """The colours for one background."""

    name: str
    page: str
    text: str
    quiet: str
    base: str
    ours: str


# GitHub's page colours.
THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#d1d9e0", "#8c959f", "#0969da"),
    Theme("dark", "#0d1117", "#e6edf3", "#3d444d", "#7d8590", "#4493f8"),
)


def draw(machine: dict, settings: list[Setting], stem: Path) -> list[Path]:
    """Write ``STEM-light.png`` and ``STEM-dark.png``."""
    paths = []
    for theme in THEMES:
        path = stem.with_name(f"{stem.name}-{theme.name}.png")
        drawn = io.BytesIO()
        _figure(machine, settings, theme).savefig(drawn, dpi=DPI, facecolor=theme.page)
        picture = PIL.Image.open(drawn).convert("RGB").quantize(SHADES)
        picture.save(path, optimize=True)
        paths.append(path)
    return paths


def _figure(machine: dict, settings: list[Setting], theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    times, memory = figure.subplots(1, 2, sharey=True)
    _bars(times, settings, theme, lambda setting, name: setting.steps[name].seconds.median)
    _bars(memory, settings, theme, lambda setting, name: setting.steps[name].peak_bytes / 1e9)
    for place, setting in enumerate(settings):
        for name, side in zip(BARS, (-1, 1), strict=True):
            step, at = setting.steps[name], place + side * BAR / 2
            spread = step.seconds
            times.hlines(at, spread.q1, spread.q3, color=theme.text, lw=1)
            share = "" if name == BASE else f"  ({step.ratio.median:.2f} of PEFT)"
            _value(times, spread.q3, at, f"{spread.median:.2f} s{share}", theme)
            share = "" if name == BASE else f"  ({setting.memory_ratio(name):.2f} of PEFT)"
            size = step.peak_bytes / 1e9
            _value(memory, size, at, f"{size:.2f} GB{share}", theme)
    times.set_title("time per step (s)", fontsize=10, color=theme.text)
    memory.set_title("peak memory (GB)", fontsize=10, color=theme.text)
    times.set_yticks(range(len(settings)), [s.label.replace(", ", "\n") for s in settings])
    times.invert_yaxis()
    figure.suptitle(
        f"One training step, {settings[0].dtype}, LoRA of rank {RANK} on every linear layer,"
        f" {BATCH[0]} x {BATCH[1]} tokens\n"
        f"measured on {where(machine)}; thin lines: the middle half of the rounds",
        fontsize=10,
        color=theme.text,
    )
    handles, labels = times.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2,
        frameon=False, fontsize=9.5, labelcolor=theme.text,
    )  # fmt: skip
    return figure


def _bars(panel, settings: list[Setting], theme: Theme, value) -> None:
    for (name, label), side, color in zip(
        BARS.items(), (-1, 1), (theme.base, theme.ours), strict=True
    ):
        places = [place + side * BAR / 2 for place in range(len(settings))]
        values = [value(setting, name) for setting in settings]
        panel.barh(places, values, 0.92 * BAR, color=color, label=label, lw=0)
    panel.set_facecolor(theme.page)
    panel.set_xlim(0, 1.5 * max(value(setting, name) for setting in settings for name in BARS))
    panel.tick_params(colors=theme.text, labelsize=9, length=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(theme.quiet)


def _value(panel, x: float, y: float, text: str, theme: Theme) -> None:
    panel.annotate(
        text, (x, y), (4, 0), textcoords="offset points",
        va="center", fontsize=8.5, color=theme.text,
    )  # fmt: skip
