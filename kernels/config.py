"""Launch configurations: what they are, and when one is valid.

A launcher takes an explicit one; ``select_config.py`` chooses which one a shape gets.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_BLOCK_R = 16  # the smallest inner size of a matrix instruction for half precision
MAX_BLOCK_R = 32  # larger ranks are chunked: at 64, U's fp32 tile spills on sm_80 and sm_90
MAX_THIN_BLOCK_R = 256  # of shrink and rank_grad: larger ranks are several programs
SINGLE_PASS_MAX_ROWS = 64
SINGLE_PASS_MAX_RANK = 64
BARRIER_BYTES = 256  # of NVIDIA's pipelined copies, beside the tiles
DIGITS = 16  # binary digits of a keep probability, a random word each
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
    splits = 1  # of the contraction

    def tile(self, rank: int) -> tuple[int, int]:
        """Rows and columns of the result that a program owns."""
        raise NotImplementedError

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

    def tile(self, rank: int) -> tuple[int, int]:
        """As of :class:`Config`."""
        return self.block_m, self.block_n

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block's tiles."""
        block_r, chunks = self.rank_blocks(rank)
        # A warp-group product, behind descriptors, still reads the step before.
        buffers = self.num_stages if self.descriptors else max(1, self.num_stages - 1)
        loop = buffers * (self.block_m + self.block_n) * self.block_l * itemsize
        output = self.block_m * self.block_n * itemsize if self.descriptors else 0
        if chunks > 1:
            # A loop of its own in the other's memory: U and V in fp32, V once more in its dtype.
            staged = (self.block_m + self.block_n) * 4 + self.block_n * itemsize
            return max(loop, staged * block_r) + output
        return loop + (self.block_m + self.block_n) * block_r * itemsize + output


@dataclass(frozen=True)
class AddConfig(Config):
    """``lora_add``."""

    block_m: int = 64
    block_n: int = 64

    rank_blocks = GemmConfig.rank_blocks
    tile = GemmConfig.tile

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound of the shared memory of a block's tiles."""
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
        """Upper bound of the shared memory of a block's tiles."""
        block_r = self.block_r(rank)
        loop = self.num_stages * (self.block_m + block_r) * self.block_l * itemsize
        keep_bits = self.num_stages * self.block_m * cdiv(self.block_l, 32) * 4
        return loop + keep_bits + self.block_m * self.block_l * max(itemsize, 4)


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
        loop = self.num_stages * self.block_m * (self.block_l * itemsize + block_r * 4)
        loop += self.block_m * (self.block_l * 4 + block_r * itemsize)
        return max(loop, block_r * self.block_l * 4)


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
        """Upper bound of the shared memory of a block's tiles."""
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


def is_valid(config: Config, target: Target, itemsize: int, rank: int) -> bool:
    """The one rule every table, tuner and test asks: does ``config`` fit ``target``?"""
    if config.descriptors and not target.descriptors:
        return False
    if isinstance(config, SinglePassConfig) and rank > SINGLE_PASS_MAX_RANK:
        return False
    beside = BARRIER_BYTES if target.arch.startswith("sm_") else 0
    return config.shared_bytes(itemsize, rank) + beside <= target.shared_bytes
