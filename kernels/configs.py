"""Launch configurations: what they are, when one is valid, and which one a shape gets.

Tile tables are policy, not kernels: a launcher takes an explicit config and asks nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

MIN_BLOCK_R = 16  # the smallest inner size of a matrix instruction for half precision
MAX_BLOCK_R = 32  # larger ranks are chunked: at 64, U's fp32 tile spills on sm_80 and sm_90
SHRINK_MAX_BLOCK_R = 256  # accumulators of one row block: 32 · 256 fp32 are 64 registers a thread
SINGLE_PASS_MAX_ROWS = 64
SINGLE_PASS_MAX_RANK = 64
BARRIER_BYTES = 256  # of the pipelined copies
MIN_ROWS_PER_RANK = 16  # below, rank_grad's partial sums outweigh the operand


def cdiv(a: int, b: int) -> int:
    """``⌈a / b⌉``."""
    return -(-a // b)


def split_evenly(extent: int, splits: int, block: int) -> tuple[int, int]:
    """Length of each part and number of parts of a reduction, parts being whole blocks."""
    part = cdiv(cdiv(extent, splits), block) * block
    return part, cdiv(extent, part)


def padded_rank(rank: int, most: int = MAX_BLOCK_R) -> int:
    """The tile size for ``rank``: a power of two from MIN_BLOCK_R to ``most``."""
    return min(max(MIN_BLOCK_R, 1 << (rank - 1).bit_length()), most)


@dataclass(frozen=True)
class Config:
    """What every kernel's configuration has."""

    num_warps: int
    num_stages: int
    descriptors: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What Triton is given beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


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

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        block_r, chunks = self.rank_blocks(rank)
        loop = self.num_stages * (self.block_m + self.block_n) * self.block_l * itemsize
        output = self.block_m * self.block_n * itemsize if self.descriptors else 0
        low_rank = (self.block_m + self.block_n) * block_r * (8 if chunks > 1 else itemsize)
        # A chunked U V is a loop of its own, double-buffered in fp32; it reuses the other's memory.
        tiles = max(loop, low_rank) if chunks > 1 else loop + low_rank
        return tiles + output + BARRIER_BYTES


@dataclass(frozen=True)
class AddConfig(Config):
    """``lora_add``."""

    block_m: int = 64
    block_n: int = 64

    rank_blocks = GemmConfig.rank_blocks

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
    max_block_r: int = SHRINK_MAX_BLOCK_R

    def block_r(self, rank: int) -> int:
        """Columns of U a program owns."""
        return padded_rank(rank, self.max_block_r)

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        block_r = self.block_r(rank)
        loop = self.num_stages * (self.block_m + block_r) * self.block_l * itemsize
        return loop + self.block_m * self.block_l * max(itemsize, 4)


@dataclass(frozen=True)
class RankGradConfig(Config):
    """``rank_grad``; ``splits`` of the rows."""

    block_m: int = 32
    block_l: int = 64
    splits: int = 1

    def block_r(self, rank: int) -> int:
        """Rows of the output a program owns."""
        return padded_rank(rank, SHRINK_MAX_BLOCK_R)

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block; U and the output are staged in fp32."""
        block_r = self.block_r(rank)
        loop = self.num_stages * self.block_m * (self.block_l * itemsize + block_r * 4)
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

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block."""
        block_r = self.block_r(rank)
        rows = self.block_m + self.block_n + block_r
        low_rank = (self.block_m + self.block_n) * block_r * itemsize
        return self.num_stages * rows * self.block_l * itemsize + low_rank


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
# AMD: LDS of a workgroup).
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}
DEFAULT_SHARED_BYTES = 65_536  # gfx9, and the least of any GPU that Triton supports
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


# From the largest tile to the smallest; the first that is valid and fills the GPU is taken.
# Compiled without a spill for each architecture named, ranks 8 to 256, dropout on and off.
_AMPERE = (
    GemmConfig(8, 3, block_m=128, block_n=128, block_l=64),
    GemmConfig(4, 4, block_m=64, block_n=128, block_l=32),
    GemmConfig(4, 4, block_m=64, block_n=64, block_l=32),
)
_ADA = (
    GemmConfig(8, 3, block_m=128, block_n=128, block_l=32),
    GemmConfig(4, 3, block_m=64, block_n=128, block_l=32),
    GemmConfig(4, 4, block_m=64, block_n=64, block_l=32),
)
_HOPPER = (
    GemmConfig(8, 3, True, block_m=128, block_n=256, block_l=64, programs=1),
    GemmConfig(8, 4, True, block_m=128, block_n=128, block_l=64, programs=1),
    GemmConfig(4, 4, True, block_m=64, block_n=128, block_l=64, programs=1),
)
_BLACKWELL = (
    *_HOPPER[:2],
    GemmConfig(8, 4, True, block_m=64, block_n=128, block_l=64, programs=1),
)
_CDNA = (
    GemmConfig(8, 2, block_m=128, block_n=128, block_l=32),
    GemmConfig(4, 2, block_m=64, block_n=64, block_l=32),
)
# Clean on every architecture, aligned or not, any rank; fp32 too.
_CONSERVATIVE = (GemmConfig(4, 2, block_m=64, block_n=64, block_l=32),)
_FP32 = (
    GemmConfig(8, 3, block_m=128, block_n=128, block_l=16),
    GemmConfig(4, 2, block_m=64, block_n=64, block_l=16),
)
_INTERPRETER = (GemmConfig(4, 2, True, block_m=64, block_n=64, block_l=64, programs=1),)
GEMM_TABLE = {
    "sm_80": _AMPERE,
    "sm_86": _ADA,
    "sm_89": _ADA,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _ADA,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    "interpreter": _INTERPRETER,
}


