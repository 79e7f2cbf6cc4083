"""Choose a launch configuration for a shape: of the rows of ``tile_tables.py``, the best that fits.

``config.py`` defines the configurations and when one is valid; :func:`_choose` ranks them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch

from . import tile_tables
from .config import (
    AddConfig,
    Config,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
    SinglePassConfig,
    Target,
    cdiv,
    is_valid,
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


def gemm_candidates(target: Target, itemsize: int, rank: int, *, aligned: bool) -> list[GemmConfig]:
    """The valid configurations, from which :func:`gemm_config` chooses."""
    bands = tile_tables.look_up(tile_tables.GEMM, target.arch, itemsize, aligned)
    # The interpreter runs persistent programs over descriptors too, so that tests cover them.
    described = aligned and itemsize == 2 and target.arch in tile_tables.PERSISTENT
    described = described or (aligned and target.arch == "interpreter")
    programs = target.sms if described else 0
    overlap = described and target.arch in (*tile_tables.OVERLAPPED, "interpreter")
    return _valid(
        [
            GemmConfig(
                warps, stages, described, rows, columns, step, programs=programs, overlap=overlap
            )
            for warps, stages, rows, columns, step in tile_tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


def gemm_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, aligned: bool
) -> GemmConfig:
    """The tile of ``lora_gemm`` for an ``(M, N)`` output.

    Args:
        aligned: whether every row starts on a 16-byte boundary, as vector loads and tensor
            descriptors require.
    """
    return _choose(gemm_candidates(target, itemsize, rank, aligned=aligned), target, M, N, rank)


def add_candidates(target: Target, itemsize: int, rank: int) -> list[AddConfig]:
    """The valid configurations, from which :func:`add_config` chooses."""
    rows = tile_tables.look_up(tile_tables.ADD, target.arch, itemsize, True)
    return _valid(
        [AddConfig(warps, 1, False, *block) for warps, *block in rows], target, itemsize, rank
    )


def add_config(target: Target, itemsize: int, M: int, N: int, rank: int) -> AddConfig:
    """The tile of ``lora_add`` for an ``(M, N)`` output."""
    return _choose(add_candidates(target, itemsize, rank), target, M, N, rank)


def shrink_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[ShrinkConfig]:
    """The valid configurations, from which :func:`shrink_config` chooses."""
    bands = tile_tables.look_up(tile_tables.SHRINK, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    return _valid(
        [
            ShrinkConfig(warps, stages, described, rows, step, max_block_r=most)
            for warps, stages, rows, step, most in tile_tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


def shrink_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> ShrinkConfig:
    """The tile and splits of ``shrink`` for ``P (M, L)``.

    There are enough programs to fill the GPU, as far as the cap on partial sums allows.

    Args:
        describable: whether a tensor descriptor can address the rows of P (16-byte alignment).
    """
    candidates = shrink_candidates(target, itemsize, rank, describable=describable)
    split = [split_shrink(config, target, itemsize, M, L, rank) for config in candidates]
    return _choose(split, target, M, rank, rank)


def split_shrink(
    config: ShrinkConfig, target: Target, itemsize: int, M: int, L: int, rank: int
) -> ShrinkConfig:
    """``config``, split along the contraction for two programs per SM of at least four steps."""
    wanted = cdiv(2 * target.sms, cdiv(M, config.block_m))
    wanted = min(wanted, cdiv(L, 4 * config.block_l))
    return replace(config, splits=_capped(wanted, itemsize * L, rank))


def rank_grad_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[RankGradConfig]:
    """The valid configurations, from which :func:`rank_grad_config` chooses."""
    bands = tile_tables.look_up(tile_tables.RANK_GRAD, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    return _valid(
        [
            RankGradConfig(warps, stages, described, step, columns, max_block_r=most)
            for warps, stages, step, columns, most in tile_tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


def rank_grad_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> RankGradConfig:
    """The tile and splits of ``rank_grad``; rules and arguments as in :func:`shrink_config`."""
    candidates = rank_grad_candidates(target, itemsize, rank, describable=describable)
    split = [split_rank_grad(config, target, itemsize, M, L, rank) for config in candidates]
    return _choose(split, target, rank, L, rank)


def split_rank_grad(
    config: RankGradConfig, target: Target, itemsize: int, M: int, L: int, rank: int
) -> RankGradConfig:
    """``config`` with the rows split so that each SM has 128 columns, of at least 256 rows.

    These are two programs of 64 columns or one of 128: two of 128 would double the partial sums,
    which costs more.
    """
    wanted = min(cdiv(128 * target.sms, L), cdiv(M, 256))
    return replace(config, splits=_capped(wanted, itemsize * M, rank))


def _capped(wanted: int, bytes_per_row: int, rank: int) -> int:
    """``wanted`` splits, or as many whose partial sums are at most a quarter of P's bytes.

    A partial sum is written and read in fp32: 8 bytes per element, hence 32 for a quarter.
    """
    return max(1, min(wanted, bytes_per_row // (32 * rank)))


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
