"""The space of tiles that is searched for each kernel, and the ranking of candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import triton

from fused_lora.kernels import select_config
from fused_lora.kernels.config import (
    AddConfig,
    Config,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
    SinglePassConfig,
    is_valid,
)
from fused_lora.kernels.tile_tables import OVERLAPPED, PERSISTENT

from . import limits
from .cases import DTYPES, Case
from .render import describe
from .report import Row

ACCUMULATORS = (4, 128)  # fp32 values per thread: more leave no registers for anything else
# The shapes that candidates are ranked for, as (M, columns of the output or of P).
SHAPES = {"few rows": (128, 4096), "narrow": (2048, 1024), "large": (8192, 4096)}
# What is compiled for each candidate: the product that needs the most registers, at these ranks.
PROBES = {
    "lora_gemm": ("dx", (64,)),
    "lora_add": ("dx", (16, 256)),
    "single_pass": ("dx", (64,)),
    "shrink": ("S", (16, 64, 256)),
    "rank_grad": ("dA", (16, 64, 256)),
}
# How their reductions are split, and what they then cost.
STREAMING = {
    "shrink": (select_config.split_shrink, select_config.shrink_cost),
    "rank_grad": (select_config.split_rank_grad, select_config.rank_grad_cost),
}


def cases(arch: str, kernel: str, dtype: str, rows: str) -> list[Case]:
    """Every candidate for one kernel, at each rank of its entry in PROBES."""
    made, ranks = PROBES[kernel]
    return [
        Case(arch, kernel, made, dtype, rank, rows, True, config)
        for rank in ranks
        for config in space(arch, kernel, dtype, rows, rank)
    ]


def space(arch: str, kernel: str, dtype: str, rows: str, rank: int) -> Iterator[Config]:
    """Tiles that could fit ``arch``, each with the largest number of stages that fits."""
    itemsize, target = 4 if dtype == "fp32" else 2, limits.target(arch)
    stages = (4, 3, 2) if limits.is_nvidia(arch) else (2,)
    for config in _tiles(arch, kernel, itemsize, rows == "narrow"):
        if kernel == "rank_grad" and config.max_block_r > max(64, rank):
            continue  # the same block as with a smaller maximum
        tile = config.tile(rank)
        lanes = 32 if limits.is_nvidia(arch) else 64
        accumulators = tile[0] * tile[1] / (lanes * config.num_warps)
        if ACCUMULATORS[0] <= accumulators <= ACCUMULATORS[1]:
            staged = (replace(config, num_stages=count) for count in stages)
            fitting = (c for c in staged if is_valid(c, target, itemsize, rank))
            yield from list(fitting)[:1]


def _tiles(arch: str, kernel: str, itemsize: int, narrow: bool) -> Iterator[Config]:
    steps = (64, 32) if itemsize == 2 else (32, 16)
    match kernel:
        case "lora_gemm":
            described = arch in PERSISTENT and itemsize == 2 and not narrow
            wide = (64, 128) if narrow else (64, 128, 256)
            for warps, m, n, step in product((4, 8), (32, *wide), wide, steps):
                overlap = described and arch in OVERLAPPED
                yield GemmConfig(
                    warps, 2, described, m, n, step, programs=int(described), overlap=overlap
                )
        case "lora_add":
            for warps, m, n in product((4, 8), (32, 64, 128), (32, 64, 128)):
                yield AddConfig(warps, 1, False, m, n, 128 // itemsize)
        case "single_pass":
            for m, n, step in product((16, 32, 64), (32, 64, 128), (2 * steps[0], *steps)):
                yield SinglePassConfig(4, 2, False, m, n, step)
        case "shrink":
            for warps, m, step in product((4, 8), (16, 32, 64, 128), (2 * steps[0], steps[0])):
                yield ShrinkConfig(warps, 2, False, m, step)
        case "rank_grad":
            most = (256, 128, 64)
            for warps, step, columns, r in product((2, 4, 8), (16, 32, 64), (64, 128), most):
                yield RankGradConfig(warps, 2, False, step, columns, max_block_r=r)


def score(case: Case, row: Row, shape: tuple[int, int]) -> float:
    """A candidate's score; 0 if it has a fault.

    Product share times intensity times fill; for kernels that stream P, its bytes over their cost.
    """
    if row.faults:
        return 0.0
    (rows, columns), config, target = shape, case.config, limits.target(case.arch)
    split = target, DTYPES[case.dtype].itemsize, rows, columns, case.rank
    if case.kernel in STREAMING:
        divide, cost = STREAMING[case.kernel]
        return split[1] * rows * columns / cost(divide(config, *split), *split)
    filled = select_config.fill(config, target, rows, columns, case.rank)
    return row.share * select_config.intensity(config, case.rank) * filled


def table(rows: list[tuple[Case, Row]]) -> str:
    """All candidates with their score at every shape, sorted by that at the large one."""
    lines = [f"Compiled (Triton {triton.__version__}), not run. Scores for {', '.join(SHAPES)}."]
    groups = defaultdict(list)
    for case, row in rows:
        groups[case.arch, case.kernel, case.product, case.dtype, case.rows, case.rank].append(
            ([score(case, row, shape) for shape in SHAPES.values()], case, row)
        )
    for (arch, kernel, made, dtype, alignment, rank), group in groups.items():
        lines += [
            "",
            f"{arch} {kernel}, {made} with dropout, {dtype}, {alignment} rows, rank {rank}",
        ]
        for scores, case, row in sorted(group, key=lambda entry: -entry[0][-1]):
            verdict = "; ".join(row.faults) or " ".join(f"{value:.3f}" for value in scores)
            lines.append(
                f"  {describe(case.config):21} {row.registers:3} registers {row.shared:6} B shared "
                f"occupancy {row.occupancy:.2f}  share {row.share:.2f}  {verdict}"
            )
    return "\n".join(lines)
