"""Results of benchmarks/run.py with numbers that tests choose."""

from __future__ import annotations

from harness import shapes
from harness.timing import Quartiles
from report.records import Report, Result, Row


def result_of(ratio: float, spread: float = 0.01, saved: int = 0) -> Result:
    """A provider's result: a step of ``ratio`` ms that keeps ``saved`` bytes for backward."""
    quartiles = Quartiles(ratio, ratio - spread, ratio + spread)
    return Result(Quartiles(ratio / 1e3, ratio / 1e3, ratio / 1e3), quartiles, saved, None)


def report_of(rows=shapes.CPU_TARGETS, fused: float = 1.25, spread: float = 0.01) -> Report:
    """A run of the frozen layer, eager, PEFT and ours, with dropout 0.1 in two dtypes."""
    machine = {
        "device": "cpu",
        "device_name": "a processor",
        "threads": 2,
        "thread_binding": "true",
        "versions": {"torch": "2.13.0+cpu"},
        "commit": {"id": "0123456789ab", "dirty": False},
        "date": "2026-01-31T00:00:00+00:00",
    }
    made = [
        Row(
            shape,
            dtype,
            0.1,
            9,
            {
                "frozen": result_of(1.0),
                "eager": result_of(1.5, saved=4 * shape.M * shape.K),
                # Alternately 4.5 and 2 times 1.25, the default of ``fused``.
                "peft": result_of(2.5 if i % 2 else 5.625),
                "fused": result_of(fused, spread, saved=2 * shape.M * shape.K),
            },
            {"loralib": "not installed"},
        )
        for dtype in ("bfloat16", "float32")
        for i, shape in enumerate(rows)
    ]
    return Report(machine, made)
