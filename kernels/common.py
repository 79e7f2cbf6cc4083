"""Code shared by the kernels: tile order, keep bits, the low-rank product, partial sums."""

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .config import Config
from .interpreter import INTERPRETED
from .launch import Tile

PARTS_AT_ONCE = tl.constexpr(4)  # partial sums that a program loads at the same time
_LOADED = 64  # their values per thread
_COMPILED = tl.constexpr(not INTERPRETED)
# Numbers per entry of the tables of ``segments.py``: of a block of rows, of an item of rank_grad.
BLOCK_ENTRY = tl.constexpr(3)
ITEM_ENTRY = tl.constexpr(6)
TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def in_vectors(t: torch.Tensor, n: int = 8) -> bool:
    """Whether rows of ``t``, along its unit stride, start and end at multiples of ``n`` elements.

    The base address is not checked: Triton specialises on its alignment by itself.
    """
    if t.stride(1) == 1:
        return t.stride(0) % n == 0 and t.shape[1] % n == 0
    return t.stride(0) == 1 and t.stride(1) % n == 0 and t.shape[0] % n == 0


def vector_of(u: torch.Tensor) -> int:
    """The most elements, 8, 4 or 1, at whose multiples rows of ``u (M,R)`` start and end."""
    return next((n for n in (8, 4) if in_vectors(u, n)), 1)


def members_of(keep_bits: torch.Tensor | None) -> int:
    """The projections of one input whose masks are stacked, ``(n, M, words)``; else 1."""
    return 1 if keep_bits is None or keep_bits.dim() == 2 else keep_bits.shape[0]


