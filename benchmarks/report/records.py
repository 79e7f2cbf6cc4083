"""Results of a run: rows, their file format, and means over the fixed lists of shapes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.shapes import MEANS, Shape
from harness.timing import Quartiles

SCHEMA = 1  # incremented when older files can no longer be read
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class FormatError(ValueError):
    """A file that does not hold a run's results."""


@dataclass(frozen=True)
class Result:
    """One provider in one row; ``ratio`` is to the frozen layer's time in the same round."""

    seconds: Quartiles
    ratio: Quartiles
    saved_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One shape, dtype and dropout; ``skipped`` has the reason for each provider left out."""

    shape: Shape
    dtype: str
    dropout: float
    rounds: int
    results: dict[str, Result]
    skipped: dict[str, str]

    @property
    def key(self) -> tuple[Shape, str, float]:
        return self.shape, self.dtype, self.dropout

    @property
    def x_bytes(self) -> int:
        return self.shape.M * self.shape.K * ITEMSIZE[self.dtype]

    def speedup(self, provider: str, over: str) -> float:
        """How many times faster than ``over``, by medians; NaN if either is missing."""
        if not {provider, over} <= self.results.keys():
            return math.nan
        return self.results[over].ratio.median / self.results[provider].ratio.median


@dataclass(frozen=True)
class Report:
    """A run: the machine as returned by :func:`machine.describe`, and the rows."""

    machine: dict
    rows: list[Row]

    def groups(self) -> Iterator[tuple[tuple[str, float], list[Row]]]:
        """``(dtype, dropout)`` and its rows, in the order of the run."""
        for key in dict.fromkeys((row.dtype, row.dropout) for row in self.rows):
            yield key, [row for row in self.rows if (row.dtype, row.dropout) == key]

    def row(self, shape: Shape, dtype: str, dropout: float) -> Row | None:
        return next((row for row in self.rows if row.key == (shape, dtype, dropout)), None)

    def providers(self) -> list[str]:
        """Every provider with a result, in the order of the run."""
        return list(dict.fromkeys(name for row in self.rows for name in row.results))

    def mean_speedup(
        self, mean: str, dtype: str, dropout: float, provider: str, over: str
    ) -> float | None:
        """Geometric mean over a list in :data:`shapes.MEANS`; None if a shape is missing."""
        rows = [self.row(shape, dtype, dropout) for shape in MEANS[mean]]
        if None in rows:
            return None
        values = [row.speedup(provider, over) for row in rows]
        return None if any(map(math.isnan, values)) else geometric_mean(values)

    def save(self, stem: Path) -> list[Path]:
        """Write ``stem.json`` and, for spreadsheets, ``stem.csv`` into an existing folder."""
        rows = [asdict(row) | {"shape": row.shape._asdict()} for row in self.rows]
        data = {"schema": SCHEMA, "machine": self.machine, "rows": rows}
        paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "csv")]
        paths[0].write_text(json.dumps(data, separators=(",", ":")) + "\n")
        with paths[1].open("w", newline="") as file:
            lines = list(self._csv_lines())
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        return paths

    def _csv_lines(self) -> Iterator[dict]:
        for row in self.rows:
            for name, result in row.results.items():
                yield {
                    **row.shape._asdict(),
                    "dtype": row.dtype,
                    "dropout": row.dropout,
                    "provider": name,
                    "rounds": row.rounds,
                    **{f"seconds_{k}": v for k, v in asdict(result.seconds).items()},
                    **{f"ratio_{k}": v for k, v in asdict(result.ratio).items()},
                    "tflops": row.shape.step_flops / result.seconds.median / 1e12,
                    "saved_bytes": result.saved_bytes,
                    "peak_bytes": result.peak_bytes,
                    "device": self.machine["device_name"],
                    "threads": self.machine["threads"],
                    "torch": self.machine["versions"]["torch"],
                    "commit": self.machine["commit"]["id"],
                }


def load(path: Path) -> Report:
    """Read a report that :meth:`Report.save` wrote.

    Raises:
        FormatError: the file has another content or another schema.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise FormatError(f"{path}: expected schema {SCHEMA}, got {data['schema']}")
        return Report(data["machine"], [_row(row) for row in data["rows"]])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise FormatError(f"{path}: expected the JSON of benchmarks/run.py ({problem})") from error


def _row(data: dict) -> Row:
    results = {
        name: Result(
            Quartiles(**result["seconds"]),
            Quartiles(**result["ratio"]),
            result["saved_bytes"],
            result["peak_bytes"],
        )
        for name, result in data["results"].items()
    }
    return Row(**data | {"shape": Shape(**data["shape"]), "results": results})


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def label(machine: dict) -> str:
    """The line that heads tables and plots: machine, versions, date and commit."""
    threads = f"{machine['threads']} threads, OMP_PROC_BIND {machine['thread_binding']}"
    where = threads if machine["device"] == "cpu" else machine["device"]
    if emulated := machine.get("emulated"):
        where += f"; no instructions for {' and '.join(emulated)}"
    commit = machine["commit"]["id"] or "no commit"
    dirty = " with changes" if machine["commit"]["dirty"] else ""
    return (
        f"measured on {machine['device_name']} ({where}), torch {machine['versions']['torch']},"
        f" {machine['date'][:10]}, {commit}{dirty}"
    )
