"""Which launch configuration a shape gets: the rows of ``tile_tables.py`` that fit, and one rule.

What a configuration is, and when it is valid, stands in ``config.py``.
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

# The most shared memory a block may have (CUDA C programming guide, table of compute capabilities;
# AMD: LDS of a workgroup, CDNA 4 white paper).
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx950": 163_840,
}
DEFAULT_SHARED_BYTES = 65_536  # other gfx9, and the least of any GPU that Triton supports
INTERPRETER = Target("interpreter", sms=4, shared_bytes=1 << 30)


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target behind a CUDA or ROCm device; the interpreter's for a CPU."""
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
    """How evenly the tiles of a ``(rows, columns)`` result fill the GPU.

    The share of the SMs' time slots that do useful work, were every tile to take one slot: the last
    wave is rarely full, and tiles hang over the edges.
    """
    block_rows, block_columns = config.tile(rank)
    tiles = cdiv(rows, block_rows) * cdiv(columns, block_columns) * config.splits
    slots = cdiv(tiles, target.sms) * target.sms
    return rows * columns * config.splits / (slots * block_rows * block_columns)


def intensity(config: Config, rank: int) -> float:
    """Share of a tile's time that is arithmetic: ``p / (p + 16)`` for ``p`` products a number.

    An ``(a, b)`` tile makes ``a b`` products of the ``a + b`` numbers it loads. 16 stand for the
    balance of a GPU's tensor cores and its L2 cache: a guess, to be replaced by measurement.
    """
    rows, columns = config.tile(rank)
    per_load = rows * columns / (rows + columns)
    return per_load / (per_load + 16)


def _choose(candidates: list, target: Target, rows: int, columns: int, rank: int):
    """The candidate with the best product of :func:`fill` and :func:`intensity`.

    Ties go to the one that comes first in its table.
    """
    return max(candidates, key=lambda c: fill(c, target, rows, columns, rank) * intensity(c, rank))


def _valid(configs: Iterable, target: Target, itemsize: int, rank: int) -> list:
    """Those that fit ``target``, each with as many of its stages as do."""
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
    """What :func:`gemm_config` chooses from."""
    bands = tile_tables.look_up(tile_tables.GEMM, target.arch, itemsize, aligned)
    described = aligned and itemsize == 2 and target.arch in tile_tables.PERSISTENT
    described = described or (aligned and target.arch == "interpreter")
    programs = target.sms if described else 0
    return _valid(
        [
            GemmConfig(warps, stages, described, rows, columns, step, programs=programs)
            for warps, stages, rows, columns, step in tile_tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


def gemm_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, aligned: bool
) -> GemmConfig:
    """The tile of ``lora_gemm`` for an ``(M, N)`` output.

    Args:
        aligned: every row starts on 16 bytes, as vector loads and tensor descriptors need.
    """
    return _choose(gemm_candidates(target, itemsize, rank, aligned=aligned), target, M, N, rank)


def add_candidates(target: Target, itemsize: int, rank: int) -> list[AddConfig]:
    """What :func:`add_config` chooses from."""
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
    """What :func:`shrink_config` chooses from."""
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
    """The tile and splits of ``shrink``: enough programs to fill the GPU, few partial bytes."""
    candidates = shrink_candidates(target, itemsize, rank, describable=describable)
    split = [split_shrink(config, target, itemsize, M, L, rank) for config in candidates]
    return _choose(split, target, M, rank, rank)


def split_shrink(
    config: ShrinkConfig, target: Target, itemsize: int, M: int, L: int, rank: int
) -> ShrinkConfig:
    """``config`` with the contraction split over two programs an SM, at least four steps each."""
    wanted = cdiv(2 * target.sms, cdiv(M, config.block_m))
    wanted = min(wanted, cdiv(L, 4 * config.block_l))
    return replace(config, splits=_capped(wanted, itemsize * L, rank))


def rank_grad_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[RankGradConfig]:
    """What :func:`rank_grad_config` chooses from."""
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
    """The tile and splits of ``rank_grad``, by the same two rules as :func:`shrink_config`."""
    candidates = rank_grad_candidates(target, itemsize, rank, describable=describable)
    split = [split_rank_grad(config, target, itemsize, M, L, rank) for config in candidates]
    return _choose(split, target, rank, L, rank)


def split_rank_grad(
    config: RankGradConfig, target: Target, itemsize: int, M: int, L: int, rank: int
) -> RankGradConfig:
    """``config`` with the rows split until an SM has 128 columns, at least 256 rows each.

    Two programs of 64 columns, or one of 128: twice as many partial sums would cost more.
    """
    wanted = min(cdiv(128 * target.sms, L), cdiv(M, 256))
    return replace(config, splits=_capped(wanted, itemsize * M, rank))


def _capped(wanted: int, bytes_per_row: int, rank: int) -> int:
    """Splits whose partial sums, written and read in fp32, are at most a quarter of P's bytes."""
    return max(1, min(wanted, bytes_per_row // (32 * rank)))


def single_pass_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[SinglePassConfig]:
    """What :func:`single_pass_config` chooses from."""
    rows = tile_tables.look_up(tile_tables.SINGLE_PASS, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    return _valid(
        [SinglePassConfig(warps, stages, described, *block) for warps, stages, *block in rows],
        target, itemsize, rank,
    )  # fmt: skip


def single_pass_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, describable: bool
) -> SinglePassConfig:
    """The tile of ``single_pass`` for an ``(M, N)`` output of few rows."""
    candidates = single_pass_candidates(target, itemsize, rank, describable=describable)
    return _choose(candidates, target, M, N, rank)
