"""The loop of :mod:`.lora_gemm` in which a tile is finished while the next one is loaded.

    O = P Q + f · D(U V) + bias        f the scale and the factor of kept entries

It needs tensor descriptors. U V comes after the loop over L, in slices of columns that have an
accumulator of their own.
"""

import triton
import triton.language as tl

from .common import grouped_tile, keep_entries, load_keep_words, load_low_rank


@triton.jit
def _halves(acc):
    """The left and the right half of the columns of ``acc``."""
    return tl.split(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)).permute(0, 2, 1))


@triton.jit
def _load_bias(bias_ptr, first_n, N, BLOCK_N: tl.constexpr):
    offs_n = first_n + tl.arange(0, BLOCK_N)
    return tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)


@triton.jit
def _finish_tile(
    acc,
    first_m,
    first_n,
    o_ptr,
    u_ptr,
    v_ptr,
    keep_bits_ptr,
    bias_ptr,
    factor,
    M,
    N,
    R,
    stride_um,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
    """Store ``acc + factor · D(U V) + bias`` in SLICES slices of columns.

    A slice's product needs few registers beside ``acc``. Its operands are loaded while the slice
    before it is computed, those of the first slice while the last products of ``acc`` run.
    """
    COLUMNS: tl.constexpr = BLOCK_N // SLICES
    offs_m = first_m + tl.arange(0, BLOCK_M)
    u, v = load_low_rank(
        u_ptr, v_ptr, offs_m, first_n + tl.arange(0, COLUMNS), 0, M, N, R, stride_um, stride_vr,
        stride_vn, BLOCK_R, ALIGN_U, ALIGN_V, V_TRANSPOSED,
    )  # fmt: skip
    if HAS_DROPOUT:
        words = load_keep_words(keep_bits_ptr, stride_keep_m, first_m, first_n, M, BLOCK_M, COLUMNS)
    if HAS_BIAS:
        bias = _load_bias(bias_ptr, first_n, N, COLUMNS)
    if SLICES == 1:
        parts = (acc,)
    elif SLICES == 2:
        parts = _halves(acc)
    else:
        tl.static_assert(SLICES == 4, "a tile has 1, 2 or 4 slices")
        left, right = _halves(acc)
        parts = _halves(left) + _halves(right)
    # The loops are static: a loop here would keep the compiler from pipelining the main loop.
    for i in tl.static_range(SLICES):
        low_rank = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        if i < SLICES - 1:
            next_n = first_n + (i + 1) * COLUMNS
            if HAS_DROPOUT:
                next_words = load_keep_words(
                    keep_bits_ptr, stride_keep_m, first_m, next_n, M, BLOCK_M, COLUMNS
                )
            if HAS_BIAS:
                next_bias = _load_bias(bias_ptr, next_n, N, COLUMNS)
        for chunk in tl.static_range(CHUNKS):
            if i < SLICES - 1 or chunk < CHUNKS - 1:
                offs_n = first_n + (i + (chunk + 1) // CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
                next_u, next_v = load_low_rank(
                    u_ptr, v_ptr, offs_m, offs_n, (chunk + 1) % CHUNKS * BLOCK_R, M, N, R,
                    stride_um, stride_vr, stride_vn, BLOCK_R, ALIGN_U, ALIGN_V, V_TRANSPOSED,
                )  # fmt: skip
            # (BLOCK_M, BLOCK_R) @ (BLOCK_R, COLUMNS)
            low_rank = tl.dot(u.to(DTYPE), v.to(DTYPE), low_rank, input_precision=INPUT_PRECISION)
            if i < SLICES - 1 or chunk < CHUNKS - 1:
                v = next_v
                if CHUNKS > 1:
                    u = next_u
        # Without a factor the compiler would continue the sum in the registers of ``acc``: PTX
        # assembler of Triton 3.6 then waits for every single matrix instruction of the main loop.
        low_rank *= factor
        if HAS_DROPOUT:
            low_rank = keep_entries(low_rank, words, BLOCK_M, COLUMNS)
        if HAS_BIAS:
            low_rank += bias[None, :]
        o_ptr.store([first_m, first_n + i * COLUMNS], (parts[i] + low_rank).to(DTYPE))
        if i < SLICES - 1:
            if HAS_DROPOUT:
                words = next_words
            if HAS_BIAS:
                bias = next_bias


@triton.jit
def gemm_tiles(
    o_ptr,
    p_ptr,
    q_ptr,
    u_ptr,
    v_ptr,
    keep_bits_ptr,
    bias_ptr,
    factor,
    M,
    N,
    L,
    R,
    stride_um,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
    """All tiles of a program in one loop over their steps.

    The first copies of a tile are thereby in flight while the tile before it is finished.
    """
    programs = tl.num_programs(0)
    tile = tl.program_id(0) - programs
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) - tl.program_id(0)
    steps = tl.cdiv(L, BLOCK_L)
    step = -1
    first_m = 0
    first_n = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(tl.cdiv(tiles, programs) * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        # Copies are issued some steps ahead: what they depend on must not depend on the product.
        if step == 0:
            tile += programs
            tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            first_m = tile_m * BLOCK_M
            first_n = tile_n * BLOCK_N
        # No masks: descriptors load zeros outside the tensor, and do not store there.
        p = p_ptr.load([first_m, step * BLOCK_L])
        if Q_TRANSPOSED:
            q = q_ptr.load([first_n, step * BLOCK_L]).T
        else:
            q = q_ptr.load([step * BLOCK_L, first_n])
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_N)
        acc = tl.dot(p, q, acc, input_precision=INPUT_PRECISION)
        if step == steps - 1:
            _finish_tile(
                acc, first_m, first_n, o_ptr, u_ptr, v_ptr, keep_bits_ptr, bias_ptr, factor, M, N,
                R, stride_um, stride_vr, stride_vn, stride_keep_m, DTYPE, HAS_BIAS, HAS_DROPOUT,
                INPUT_PRECISION, BLOCK_M, BLOCK_N, SLICES, BLOCK_R, CHUNKS, ALIGN_U, ALIGN_V,
                V_TRANSPOSED,
            )  # fmt: skip
            # The zeros of the next tile, from a matrix instruction: where anything else writes the
            # accumulator, the PTX assembler makes the main loop wait for every matrix instruction.
            # (BLOCK_M, 16) @ (16, BLOCK_N)
            acc = tl.dot(
                tl.zeros((BLOCK_M, 16), DTYPE),
                tl.zeros((16, BLOCK_N), DTYPE),
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                input_precision=INPUT_PRECISION,
            )
