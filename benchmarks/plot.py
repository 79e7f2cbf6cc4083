"""Draw the results of run.py again: ``python benchmarks/plot.py FILE.json``, beside the file."""

from __future__ import annotations

import sys
from pathlib import Path

from report import records
from report.plot import draw


def main(argv: list[str]) -> int:
    """Draw again from a file; 2 with one line when that could not be."""
    if len(argv) != 1:
        print("error: expected one results file", file=sys.stderr)
        return 2
    path = Path(argv[0])
    try:
        drawn = draw(records.load(path), path.with_suffix(""))
    except (OSError, records.FormatError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for picture in drawn:
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