def of_segments(t: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """The first matrix of a stack and the distance between its matrices; or a matrix and None."""
    return (t, None) if t.dim() == 2 else (t[0], t.stride(0))


def operand(config: Config, t: torch.Tensor, block: tuple[int, int], transposed: bool = False):
    """The kernel's argument for ``t``: the tensor itself, or a descriptor of it in ``block`` tiles.

    With ``transposed`` the descriptor is of ``tᵀ``.
    """
    return Tile(t, block, transposed) if config.descriptors else t


@triton.jit
def multiple(x, n: tl.constexpr):
    """``x``, a multiple of ``n``, in a form from which the compiler derives that.

    Triton specialises integer arguments on divisibility by 16 only, and ``tl.multiple_of`` has no
    effect on an argument. The launcher must have checked ``x``: if it is not a multiple of ``n``
    the result is wrong.
    """
    return x // n * n


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """The first statement of a kernel that may be launched with :attr:`.Config.pdl`.

    The kernel may have started before earlier ones ended: until they have, it must not read what
    they write, nor write what they read. The next kernel may then start, and waits in turn.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def advance(step: tl.constexpr, stride):
    """``step · stride`` in 64 bits: a view's rows may be 2³¹ / step elements apart."""
    return tl.full((), step, tl.int64) * stride


@triton.jit
def segment_rows(entry_ptr):
    """The segment, as 64 bits, the first row and the end of the rows of a table's entry."""
    return tl.load(entry_ptr).to(tl.int64), tl.load(entry_ptr + 1), tl.load(entry_ptr + 2)


@triton.jit
def grouped_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Map a tile number to (row block, column block).

    Tiles are numbered in groups of GROUP_M row blocks, column block by column block within a group,
    so that programs running at the same time share panels of both operands in the L2 cache.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    tiles_per_group = GROUP_M * num_n
    group = tile // tiles_per_group
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    within = tile % tiles_per_group
    return first_m + within % rows, within // rows


@triton.jit
def load_keep_words(
    keep_bits_ptr,
    stride_keep_m,
    first_m,
    first_n,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile's 32-bit words of keep bits, (BLOCK_M, BLOCK_N / 32); 0 beyond the last row and word.

    Each word is loaded once, for :func:`keep_entries`: one load per bit spills registers on sm_100.
    ``first_n`` and ``BLOCK_N`` are multiples of 32; the row pitch is a multiple of 4 words.
    """
    tl.static_assert(BLOCK_N % 32 == 0, "a tile of keep bits is whole words")
    stride_keep_m = multiple(stride_keep_m, 4)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    # Rows are stored without gaps, so the row pitch is also the number of words per row.
    offs_w = first_n // 32 + tl.arange(0, BLOCK_N // 32)
    return tl.load(
        keep_bits_ptr + offs_m.to(tl.int64)[:, None] * stride_keep_m + offs_w[None, :],
        mask=(offs_m[:, None] < M) & (offs_w[None, :] < stride_keep_m),
        other=0,
    )


@triton.jit
def keep_entries(x, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``x (BLOCK_M, BLOCK_N)`` with zeros where the bit in the 32-bit ``words`` is 0.

    Selected, not multiplied by zero: NaN and infinity at a dropped entry do not count.
    """
    if x.dtype.primitive_bitwidth == 16:
        # Two entries at a time: a predicate per entry takes three times as many instructions.
        low, high = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (BLOCK_M, BLOCK_N // 2, 2)))
        pairs = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
        bits = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 0xFF
        # Twice, 15 places apart: shifted by 2i, bits 0 and 16 are those of entries 2i and 2i + 1.
        bits = tl.reshape(bits | (bits << 15), (BLOCK_M, BLOCK_N // 8))
        bits = bits[:, :, None] >> (2 * tl.arange(0, 4))[None, None, :]
        bits = (bits & 0x10001).to(tl.uint32) * 0xFFFF
        pairs &= tl.reshape(bits, (BLOCK_M, BLOCK_N // 2))
        halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
        return tl.reshape(halves, (BLOCK_M, BLOCK_N)).to(x.dtype, bitcast=True)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0, x, 0.0)


@triton.jit
def _low_rank_pointers(
    u_ptr,
    v_ptr,
    offs_m,
    offs_n,
    offs_r,
    N,
    R,
    stride_um,
    stride_vr,
    stride_vn,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
    """Pointers to a tile of U and one of V; N and R in forms that show their alignment."""
    if ALIGN_U > 1:
        stride_um = multiple(stride_um, ALIGN_U)
        R = multiple(R, ALIGN_U)
    if ALIGN_V:
        if V_TRANSPOSED:
            stride_vn = multiple(stride_vn, 8)
            R = multiple(R, 8)
        else:
            stride_vr = multiple(stride_vr, 8)
            N = multiple(N, 8)
    u_ptrs = u_ptr + offs_m.to(tl.int64)[:, None] * stride_um + offs_r[None, :]
    v_ptrs = (
        v_ptr + offs_r.to(tl.int64)[:, None] * stride_vr + offs_n.to(tl.int64)[None, :] * stride_vn
    )
    return u_ptrs, v_ptrs, N, R


@triton.jit
def load_low_rank(
    u_ptr,
    v_ptr,
    offs_m,
    offs_n,
    first_r,
    M,
    N,
    R,
    stride_um,
    stride_vr,
    stride_vn,
    BLOCK_R: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
    """A tile of U and one of V, of BLOCK_R ranks from ``first_r`` on; zeros outside."""
    offs_r = first_r + tl.arange(0, BLOCK_R)
    u_ptrs, v_ptrs, N, R = _low_rank_pointers(
        u_ptr, v_ptr, offs_m, offs_n, offs_r, N, R, stride_um, stride_vr, stride_vn,
        ALIGN_U, ALIGN_V, V_TRANSPOSED,
    )  # fmt: skip
    u = tl.load(u_ptrs, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R), other=0.0)
    v = tl.load(v_ptrs, mask=(offs_r[:, None] < R) & (offs_n[None, :] < N), other=0.0)
    return u, v


@triton.jit
def add_low_rank(
    acc,
    u_ptr,
    v_ptr,
    offs_m,
    offs_n,
    M,
    N,
    R,
    stride_um,
    stride_vr,
    stride_vn,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``acc + U V`` for one tile, with the rank walked in CHUNKS of BLOCK_R.

    U and V may have any floating dtype; both are cast to DTYPE before the product.
    """
    if CHUNKS == 1:
        u, v = load_low_rank(
            u_ptr, v_ptr, offs_m, offs_n, 0, M, N, R, stride_um, stride_vr, stride_vn,
            BLOCK_R, ALIGN_U, ALIGN_V, V_TRANSPOSED,
        )  # fmt: skip
        # (BLOCK_M, BLOCK_R) @ (BLOCK_R, BLOCK_N)
        acc = tl.dot(u.to(DTYPE), v.to(DTYPE), acc, input_precision=INPUT_PRECISION)
    else:
        offs_r = tl.arange(0, BLOCK_R)
        u_ptrs, v_ptrs, N, R = _low_rank_pointers(
            u_ptr, v_ptr, offs_m, offs_n, offs_r, N, R, stride_um, stride_vr, stride_vn,
            ALIGN_U, ALIGN_V, V_TRANSPOSED,
        )  # fmt: skip
        # Pointers advance: computed from the chunk's number, they take up to 60 registers more.
        for chunk in tl.range(0, CHUNKS, num_stages=2):
            rest = R - chunk * BLOCK_R
            u = tl.load(u_ptrs, mask=(offs_m[:, None] < M) & (offs_r[None, :] < rest), other=0.0)
            v = tl.load(v_ptrs, mask=(offs_r[:, None] < rest) & (offs_n[None, :] < N), other=0.0)
            # (BLOCK_M, BLOCK_R) @ (BLOCK_R, BLOCK_N)
            acc = tl.dot(u.to(DTYPE), v.to(DTYPE), acc, input_precision=INPUT_PRECISION)
            u_ptrs += BLOCK_R
            v_ptrs += advance(BLOCK_R, stride_vr)
    return acc


@triton.jit
def is_last(ticket_ptr, count):
    """Whether this program is the last of ``count`` to call this with the same ticket.

    The ticket must be 0 before, and is 0 after the last call. What any of them stored before is
    visible to the loads of every thread of the last one.
    """
    # Memory order: the stores of all threads of a program happen before its barrier, and the
    # barrier before the one thread's atomic add, which releases them all (release is cumulative).
    # The last add of the chain acquires from each earlier one. Its result reaches the other threads
    # through shared memory and a second barrier, so their loads happen after all those stores.
    if _COMPILED and is_hip():
        # A barrier of AMD's gfx9 does not wait for stores, and the add only for its own wave's.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)", "=v,0,~{memory}", [count], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def sum_parts(part_ptrs, stride, count, mask):
    """The sum of ``count`` fp32 tiles, ``stride`` elements apart, always in the same order."""
    acc = tl.zeros(part_ptrs.shape, tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=PARTS_AT_ONCE, num_stages=1):
        # From the L2 cache: other programs wrote the tiles.
        acc += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        part_ptrs += stride
    return acc


def rows_at_once(config: Config, rank: int) -> int:
    """Rows of a tile for which :func:`sum_parts` has enough loads in flight and does not spill."""
    rows, columns = config.tile(rank)
    return max(1, min(rows, _LOADED * 32 * config.num_warps // (PARTS_AT_ONCE.value * columns)))


def tickets_for(
    config: Config, rows: int, columns: int, rank: int, members: int, like: torch.Tensor
) -> torch.Tensor:
    """Tickets for :func:`is_last`, one per block of ``members`` results ``(rows, columns)``."""
    blocks = members * config.blocks(rows, columns, rank)
    return torch.zeros(blocks, dtype=torch.int32, device=like.device)
