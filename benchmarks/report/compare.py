"""Compare two reports of the same rows: what became slower or faster by more than the noise."""

from __future__ import annotations

from dataclasses import dataclass

from harness.shapes import Shape
from harness.timing import Quartiles
from report.records import Report

# Properties of the machine that must agree for two runs to be comparable.
SAME = ("device_name", "emulated", "threads", "thread_binding")


@dataclass(frozen=True)
class Change:
    """One provider's ratio to the frozen layer in both runs."""

    shape: Shape
    dtype: str
    dropout: float
    provider: str
    old: Quartiles
    new: Quartiles

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" if the interquartile ranges do not overlap, else "same"."""
        if self.new.q1 > self.old.q3:
            return "slower"
        if self.new.q3 < self.old.q1:
            return "faster"
        return "same"

    def __str__(self) -> str:
        old, new = self.old, self.new
        return (
            f"{self.verdict}: {self.provider}, {self.shape}, {self.dtype}, dropout"
            f" {self.dropout:g}: {old.median:.2f} [{old.q1:.2f}, {old.q3:.2f}] ->"
            f" {new.median:.2f} [{new.q1:.2f}, {new.q3:.2f}]"
        )


def changes(old: Report, new: Report) -> list[Change]:
    """Every provider in every row that both reports have, except the frozen layer: ratio 1."""
    before = {row.key: row for row in old.rows}
    return [
        Change(*row.key, name, before[row.key].results[name].ratio, result.ratio)
        for row in new.rows
        if row.key in before
        for name, result in row.results.items()
        if name in before[row.key].results and name != "frozen"
    ]


def render(old: Report, new: Report) -> str:
    """The comparison as text: regressions first, ratios with their quartiles."""
    found = changes(old, new)
    lines = [
        f"note: {key} was {old.machine.get(key)!r} and is {new.machine.get(key)!r}"
        for key in SAME
        if (old.machine.get(key) or None) != (new.machine.get(key) or None)  # older files lack some
    ]
    named = {v: [c for c in found if c.verdict == v] for v in ("slower", "faster", "same")}
    counts = ", ".join(f"{len(items)} {verdict}" for verdict, items in named.items())
    lines.append(
        f"against {old.machine['commit']['id']} of {old.machine['date'][:10]}, ratios to frozen,"
        f" slower or faster if the middle halves do not overlap: {counts}"
    )
    return "\n".join([*lines, *map(str, named["slower"] + named["faster"])]) + "\n"
