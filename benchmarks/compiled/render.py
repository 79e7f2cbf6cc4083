"""Rows of the report as text, and as lines of JSON with which a later run continues."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from fused_lora.kernels.config import Config

from .cases import Case
from .report import Row
from .sources import digest

COLUMNS = (
    "kernel", "dtype", "rows", "config", "n", "registers", "spill", "shared", "of", "tmem",
    "occupancy", "share", "matrix", "copies", "instructions", "pipelined", "faults",
)  # fmt: skip
_KERNEL = re.compile(r"kernel='(\w+)'")  # in the text of a case


def describe(config: Config | None) -> str:
    """A config in short: block, warps ``w``, stages ``s``, ``p`` for descriptors, ``/`` splits."""
    if config is None:
        return "-"
    names = ("block_m", "block_n", "block_l", "max_block_r")
    sizes = "x".join(str(getattr(config, name)) for name in names if hasattr(config, name))
    flag = " p" if config.descriptors else ""
    split = f" /{config.splits}" if config.splits > 1 else ""
    return f"{sizes} w{config.num_warps} s{config.num_stages}{flag}{split}"


def table(rows: Iterable[tuple[Case, Row]]) -> str:
    """One line per config and kind of operand: the worst over ranks, products and masks."""
    groups = defaultdict(list)
    for case, row in rows:
        groups[case.kernel, case.dtype, case.rows, describe(case.config)].append(row)
    lines = [COLUMNS, *((*key, *_summary(found)) for key, found in groups.items())]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def arch_table(arch: str, rows: list[tuple[Case, Row]]) -> str:
    """The committed table of one architecture."""
    unfit = sum(bool(row.faults) for _, row in rows)
    return (
        f"{arch}, compiled (Triton {triton.__version__}), not run: {len(rows)} kernels, {unfit} "
        f"unfit\n\n{table(rows)}"
    )


def _summary(rows: list[Row]) -> tuple:
    loops = [row.pipelined for row in rows if row.pipelined is not None]
    shares = [row.share for row in rows if row.pipelined is not None]
    return (
        len(rows),
        _span(row.registers for row in rows),
        max(row.spill for row in rows),
        max(row.shared for row in rows),
        max(row.shared_limit for row in rows),
        max(row.tensor_columns for row in rows) or "-",
        f"{min(row.occupancy for row in rows):.2f}",
        f"{min(shares):.2f}" if shares else "-",
        ",".join(sorted({kind for row in rows for kind in row.matrix})) or "-",
        ",".join(sorted({kind for row in rows for kind in row.copies})) or "-",
        _span(row.instructions for row in rows),
        f"{sum(loops)}/{len(loops)}" if loops else "-",
        "; ".join(sorted({fault for row in rows for fault in row.faults})) or "-",
    )


def _span(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}"


def append(file, case: Case, row: Row) -> None:
    """Write one row as a line of JSON."""
    line = {"sources": digest(case.kernel), "triton": triton.__version__, "case": repr(case)}
    print(json.dumps(line | row.as_dict()), file=file, flush=True)


def load(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows that an earlier run of the same code wrote, each with its case's text."""
    for line in path.read_text().splitlines() if path.exists() else ():
        fields = json.loads(line)
        case = fields.pop("case")
        if fields.pop("sources") == digest(_KERNEL.search(case)[1]):
            fields.pop("triton")
            yield case, Row(**fields)
