"""Launch configurations: what they are, when one is valid, and which one a shape gets.

The tiles stand in ``tables.py``. They are policy, not kernels: a launcher takes an explicit config
and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from . import tables

MIN_BLOCK_R = 16  # the smallest inner size of a matrix instruction for half precision
MAX_BLOCK_R = 32  # larger ranks are chunked: at 64, U's fp32 tile spills on sm_80 and sm_90
MAX_THIN_BLOCK_R = 256  # of shrink and rank_grad: larger ranks are several programs
SINGLE_PASS_MAX_ROWS = 64
SINGLE_PASS_MAX_RANK = 64
BARRIER_BYTES = 256  # of the pipelined copies


def cdiv(a: int, b: int) -> int:
    """``⌈a / b⌉``."""
    return -(-a // b)


def padded_rank(rank: int, most: int = MAX_BLOCK_R) -> int:
    """The tile size for ``rank``: a power of two from MIN_BLOCK_R to ``most``."""
    return min(max(MIN_BLOCK_R, 1 << (rank - 1).bit_length()), most)


@dataclass(frozen=True)
class Config:
    """What every kernel's configuration has."""

    num_warps: int
    num_stages: int
    descriptors: bool = False
    splits = 1  # of the contraction

    @property
    def buffers(self) -> int:
        """Steps of the loop that lie in shared memory; a pointer's next one is still on its way."""
        return self.num_stages if self.descriptors else max(1, self.num_stages - 1)

    def tile(self, rank: int) -> tuple[int, int]:
        """Rows and columns of the result that a program owns."""
        raise NotImplementedError

    def operand(self, tensor: torch.Tensor, block: tuple[int, int]):
        """``tensor`` as the kernel takes it: itself, or a tensor descriptor of ``block``."""
        if not self.descriptors:
            return tensor
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block))


@dataclass(frozen=True)
class GemmConfig(Config):
    """``lora_gemm``; ``programs`` 0 is one program a tile, else that many persistent ones."""

    block_m: int = 64
    block_n: int = 64
    block_l: int = 32
    group_m: int = 8
    programs: int = 0

    def rank_blocks(self, rank: int) -> tuple[int, int]:
        """Block and number of chunks that cover ``rank``."""
        block = padded_rank(rank)
        return block, cdiv(rank, block)

    def tile(self, rank: int) -> tuple[int, int]:
        """As of :class:`Config`."""
        return self.block_m, self.block_n

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        block_r, chunks = self.rank_blocks(rank)
        loop = self.buffers * (self.block_m + self.block_n) * self.block_l * itemsize
        output = self.block_m * self.block_n * itemsize if self.descriptors else 0
        # A chunked U V is a loop of its own, staged in fp32; it reuses the other's memory. Behind
        # descriptors (warp-group products) its operands are written there again in their dtype.
        staged = 4 + (itemsize if self.descriptors else 0)
        low_rank = (self.block_m + self.block_n) * block_r * (staged if chunks > 1 else itemsize)
        tiles = max(loop, low_rank) if chunks > 1 else loop + low_rank
        return tiles + output + BARRIER_BYTES


@dataclass(frozen=True)
class AddConfig(Config):
    """``lora_add``."""

    block_m: int = 64
    block_n: int = 64

    rank_blocks = GemmConfig.rank_blocks
    tile = GemmConfig.tile

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        staged = 2 * (self.block_m + self.block_n) * padded_rank(rank) * 4
        return max(staged, self.block_m * self.block_n * 4)


@dataclass(frozen=True)
class ShrinkConfig(Config):
    """``shrink``; ``splits`` of the contraction."""

    block_m: int = 32
    block_l: int = 64
    splits: int = 1
    max_block_r: int = MAX_THIN_BLOCK_R

    def block_r(self, rank: int) -> int:
        """Columns of U a program owns."""
        return padded_rank(rank, self.max_block_r)

    def tile(self, rank: int) -> tuple[int, int]:
        """As of :class:`Config`."""
        return self.block_m, self.block_r(rank)

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        block_r = self.block_r(rank)
        loop = self.buffers * (self.block_m + block_r) * self.block_l * itemsize
        return loop + self.block_m * self.block_l * max(itemsize, 4)


