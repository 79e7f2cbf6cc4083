"""Summaries of the rows of ``gpu_acceptance.py``: a line per step, a verdict, and a page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

Row = dict
CHECKS = ("preflight", "numerics", "repeatability", "graphs")  # must be complete for a PASS


def load(path: Path) -> list[Row]:
    """The rows of a file; a line that a kill cut off is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def failed(rows: list[Row]) -> list[Row]:
    """The rows that failed, without float32 results near their bound (see :func:`near`)."""
    return [row for row in rows if row.get("passed") is False and not row.get("near")]


def near(rows: list[Row]) -> list[Row]:
    """The float32 results that miss their bound by less than a factor of two."""
    return [row for row in rows if row.get("near")]


def line(step: str, rows: list[Row]) -> str:
    """One step in one line."""
    own = [row for row in rows if row["step"] == step]
    skipped = sum("skipped" in row for row in own)
    parts = [f"{len(own) - skipped} rows"]
    for row in own:
        if tests := row.get("tests"):
            parts = [", ".join(f"{count} {name}" for name, count in tests.items())]
    if skipped:
        parts.append(f"{skipped} without time left")
    if close := near(own):
        parts.append(f"{len(close)} float32 results within twice their bound")
    if wrong := failed(own):
        parts.append(f"{len(wrong)} FAILED")
    return f"{step}: {', '.join(parts)}"


def verdict(rows: list[Row]) -> str:
    """PASS, or what failed or was not checked; PASS also names what was not timed."""
    if wrong := _counts(failed(rows)):
        return f"FAIL: {wrong}"
    if not any(row.get("passed") for row in rows):
        return "FAIL: nothing was checked"
    skipped = [row for row in rows if "skipped" in row]
    if unchecked := _counts([row for row in skipped if row["step"] in CHECKS]):
        return f"INCOMPLETE: no time was left for {unchecked}"
    untimed = _counts(skipped)
    return f"PASS; no time was left for {untimed}" if untimed else "PASS"


def _counts(rows: list[Row]) -> str:
    """``step (rows)`` of each step."""
    counts = Counter(row["step"] for row in rows)
    return ", ".join(f"{step} ({count})" for step, count in counts.items())


def write(path: Path, rows: list[Row]) -> None:
    """Write the page; its title names the device on which every time was measured."""
    environment = next((row for row in rows if row.get("case") == "environment"), {})
    commit = environment.get("commit", {})
    heading = next((row for row in rows if row["step"] == "run"), {})
    title = environment.get("device_name", "no device")
    if rehearsal := environment.get("rehearsal"):
        title = f"{title} ({rehearsal})"
    steps = dict.fromkeys(row["step"] for row in rows if row["step"] != "run")
    lines = [f"# {title}", "", f"**{verdict(rows)}**", ""]
    lines += [f"- commit {heading.get('commit') or commit.get('id')}, {heading.get('date')}"]
    lines += [f"- {key}: {environment[key]}" for key in _SHOWN if key in environment]
    lines += ["", *(f"- {line(step, rows)}" for step in steps)]
    lines += _listed("What failed", failed(rows))
    lines += _listed("Float32 results within twice their bound", near(rows), _YARDSTICK)
    lines += _benchmark([row for row in rows if "ratios" in row])
    lines += _tuning([row for row in rows if row["step"] == "tuning" and "forward" in row])
    lines += _probe([row for row in rows if row["step"] == "probe" and "us" in row])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


_SHOWN = ("python", "versions", "cuda", "arch", "multiprocessors", "l2_bytes", "repeated_launches")


_YARDSTICK = (
    "The bounds hold for exact sums in float32. A GPU's tensor cores truncate their accumulator, so"
    " a few results may miss them slightly; these are not counted as failures."
)


def _listed(title: str, rows: list[Row], note: str = "") -> list[str]:
    if not rows:
        return []
    lines = ["", f"## {title}", "", *([note, ""] if note else [])]
    for row in rows:
        failures = "; ".join(text[:300] for text in row.get("failures", []))
        lines.append(f"- {row['step']}, {row.get('case', '')}: {failures}")
    return lines


def _benchmark(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    body = [
        [row["case"], f"{row['frozen_ms']:.3f}"]
        + [f"{row['ratios'][name]:.3f}" if name in row["ratios"] else "" for name in names]
        for row in rows
    ]
    return _table("Time over the frozen layer's", ["layer", "frozen ms", *names], body)


def _tuning(rows: list[Row]) -> list[str]:
    body = []
    for row in rows:
        for direction in ("forward", "backward"):
            if entry := row.get(direction):
                times = entry["microseconds"].items()
                shown = (f"{k} {v:.1f} ({entry['host_microseconds'][k]:.1f})" for k, v in times)
                body.append([row["case"], direction, entry["strategy"], ", ".join(shown)])
    heads = ["layer", "direction", "kept", "device µs (host µs)"]
    return _table("Strategies", heads, body)


def _probe(rows: list[Row]) -> list[str]:
    body = [[r["case"], r["name"], r["us"], r["gb_per_s"]] for r in rows]
    return _table("Candidates", ["product", "candidate", "µs", "GB/s"], body)


def _table(title: str, heads: list[str], body: list[list]) -> list[str]:
    if not body:
        return []
    lines = ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(map(str, cells))} |" for cells in body]