def gemm_config(
    target: Target, itemsize: int, M: int, N: int, rank: int, *, aligned: bool
) -> GemmConfig:
    """The tile of ``lora_gemm`` for an ``(M, N)`` output.

    Args:
        aligned: every row starts on 16 bytes, as vector loads and tensor descriptors need; else
            only the conservative tile is clean.
    """
    if target.arch == "interpreter":
        candidates = _INTERPRETER
    elif not aligned:
        candidates = _CONSERVATIVE
    elif itemsize == 4:
        candidates = _FP32
    else:
        candidates = GEMM_TABLE.get(target.arch, _CONSERVATIVE)
    valid = []
    for config in candidates:
        if config.descriptors and not aligned:
            config = replace(config, descriptors=False, programs=0)
        if is_valid(config, target, itemsize, rank):
            valid.append(config)
    # Ties go to the larger tile, which comes first.
    chosen = max(valid or _CONSERVATIVE, key=lambda c: fill(c, target, M, N) * _intensity(c))
    return replace(chosen, programs=target.sms) if chosen.programs else chosen


def fill(config: GemmConfig, target: Target, M: int, N: int) -> float:
    """Share of the GPU's tile slots that do useful work over the waves of an ``(M, N)`` output."""
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    slots = cdiv(tiles, target.sms) * target.sms
    return M * N / (slots * config.block_m * config.block_n)


def _intensity(config: GemmConfig) -> float:
    """Share of a tile's time that is arithmetic, were 16 products a load the balance: a guess."""
    per_load = config.block_m * config.block_n / (config.block_m + config.block_n)
    return per_load / (per_load + 16)


def _fit(config, target: Target, itemsize: int, rank: int):
    """``config`` with less in flight until it is valid; 32 columns are one word of keep bits."""
    while not is_valid(config, target, itemsize, rank):
        if config.num_stages > 2:
            config = replace(config, num_stages=2)
        elif config.block_l > 32:
            config = replace(config, block_l=config.block_l // 2)
        elif config.block_m > MIN_BLOCK_R:
            config = replace(config, block_m=config.block_m // 2)
        else:
            return replace(config, num_stages=1)
    return config


def add_config(target: Target, itemsize: int) -> AddConfig:
    """The tile of ``lora_add``; fp32 dots are FMA loops, and need a smaller one."""
    if target.arch == "interpreter":
        return AddConfig(4, 1, block_m=64, block_n=64)
    if itemsize == 4:
        return AddConfig(4, 1, block_m=32, block_n=32)
    return AddConfig(4, 1, block_m=64, block_n=64)


def shrink_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> ShrinkConfig:
    """The tile and splits of ``shrink``: enough programs to fill the GPU, few partial bytes."""
    if target.arch == "interpreter":
        config = ShrinkConfig(4, 2, describable, block_m=64, block_l=64)
    else:
        block_m = 16 if 16 * target.sms >= M else 32
        block_l = 128 if itemsize == 2 and rank <= 64 else 64
        if not describable:
            block_l = 32  # narrow loads need an address and a mask an element
        config = ShrinkConfig(8 if rank > 64 else 4, 3, block_m=block_m, block_l=block_l)
        if itemsize == 4:
            config = replace(config, max_block_r=128)  # fp32 dots are FMA loops: 256 spills
        config = _fit(config, target, itemsize, rank)
    wanted = cdiv(2 * target.sms, cdiv(M, config.block_m))
    wanted = min(wanted, cdiv(L, 4 * config.block_l))
    # Partials are written and read in fp32: at most a quarter of the bytes of P.
    return replace(config, splits=max(1, min(wanted, itemsize * L // (32 * rank))))


def rank_grad_config(
    target: Target, itemsize: int, M: int, L: int, rank: int, *, describable: bool
) -> RankGradConfig:
    """The tile and splits of ``rank_grad``, by the same two rules as :func:`shrink_config`."""
    if target.arch == "interpreter":
        config = RankGradConfig(4, 2, describable, block_m=64, block_l=64)
    elif itemsize == 4:
        config = RankGradConfig(8 if rank > 64 else 4, 2, block_m=16, block_l=32)
    elif rank > 64:
        # U is staged in fp32: more rows a step, or more columns at rank 256, spill.
        config = RankGradConfig(8, 2, block_m=16, block_l=128 if rank <= 128 else 64)
    elif rank > 32:
        config = RankGradConfig(8, 2, block_m=32, block_l=128)
    else:
        config = RankGradConfig(4, 3, block_m=32, block_l=64)
    config = _fit(config, target, itemsize, rank)
    wanted = min(cdiv(2 * target.sms, cdiv(L, config.block_l)), cdiv(M, 256))
    return replace(config, splits=max(1, min(wanted, itemsize * M // (32 * rank))))


def single_pass_config(
    target: Target, itemsize: int, M: int, rank: int, *, describable: bool
) -> SinglePassConfig:
    """The tile of ``single_pass`` for at most SINGLE_PASS_MAX_ROWS rows."""
    if target.arch == "interpreter":
        return SinglePassConfig(4, 2, describable, block_m=16, block_n=64, block_l=64)
    if itemsize == 4:
        return SinglePassConfig(4, 2, block_m=16, block_n=32, block_l=32)
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    config = SinglePassConfig(4, 3, block_m=block_m, block_n=64, block_l=64)
    return _fit(config, target, itemsize, rank)
