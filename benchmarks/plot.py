"""Redraw the pictures of a results file: ``python benchmarks/plot.py FILE.json [STEM]``.

A file of run.py gives its pictures of speed-up, overhead and memory as PNG and SVG; a file of
model_step.py gives the README's picture, ``STEM-light.png`` and ``STEM-dark.png``. Without STEM
they are written beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from report import records
from report.plot import draw
from whole_model import recorded, step_picture


def main(argv: list[str]) -> int:
    """Redraw the pictures of a file; on an error print one line and return 2."""
    if len(argv) not in (1, 2):
        print(f"error: expected a results file and optionally a stem, got {argv}", file=sys.stderr)
        return 2
    path = Path(argv[0])
    stem = Path(argv[1]) if len(argv) == 2 else path.with_suffix("")
    try:
        if _is_of_model_step(path):
            drawn = step_picture.draw(*recorded.load(path), stem)
        else:
            drawn = draw(records.load(path), stem)
    except (OSError, records.FormatError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for picture in drawn:
        print(f"wrote {picture}")
    return 0


def _is_of_model_step(path: Path) -> bool:
    try:
        return "checks" in json.loads(path.read_text())  # only model_step.py writes them
    except ValueError:
        return False  # records.load reports what is wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
