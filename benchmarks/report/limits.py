"""What the benchmarks with limits of the project share: an option, the run, the verdict.

A row has a ``case`` with ``limits`` by name, and ``missed``, the names of those that are exceeded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch

from harness import command, machine
from layer.problem import WrongResultError


def add_seconds(parser: argparse.ArgumentParser, default: float, quick: float) -> None:
    """Add the option ``--seconds``, per case; :func:`parsed` fills its default in."""
    help_text = f"per case; default {default:g}, --quick {quick:g}"
    parser.add_argument("--seconds", type=float, help=help_text)
    parser.set_defaults(default_seconds=(default, quick))


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options; invalid ones end the script with one line and status 2."""
    args = parser.parse_args(argv)
    if args.seconds is None:
        args.seconds = args.default_seconds[args.quick]
    return args


def limit_of(row, name: str) -> str:
    """A limit for the table; an exclamation mark if it is missed. Empty without one."""
    if name not in row.case.limits:
        return ""
    return f" ≤ {row.case.limits[name]:.2f}{'!' if name in row.missed else ' '}"


def verdict(rows: list) -> list[str]:
    """How many limits are met, and a line for each other."""
    total = sum(len(row.case.limits) for row in rows)
    missed = [f"missed: {row.case}: {name}" for row in rows for name in row.missed]
    return [f"{total - len(missed)} of {total} limits are met", *missed]


def measure_all(
    args: argparse.Namespace,
    cases: Iterable,
    measure: Callable[..., object],
    render: Callable[[list, dict], str],
) -> int:
    """Measure every case, then print and save the table.

    Args:
        measure: ``(case, device, seconds)`` to a row, a dataclass.
        render: rows and the machine to the table's text.

    Returns:
        The exit status: 0 when everything was measured, 2 (after one line) on an error.
    """
    try:
        rows = []
        for case in cases:
            print(case, file=sys.stderr, flush=True)
            rows.append(measure(case, args.device, args.seconds))
        about = machine.describe(args.device)
        data = {"machine": about, "rows": [asdict(row) for row in rows]}
        command.write(args, data, render(rows, about))
    except (OSError, WrongResultError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
