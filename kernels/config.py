"""Launch configurations, and the check that one fits a GPU.

Launchers take an explicit configuration; ``select_config.py`` chooses one for a shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_BLOCK_R = 16  # the smallest inner size of a matrix instruction for half precision
MAX_BLOCK_R = 32  # larger ranks are chunked: at 64, U's fp32 tile spills on sm_80 and sm_90
MAX_WHOLE_R = 64  # the same in lora_add and in a slice of lora_gemm, where few registers are taken
SLICE_COLUMNS = 64  # of lora_gemm with ``overlap``: with 128 columns, rank 16 takes 253 registers
MAX_THIN_BLOCK_R = 256  # in shrink and rank_grad: larger ranks are split over several programs
SINGLE_PASS_MAX_ROWS = 64
SINGLE_PASS_MAX_RANK = 64
THIN_PAIR_MAX_RANK = 32  # its partial sums grow with the rank
BARRIER_BYTES = 256  # barriers of NVIDIA's pipelined copies, in addition to the tiles
TICKETS = 1024  # more than the blocks of a result whose reduction is split to fill a GPU
MIN_BLOCK_ROWS = 16  # the fewest rows of a tile
MIN_SPLIT_ROWS = 256  # of one part of rank_grad
SEGMENT_ROWS = 1024  # of one segment that a program of rank_grad sums: whole blocks of every tile
MASK_VECTOR = 128  # columns per 16 bytes of keep bits
DIGITS = 16  # binary digits of a keep probability, with one random word per digit
# With fewer rows, one partial sum of rank_grad (fp32, written and read) would exceed a quarter of a
# half-precision operand's bytes.
MIN_ROWS_PER_RANK = 16
VECTOR_BYTES = 16  # of vector loads, asynchronous copies and tensor descriptors


def cdiv(a: int, b: int) -> int:
    """``⌈a / b⌉``."""
    return -(-a // b)


def is_aligned(first: int, second: int = 0) -> bool:
    """Whether both numbers of bytes (strides, addresses) are multiples of a vector."""
    return (first | second) % VECTOR_BYTES == 0


def single_pass_applies(M: int, rank: int, masked: str | None) -> bool:
    """Whether ``single_pass`` can compute a direction.

    Args:
        masked: what dropout applies to: "operand" of the reduction, "output", or None.
    """
    return M <= SINGLE_PASS_MAX_ROWS and rank <= SINGLE_PASS_MAX_RANK and masked != "operand"


def rank_grad_applies(M: int, rank: int, *, masked: bool) -> bool:
    """Whether ``rank_grad`` computes a gradient of the adapter; else the vendor's GEMM does."""
    return masked or MIN_ROWS_PER_RANK * rank <= M


def split_evenly(extent: int, splits: int, block: int) -> tuple[int, int]:
    """``(length, number)`` of a reduction's parts, each a whole number of blocks."""
    part = cdiv(cdiv(extent, splits), block) * block
    return part, cdiv(extent, part)


def padded_rank(rank: int, most: int = MAX_BLOCK_R) -> int:
    """The block size for ``rank``: a power of two from MIN_BLOCK_R to ``most``."""
    return min(max(MIN_BLOCK_R, 1 << (rank - 1).bit_length()), most)


@dataclass(frozen=True)
class Config:
    """The fields that every kernel's configuration has.

    Attributes:
        pdl: programmatic dependent launch: the kernel starts while the previous one still ends.
            Off in all tables, since nobody has measured it; so is :attr:`AddConfig.backwards`.
    """

    num_warps: int
    num_stages: int
    descriptors: bool = False
    pdl: bool = field(default=False, kw_only=True)
    splits = 1  # parts of the reduction, each computed by its own programs

    def tile(self, rank: int) -> tuple[int, int]:
        """Rows and columns of the result that one program computes."""
        raise NotImplementedError

    def blocks(self, rows: int, columns: int, rank: int) -> int:
        """Tiles of a ``(rows, columns)`` result; a split one needs as many tickets."""
        block_rows, block_columns = self.tile(rank)
        return cdiv(rows, block_rows) * cdiv(columns, block_columns)

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"launch_pdl": True} if self.pdl else options  # AMD's has no such option