@dataclass(frozen=True)
class RankGradConfig(Config):
    """``rank_grad``; ``splits`` of the rows."""

    block_m: int = 32
    block_l: int = 64
    splits: int = 1
    max_block_r: int = MAX_THIN_BLOCK_R

    def block_r(self, rank: int) -> int:
        """Rows of the output a program owns."""
        return padded_rank(rank, self.max_block_r)

    def tile(self, rank: int) -> tuple[int, int]:
        """As of :class:`Config`."""
        return self.block_r(rank), self.block_l

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block; U and the output are staged in fp32."""
        block_r = self.block_r(rank)
        loop = self.buffers * self.block_m * (self.block_l * itemsize + block_r * 4)
        loop += self.block_m * (self.block_l * 4 + block_r * itemsize)
        return max(loop, block_r * self.block_l * 4) + BARRIER_BYTES


@dataclass(frozen=True)
class SinglePassConfig(Config):
    """``single_pass``."""

    block_m: int = 16
    block_n: int = 64
    block_l: int = 64

    def block_r(self, rank: int) -> int:
        """The whole rank, in one block."""
        return padded_rank(rank, SINGLE_PASS_MAX_RANK)

    tile = GemmConfig.tile

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        block_r = self.block_r(rank)
        rows = self.block_m + self.block_n + block_r
        low_rank = (self.block_m + self.block_n) * block_r * itemsize
        return self.buffers * rows * self.block_l * itemsize + low_rank


@dataclass(frozen=True)
class Target:
    """What a choice needs to know of a GPU."""

    arch: str  # "sm_90", "gfx942", or "interpreter"
    sms: int
    shared_bytes: int  # the most a block may have

    @property
    def descriptors(self) -> bool:
        """Whether tensor descriptors are copied by hardware."""
        return self.arch in ("sm_90", "sm_100", "sm_120", "interpreter")


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


def is_valid(config: Config, target: Target, itemsize: int, rank: int) -> bool:
    """The one rule every table, tuner and test asks: does ``config`` fit ``target``?"""
    if config.descriptors and not target.descriptors:
        return False
    if isinstance(config, SinglePassConfig) and rank > SINGLE_PASS_MAX_RANK:
        return False
    return config.shared_bytes(itemsize, rank) <= target.shared_bytes


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
    rows = tables.look_up(tables.GEMM, target.arch, itemsize, aligned)
    described = aligned and itemsize == 2 and target.arch in tables.PERSISTENT
    described = described or (aligned and target.arch == "interpreter")
    programs = target.sms if described else 0
    return _valid(
        [
            GemmConfig(warps, stages, described, rows, columns, step, programs=programs)
            for warps, stages, rows, columns, step in rows
        ],
        target, itemsize, rank,
    )  # fmt: skip


@lru_cache(4096)
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
    rows = tables.ADD[tables.kind(itemsize, True)]
    return _valid(
        [AddConfig(warps, 1, False, *block) for warps, *block in rows], target, itemsize, rank
    )


@lru_cache(4096)
def add_config(target: Target, itemsize: int, M: int, N: int, rank: int) -> AddConfig:
    """The tile of ``lora_add`` for an ``(M, N)`` output."""
    return _choose(add_candidates(target, itemsize, rank), target, M, N, rank)


def shrink_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[ShrinkConfig]:
    """What :func:`shrink_config` chooses from."""
    bands = tables.look_up(tables.SHRINK, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    return _valid(
        [
            ShrinkConfig(warps, stages, described, rows, step, max_block_r=most)
            for warps, stages, rows, step, most in tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


@lru_cache(4096)
def shrink_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> ShrinkConfig:
    """The tile and splits of ``shrink``: enough programs to fill the GPU, few partial bytes."""

    def split(config: ShrinkConfig) -> ShrinkConfig:
        wanted = cdiv(2 * target.sms, cdiv(M, config.block_m))
        wanted = min(wanted, cdiv(L, 4 * config.block_l))
        return replace(config, splits=_capped(wanted, itemsize * L, rank))

    candidates = shrink_candidates(target, itemsize, rank, describable=describable)
    return _choose([split(config) for config in candidates], target, M, rank, rank)


def rank_grad_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[RankGradConfig]:
    """What :func:`rank_grad_config` chooses from."""
    bands = tables.look_up(tables.RANK_GRAD, target.arch, itemsize, describable)
    described = describable and target.arch == "interpreter"
    return _valid(
        [
            RankGradConfig(warps, stages, described, step, columns, max_block_r=most)
            for warps, stages, step, columns, most in tables.band(bands, rank)
        ],
        target, itemsize, rank,
    )  # fmt: skip


@lru_cache(4096)
def rank_grad_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> RankGradConfig:
    """The tile and splits of ``rank_grad``, by the same two rules as :func:`shrink_config`."""

    def split(config: RankGradConfig) -> RankGradConfig:
        wanted = min(cdiv(2 * target.sms, cdiv(L, config.block_l)), cdiv(M, 256))
        return replace(config, splits=_capped(wanted, itemsize * M, rank))

    candidates = rank_grad_candidates(target, itemsize, rank, describable=describable)
    return _choose([split(config) for config in candidates], target, rank, L, rank)


def _capped(wanted: int, bytes_per_row: int, rank: int) -> int:
    """Splits whose partial sums, written and read in fp32, are at most a quarter of P's bytes."""
    return max(1, min(wanted, bytes_per_row // (32 * rank)))


def single_pass_candidates(
    target: Target, itemsize: int, rank: int, *, describable: bool
) -> list[SinglePassConfig]:
    """What :func:`single_pass_config` chooses from."""
    rows = tables.SINGLE_PASS[tables.kind(itemsize, describable)]
    described = describable and target.arch == "interpreter"
    return _valid(
        [SinglePassConfig(warps, stages, described, *block) for warps, stages, *block in rows],
        target, itemsize, rank,
    )  # fmt: skip


@lru_cache(4096)
def single_pass_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, describable: bool
) -> SinglePassConfig:
    """The tile of ``single_pass`` for an ``(M, N)`` output of few rows."""
    candidates = single_pass_candidates(target, itemsize, rank, describable=describable)
    return _choose(candidates, target, M, N, rank)
