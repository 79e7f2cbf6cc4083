"""Choose a launch configuration for a shape: of the rows of ``tile_tables.py``, the best that fits.

``config.py`` defines the configurations and when one is valid; :func:`_choose` ranks them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial

import torch

from . import tile_tables
from .config import (
    MIN_BLOCK_ROWS,
    MIN_SPLIT_ROWS,
    SEGMENT_ROWS,
    THIN_PAIR_MAX_RANK,
    AddConfig,
    Config,
    GatedConfig,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
    SinglePassConfig,
    Target,
    ThinPairConfig,
    cdiv,
    is_valid,
    split_evenly,
)

# The most shared memory that a thread block may use (CUDA C programming guide, table of compute
# capabilities; AMD: LDS of a workgroup, CDNA 4 white paper).
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx950": 163_840,
}
DEFAULT_SHARED_BYTES = 65_536  # other gfx9 GPUs; also the smallest of any GPU Triton supports
# What a kernel that streams one operand needs to reach the bandwidth of memory. Bytes in flight per
# SM, by Little's law: 0.7 µs of the data sheets' bandwidth. And a share of the SMs, since an SM can
# load several times its own part. Like the next two, these are assumptions until measured.
BYTES_IN_FLIGHT = {
    "sm_80": 13_200,
    "sm_86": 8_000,
    "sm_89": 5_500,
    "sm_90": 17_800,
    "sm_100": 37_800,
    "sm_120": 7_400,
    "gfx90a": 10_800,
    "gfx942": 12_200,
    "gfx950": 21_900,
}
DEFAULT_BYTES_IN_FLIGHT = 10_000
STREAMING_SMS = 0.7
L2_COST = 0.5  # of a byte that is loaded again, from the L2 cache; 1 from memory
RESIDENT_WARPS = 8  # per SM, with 255 registers per thread
PROGRAMS_PER_SM = (STREAMING_SMS, 1, 1.5, 2, 3, 4)  # that a split aims at
INTERPRETER = Target("interpreter", sms=4, shared_bytes=1 << 30)


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a CUDA or ROCm device; :data:`INTERPRETER` for a CPU."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(
        arch, properties.multi_processor_count, SHARED_BYTES.get(arch, DEFAULT_SHARED_BYTES)
    )


def fill(config: Config, target: Target, rows: int, columns: int, rank: int = 1) -> float:
    """How evenly the tiles of a ``(rows, columns)`` result fill the GPU, from 0 to 1.

    The share of useful work in the SMs' time slots if every tile takes one slot. The rest is idle
    SMs in the last wave and the parts of tiles outside the result.
    """
    block_rows, block_columns = config.tile(rank)
    tiles = cdiv(rows, block_rows) * cdiv(columns, block_columns) * config.splits
    slots = cdiv(tiles, target.sms) * target.sms  # whole waves of one tile per SM
    return rows * columns * config.splits / (slots * block_rows * block_columns)


def intensity(config: Config, rank: int) -> float:
    """Share of a tile's time spent on arithmetic: ``p / (p + 16)`` for ``p`` products per load.

    An ``(a, b)`` tile computes ``a b`` products from every ``a + b`` numbers it loads. The constant
    16 is the assumed balance of tensor cores and L2 cache: a guess, to be replaced by measurement.
    """
    rows, columns = config.tile(rank)
    per_load = rows * columns / (rows + columns)
    return per_load / (per_load + 16)


def _choose(candidates: list, target: Target, rows: int, columns: int, rank: int):
    """The candidate with the largest product of :func:`fill` and :func:`intensity`.

    Ties go to the candidate that comes first in its table.
    """
    return max(candidates, key=lambda c: fill(c, target, rows, columns, rank) * intensity(c, rank))


def _valid(configs: Iterable, target: Target, itemsize: int, rank: int) -> list:
    """The configurations that fit ``target``, each with as many of its stages as possible.

    At least two stages are kept (unless a row has one): a single one overlaps nothing.
    """
    staged = (
        [
            replace(config, num_stages=n)
            for n in range(config.num_stages, min(2, config.num_stages) - 1, -1)
        ]
        for config in configs
    )
    fitting = ([c for c in options if is_valid(c, target, itemsize, rank)] for options in staged)
    return [options[0] for options in fitting if options]


def _low(configs: list, M: int, segments: int) -> list:
    """Those whose blocks of rows are no higher than one of ``segments`` with ``M`` rows together.

    The average counts, up to a power of two. Always some: else those with the lowest blocks. All
    without segments.
    """
    if not segments:
        return configs
    most = max(MIN_BLOCK_ROWS, 1 << (cdiv(M, segments) - 1).bit_length())
    most = max(most, min(config.block_m for config in configs))
    return [config for config in configs if config.block_m <= most]


def gemm_candidates(
    target: Target, itemsize: int, rank: int, *, aligned: bool, segments: bool = False
) -> list[GemmConfig]:
    """The valid configurations, from which :func:`gemm_config` chooses."""
    table = tile_tables.GEMM_OF_SEGMENTS if segments else tile_tables.GEMM
    bands = tile_tables.look_up(table, target.arch, itemsize, aligned)
    # The interpreter runs persistent programs over descriptors too, so that tests cover them.
    described = aligned and itemsize == 2 and target.arch in tile_tables.PERSISTENT
    described = described or (aligned and target.arch == "interpreter")
    described = described and not segments  # a descriptor would store beyond a segment's end
    programs = target.sms if described else 0
    overlap = described and target.arch in (*tile_tables.OVERLAPPED, "interpreter")
    late = segments and itemsize == 2 and target.arch in tile_tables.PERSISTENT
    make = partial(GemmConfig, programs=programs, overlap=overlap, asynchronous=late)
    return _valid(
        [
            make(warps, stages, described, *block)
            for warps, stages, *block in tile_tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


def gemm_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, aligned: bool, segments: int = 0
) -> GemmConfig:
    """The tile of ``lora_gemm`` for an ``(M, N)`` output.

    Args:
        aligned: whether every row starts on a 16-byte boundary, as vector loads and tensor
            descriptors require.
        segments: into which the rows are sorted; tiles are not higher than one is on average. 0:
            one adapter for all rows.
    """
    candidates = gemm_candidates(target, itemsize, rank, aligned=aligned, segments=segments > 0)
    return _choose(_low(candidates, M, segments), target, M, N, rank)


def add_candidates(
    target: Target, itemsize: int, rank: int, *, members: int = 1
) -> list[AddConfig]:
    """The valid configurations, from which :func:`add_config` chooses."""
    table = tile_tables.ADD if members == 1 else tile_tables.ADD_OF_MEMBERS
    rows = tile_tables.look_up(table, target.arch, itemsize, True)
    return _valid(
        [AddConfig(warps, 1, False, *block) for warps, *block in rows], target, itemsize, rank
    )


def add_config(
    target: Target,
    itemsize: int,
    M: int,
    N: int,
    rank: int,
    *,
    members: int = 1,
    segments: int = 0,
) -> AddConfig:
    """The tile of ``lora_add`` for an ``(M, N)`` output.

    Args:
        members: with masks of their own, whose products of ``rank`` are added in one launch.
        segments: into which the rows are sorted; tiles are not higher than one is on average. 0:
            one adapter for all rows.
    """
    candidates = _low(add_candidates(target, itemsize, rank, members=members), M, segments)
    return _choose(candidates, target, M, N, rank)


def gated_candidates(
    target: Target, itemsize: int, rank: int, *, aligned: bool
) -> list[GatedConfig]:
    """The valid configurations, from which :func:`gated_config` chooses."""
    rows = tile_tables.look_up(tile_tables.GATED, target.arch, itemsize, aligned)
    return _valid(
        [GatedConfig(warps, 1, False, *block) for warps, *block in rows], target, itemsize, rank
    )


def gated_config(
    target: Target, itemsize: int, M: int, N: int, rank: int = 0, *, aligned: bool
) -> GatedConfig:
    """The tile of ``gated`` and ``gated_backward`` for ``(M, N)`` operands.

    Args:
        rank: of the low-rank product in backward; 0 without one.
        aligned: whether every row of each operand and result starts on a 16-byte boundary.
    """
    candidates = gated_candidates(target, itemsize, rank, aligned=aligned)
    return _choose(candidates, target, M, N, rank)


def shrink_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool, segments: bool = False
) -> list[ShrinkConfig]:
    """The valid configurations, from which :func:`shrink_config` chooses."""
    bands = tile_tables.look_up(tile_tables.SHRINK, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    spilled = tile_tables.SHRINK_SPILLS.get((target.arch, itemsize)) if segments else None
    return _valid(
        [
            ShrinkConfig(warps, stages, described, rows, step, max_block_r=most)
            for warps, stages, rows, step, most in tile_tables.band(bands, rank)
            if (rows, step) != spilled
        ],
        target, itemsize, rank,
    )  # fmt: skip


def shrink_config(
    target: Target,
    itemsize: int,
    M: int,
    L: int,
    rank: int,
    *,
    describable: bool,
    members: int = 1,
    segments: int = 0,
) -> ShrinkConfig:
    """The tile and splits of ``shrink`` for ``P (M, L)`` with the least :func:`shrink_cost`.

    Args:
        describable: whether a tensor descriptor can address the rows of P (16-byte alignment).
        members: with masks of their own, whose products of ``rank`` are one launch.
        segments: into which the rows are sorted; tiles are not higher than one is on average. 0:
            one adapter for all rows.
    """
    size = target, itemsize, M, L, rank, members
    candidates = shrink_candidates(
        target, itemsize, rank, describable=describable, segments=segments > 0
    )
    if segments:  # not split: 16 rows would spill on sm_90
        candidates = _low(candidates, M, segments)
    else:
        candidates = [split_shrink(config, *size) for config in candidates]
    return min(candidates, key=lambda config: shrink_cost(config, *size))


def split_shrink(
    config: ShrinkConfig, target: Target, itemsize: int, M: int, L: int, rank: int, members: int = 1
) -> ShrinkConfig:
    """``config`` with the cheapest number of splits, each of at least four steps."""
    most = min(cdiv(L, 4 * config.block_l), _capped(itemsize * L, members * rank))
    return min(
        _splits(config, target, members * config.blocks(M, rank, rank), most),
        key=lambda split: shrink_cost(split, target, itemsize, M, L, rank, members),
    )


def shrink_cost(
    config: ShrinkConfig, target: Target, itemsize: int, M: int, L: int, rank: int, members: int = 1
) -> float:
    """Bytes that ``shrink`` moves, over the share of memory's bandwidth that it reaches.

    Every block of rows loads Q, and every block of ranks loads P.
    """
    rows, ranks = config.tile(rank)
    rank_blocks = members * cdiv(rank, ranks)
    again = itemsize * L * ((rank_blocks - 1) * M + cdiv(M, rows) * members * rank)
    moved = itemsize * M * L + L2_COST * again + _partials(config, M, members * rank)
    in_flight = _in_flight(config, itemsize * rows * config.block_l)
    blocks = members * config.blocks(M, rank, rank)
    return moved / _reached(config, target, itemsize, rank, blocks, in_flight)


def rank_grad_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool, segments: bool = False
) -> list[RankGradConfig]:
    """The valid configurations, from which :func:`rank_grad_config` chooses."""
    bands = tile_tables.look_up(tile_tables.RANK_GRAD, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    spilled = tile_tables.RANK_GRAD_SPILLS.get((target.arch, itemsize)) if segments else None
    return _valid(
        [
            RankGradConfig(warps, stages, described, step, columns, max_block_r=most)
            for warps, stages, step, columns, most in tile_tables.band(bands, rank)
            if (step, columns) != spilled
        ],
        target, itemsize, rank,
    )  # fmt: skip


def rank_grad_config(
    target: Target,
    itemsize: int,
    M: int,
    L: int,
    rank: int,
    *,
    describable: bool,
    members: int = 1,
    segments: int = 0,
) -> RankGradConfig:
    """The tile and splits of ``rank_grad`` with the least :func:`rank_grad_cost`.

    Arguments as in :func:`shrink_config`. The splits of segments are SEGMENT_ROWS each.
    """
    candidates = rank_grad_candidates(
        target, itemsize, rank, describable=describable, segments=segments > 0
    )
    size = target, itemsize, M, L, rank, members
    if segments:
        items = M // SEGMENT_ROWS + segments
        split = [replace(config, splits=items) for config in _low(candidates, M, segments)]
        return min(split, key=lambda config: rank_grad_cost(config, *size))
    split = [split_rank_grad(config, *size) for config in candidates]
    return min(split, key=lambda config: rank_grad_cost(config, *size))


def split_rank_grad(
    config: RankGradConfig,
    target: Target,
    itemsize: int,
    M: int,
    L: int,
    rank: int,
    members: int = 1,
) -> RankGradConfig:
    """``config`` with the cheapest number of splits, each of at least MIN_SPLIT_ROWS."""
    most = min(cdiv(M, MIN_SPLIT_ROWS), _capped(itemsize * M, members * rank))
    return min(
        _splits(config, target, members * config.blocks(rank, L, rank), most),
        key=lambda split: rank_grad_cost(split, target, itemsize, M, L, rank, members),
    )


def rank_grad_cost(
    config: RankGradConfig,
    target: Target,
    itemsize: int,
    M: int,
    L: int,
    rank: int,
    members: int = 1,
) -> float:
    """Bytes that ``rank_grad`` moves, over the share of memory's bandwidth that it reaches.

    Every block of ranks loads P, and every block of columns loads U.
    """
    ranks, columns = config.tile(rank)
    rank_blocks = members * cdiv(rank, ranks)
    again = itemsize * M * ((rank_blocks - 1) * L + cdiv(L, columns) * members * rank)
    moved = itemsize * M * L + L2_COST * again + _partials(config, L, members * rank)
    in_flight = _in_flight(config, itemsize * config.block_m * (columns + ranks))
    blocks = members * config.blocks(rank, L, rank)
    return moved / _reached(config, target, itemsize, rank, blocks, in_flight)


def _splits(config: Config, target: Target, blocks: int, most: int) -> list[Config]:
    """``config`` with every number of splits worth considering, from 1 to ``most``."""
    wanted = {round(share * target.sms / blocks) for share in PROGRAMS_PER_SM}
    return [replace(config, splits=max(1, min(n, most))) for n in sorted(wanted | {1})]


def _in_flight(config: Config, step: int) -> int:
    """Bytes that a program has requested at any time; each stage but one loads ``step``."""
    return max(1, config.num_stages - 1) * step


def _reached(
    config: Config, target: Target, itemsize: int, rank: int, blocks: int, in_flight: int
) -> float:
    """The share of memory's bandwidth that ``splits`` times ``blocks`` programs reach."""
    by_shared = target.shared_bytes // config.shared_bytes(itemsize, rank)
    slots = target.sms * max(1, min(by_shared, RESIDENT_WARPS // config.num_warps))
    programs = config.splits * blocks
    running, waves = min(programs, slots), cdiv(programs, slots)
    needed = target.sms * BYTES_IN_FLIGHT.get(target.arch, DEFAULT_BYTES_IN_FLIGHT)
    reached = min(1.0, running / (STREAMING_SMS * target.sms), running * in_flight / needed)
    return reached * programs / (waves * running)


def _partials(config: Config, width: int, rank: int) -> int:
    """Bytes of the partial sums, written and read in fp32, of a result of ``width`` by ``rank``."""
    return 8 * config.splits * width * rank if config.splits > 1 else 0


def thin_pair_candidates(target: Target, itemsize: int, rank: int) -> list[ThinPairConfig]:
    """The valid configurations, from which :func:`thin_pair_config` chooses; there may be none."""
    if itemsize != 2 or rank > THIN_PAIR_MAX_RANK:
        return []
    bands = tile_tables.THIN_PAIR.get(target.arch, tile_tables.THIN_PAIR["any"])
    rows = tile_tables.band(bands, rank)
    return _valid(
        [ThinPairConfig(warps, stages, False, *block) for warps, stages, *block in rows],
        target, itemsize, rank,
    )  # fmt: skip


def thin_pair_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> ThinPairConfig | None:
    """The tile and splits of ``thin_pair`` for ``P (M, L)``, chosen as for ``rank_grad``.

    None if the partial sums would move as many bytes as P, whose second read they replace.

    Args:
        describable: as for :func:`shrink_config`.
    """
    candidates = thin_pair_candidates(target, itemsize, rank) if describable else []
    options = []
    for config in candidates:
        blocks = cdiv(L, config.block_l)
        in_flight = _in_flight(config, itemsize * config.block_m * (config.block_l + rank))
        for split in _splits(config, target, blocks, cdiv(M, config.block_m)):
            _, splits = split_evenly(M, split.splits, split.block_m)
            partial = 8 * rank * (blocks * M + splits * L)  # written and read in fp32
            if partial < itemsize * M * L:
                moved = itemsize * M * (L + L2_COST * rank * blocks) + partial
                reached = _reached(split, target, itemsize, rank, blocks, in_flight)
                options.append((moved / reached, split))
    return min(options, key=lambda option: option[0], default=(0, None))[1]


def _capped(bytes_per_row: int, rank: int) -> int:
    """The most splits whose partial sums are at most a quarter of P's bytes.

    A partial sum is written and read in fp32: 8 bytes per element, hence 32 for a quarter.
    """
    return max(1, bytes_per_row // (32 * rank))


def single_pass_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[SinglePassConfig]:
    """The valid configurations, from which :func:`single_pass_config` chooses."""
    rows = tile_tables.look_up(tile_tables.SINGLE_PASS, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    return _valid(
        [SinglePassConfig(warps, stages, described, *block) for warps, stages, *block in rows],
        target, itemsize, rank,
    )  # fmt: skip


def single_pass_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, describable: bool
) -> SinglePassConfig:
    """The tile of ``single_pass`` for an ``(M, N)`` output with small M."""
    candidates = single_pass_candidates(target, itemsize, rank, describable=describable)
    return _choose(candidates, target, M, N, rank)