@dataclass(frozen=True)
class GemmConfig(Config):
    """``lora_gemm``: one program per tile if ``programs`` is 0, else that many persistent ones.

    With ``overlap``, which needs descriptors, U V comes after the loop over L, in slices of
    columns, while the next tile's first copies are in flight.

    Attributes:
        asynchronous: whether a product still reads its buffer during the next step, as warp groups'
            do; with descriptors it always does.
    """

    block_m: int = 64
    block_n: int = 64
    block_l: int = 32
    group_m: int = 8
    programs: int = 0
    overlap: bool = False
    asynchronous: bool = False

    @property
    def slices(self) -> int:
        """Parts of a tile's columns that are computed and stored one after the other."""
        return max(1, self.block_n // SLICE_COLUMNS) if self.overlap else 1

    def rank_blocks(self, rank: int) -> tuple[int, int]:
        """``(block size, number of blocks)`` that cover ``rank``."""
        whole = self.overlap and rank <= MAX_WHOLE_R
        block = padded_rank(rank, MAX_WHOLE_R if whole else MAX_BLOCK_R)
        return block, cdiv(rank, block)

    def tile(self, rank: int) -> tuple[int, int]:
        """See :class:`Config`."""
        return self.block_m, self.block_n

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound on the bytes of shared memory that a thread block's tiles take."""
        block_r, chunks = self.rank_blocks(rank)
        is_read_late = self.descriptors or self.asynchronous
        buffers = self.num_stages if is_read_late else max(1, self.num_stages - 1)
        loop = buffers * (self.block_m + self.block_n) * self.block_l * itemsize
        columns = self.block_n // self.slices
        output = self.block_m * columns * itemsize if self.descriptors else 0
        if self.overlap:
            # The next tiles of U and V are loaded early: of several, up to three are there at once.
            tiles = (1, 2) if chunks == 1 else (3, 3)
            low_rank = (tiles[0] * self.block_m + tiles[1] * columns) * block_r * itemsize
            zeros = (self.block_m + self.block_n) * MIN_BLOCK_R * itemsize
            return loop + low_rank + output + zeros
        if chunks > 1:
            # The loop over the rank reuses the main loop's memory. It stages U and V in fp32, and
            # V once more in the dtype of the product.
            staged = (self.block_m + self.block_n) * 4 + self.block_n * itemsize
            return max(loop, staged * block_r) + output
        return loop + (self.block_m + self.block_n) * block_r * itemsize + output


@dataclass(frozen=True)
class AddConfig(Config):
    """``lora_add``.

    Attributes:
        whole_r: a rank up to this is one block.
        backwards: walk the rows from the last to the first. The last rows of a product before it,
            and the first rows for one after it, may then still be in the cache.
    """

    block_m: int = 64
    block_n: int = 64
    whole_r: int = MAX_WHOLE_R
    backwards: bool = field(default=False, kw_only=True)

    def rank_blocks(self, rank: int) -> tuple[int, int]:
        """``(block size, number of blocks)`` that cover ``rank``."""
        block = padded_rank(rank, self.whole_r if rank <= self.whole_r else MAX_BLOCK_R)
        return block, cdiv(rank, block)

    tile = GemmConfig.tile

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound on the bytes of shared memory that a thread block's tiles take."""
        block_r, chunks = self.rank_blocks(rank)
        buffers = min(chunks, 2)
        staged = buffers * (self.block_m + self.block_n) * block_r * 4
        return max(staged, self.block_m * self.block_n * 4)


@dataclass(frozen=True)
class GatedConfig(Config):
    """``gated`` and ``gated_backward``, whose low-rank product is that of :class:`AddConfig`."""

    block_m: int = 32
    block_n: int = 64
    whole_r: int = MAX_BLOCK_R

    rank_blocks = AddConfig.rank_blocks
    tile = GemmConfig.tile

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """As for :class:`AddConfig`; gate, up and dh may change their layout there as well."""
        return max(AddConfig.shared_bytes(self, itemsize, rank), 12 * self.block_m * self.block_n)


@dataclass(frozen=True)
class ShrinkConfig(Config):
    """``shrink``; ``splits`` divides the contraction."""

    block_m: int = 32
    block_l: int = 64
    splits: int = 1
    max_block_r: int = MAX_THIN_BLOCK_R

    def block_r(self, rank: int) -> int:
        """Columns of U that one program computes."""
        return padded_rank(rank, self.max_block_r)

    @property
    def makes_mask(self) -> bool:
        """Whether ``shrink`` computes the mask; else ``dropout_mask`` does, in another launch.

        A step must be whole 16-byte vectors of keep bits, to which rows of the mask are padded.
        """
        return self.block_l % MASK_VECTOR == 0

    def tile(self, rank: int) -> tuple[int, int]:
        """See :class:`Config`."""
        return self.block_m, self.block_r(rank)

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound on the bytes of shared memory that a thread block's tiles take."""
        # Without dropout the product reads P there. With dropout a copied step is masked in
        # registers, so there is a buffer less, but the masked step changes its layout there.
        rows = max(2, self.num_stages) * self.block_m + self.num_stages * self.block_r(rank)
        keep_bits = self.num_stages * self.block_m * cdiv(self.block_l, 32) * 4
        # Partial sums of a split change their layout there, in fp32.
        return max(
            rows * self.block_l * itemsize + keep_bits, self.block_m * self.block_r(rank) * 4
        )


@dataclass(frozen=True)
class RankGradConfig(Config):
    """``rank_grad``; ``splits`` divides the rows."""

    block_m: int = 32
    block_l: int = 64
    splits: int = 1
    max_block_r: int = MAX_THIN_BLOCK_R

    def block_r(self, rank: int) -> int:
        """Rows of the output that one program computes."""
        return padded_rank(rank, self.max_block_r)

    def tile(self, rank: int) -> tuple[int, int]:
        """See :class:`Config`."""
        return self.block_r(rank), self.block_l

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound, as in :class:`GemmConfig`; U and the output are staged in fp32."""
        block_r = self.block_r(rank)
        loop = self.num_stages * self.block_m * (self.block_l * itemsize + block_r * 4)
        loop += self.block_m * (self.block_l * 4 + block_r * itemsize)
        return max(loop, block_r * self.block_l * 4)


@dataclass(frozen=True)
class ThinPairConfig(Config):
    """``thin_pair``; ``splits`` divides the rows."""

    block_m: int = 32
    block_l: int = 256
    splits: int = 1

    def block_r(self, rank: int) -> int:
        """The whole rank, in one block."""
        return padded_rank(rank, THIN_PAIR_MAX_RANK)

    def tile(self, rank: int) -> tuple[int, int]:
        """See :class:`Config`; of ``O``."""
        return self.block_l, self.block_r(rank)

    def shared_bytes(self, itemsize: int, rank: int) -> int:
        """Upper bound on the bytes of shared memory that a thread block's tiles take."""
        block_r = self.block_r(rank)
        step = self.block_m * (self.block_l + block_r) * itemsize
        loop = self.num_stages * step + self.block_l * block_r * itemsize
        return max(loop + self.block_m * block_r * 4, self.block_l * block_r * 4)


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
        """Upper bound on the bytes of shared memory that a thread block's tiles take."""
        block_r = self.block_r(rank)
        rows = self.block_m + self.block_n + block_r
        low_rank = (self.block_m + self.block_n) * block_r * itemsize
        return self.num_stages * rows * self.block_l * itemsize + low_rank


@dataclass(frozen=True)
class Target:
    """The properties of a GPU that the choice of a configuration depends on."""

    arch: str  # "sm_90", "gfx942", or "interpreter"
    sms: int
    shared_bytes: int  # the most that one thread block may use

    @property
    def descriptors(self) -> bool:
        """Whether hardware copies the tiles of tensor descriptors; True for the interpreter."""
        return self.arch in ("sm_90", "sm_100", "sm_120", "interpreter")

    @property
    def dependent_launches(self) -> bool:
        """Whether kernels can be launched with ``pdl``."""
        return self.arch in ("sm_90", "sm_100", "sm_120")


def is_valid(config: Config, target: Target, itemsize: int, rank: int) -> bool:
    """Whether ``config`` fits ``target``: the one predicate of tables, tile search and tests."""
    if config.descriptors and not target.descriptors:
        return False
    if config.pdl and not target.dependent_launches:
        return False
    if isinstance(config, SinglePassConfig) and rank > SINGLE_PASS_MAX_RANK:
        return False
    beside = BARRIER_BYTES if target.arch.startswith("sm_") else 0
    return config.shared_bytes(itemsize, rank) + beside <= target.shared_bytes
