"""The frozen product, with the low-rank product fused into it.

    O = P Q + s · D(U V) + bias        P (M,L)   Q (L,N)   U (M,R)   V (R,N)   O (M,N)

Forward: ``y`` from P = x, Q = Wᵀ, U = S, V = Bᵀ. Backward: ``dx`` from P = dY, Q = W, U = G, V = A
and the keep bits, without s. Scale and mask act on U V only: it comes before the loop over L, or
after it in an accumulator of its own (``GemmConfig.overlap``).
"""

import torch
import triton
import triton.language as tl

from .common import (
    TL_DTYPE,
    add_low_rank,
    advance,
    grouped_tile,
    in_vectors,
    keep_entries,
    load_keep_words,
    load_low_rank,
    multiple,
    operand,
    vector_of,
    wait_for_previous,
)
from .config import GemmConfig, cdiv
from .launch import Arguments, launch


@triton.jit
def _gemm_tile(
    tile,
    o_ptr,
    p_ptr,
    q_ptr,
    u_ptr,
    v_ptr,
    keep_bits_ptr,
    bias_ptr,
    scale_ptr,
    inv_keep,
    M,
    N,
    L,
    R,
    stride_om,
    stride_pm,
    stride_ql,
    stride_qn,
    stride_um,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_L: tl.constexpr,
    USE_DESC: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m = tile_m * BLOCK_M
    first_n = tile_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    rows = offs_m[:, None] < M
    cols = offs_n[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The scale and the mask apply to U V only: it comes before the accumulator holds anything else.
    acc = add_low_rank(
        acc, u_ptr, v_ptr, offs_m, offs_n, M, N, R, stride_um, stride_vr, stride_vn,
        DTYPE, BLOCK_R, CHUNKS, ALIGN_U, ALIGN_V, V_TRANSPOSED, INPUT_PRECISION,
    )  # fmt: skip
    if HAS_SCALE:
        acc *= tl.load(scale_ptr).to(tl.float32)
    if HAS_DROPOUT:
        words = load_keep_words(keep_bits_ptr, stride_keep_m, first_m, first_n, M, BLOCK_M, BLOCK_N)
        acc = keep_entries(acc * inv_keep, words, BLOCK_M, BLOCK_N)
    if USE_DESC:
        # No masks: descriptors load zeros outside the tensor, and do not store there.
        for start in range(0, L, BLOCK_L):
            p = p_ptr.load([first_m, start])
            if Q_TRANSPOSED:
                q = q_ptr.load([first_n, start]).T
            else:
                q = q_ptr.load([start, first_n])
            # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_N)
            acc = tl.dot(p, q, acc, input_precision=INPUT_PRECISION)
    else:
        offs_l = tl.arange(0, BLOCK_L)
        # Offsets along strides are 64-bit: large matrices exceed 2³¹ elements.
        p_ptrs = p_ptr + offs_m.to(tl.int64)[:, None] * stride_pm + offs_l[None, :]
        if Q_TRANSPOSED:
            q_ptrs = q_ptr + offs_l[:, None] + offs_n.to(tl.int64)[None, :] * stride_qn
        else:
            q_ptrs = q_ptr + offs_l.to(tl.int64)[:, None] * stride_ql + offs_n[None, :]
        for start in range(0, L, BLOCK_L):
            if EVEN_L:
                p = tl.load(p_ptrs, mask=rows, other=0.0)
                q = tl.load(q_ptrs, mask=cols, other=0.0)
            else:
                rest = L - start
                p = tl.load(p_ptrs, mask=rows & (offs_l[None, :] < rest), other=0.0)
                q = tl.load(q_ptrs, mask=(offs_l[:, None] < rest) & cols, other=0.0)
            # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_N)
            acc = tl.dot(p, q, acc, input_precision=INPUT_PRECISION)
            p_ptrs += BLOCK_L
            if Q_TRANSPOSED:
                q_ptrs += BLOCK_L
            else:
                q_ptrs += advance(BLOCK_L, stride_ql)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if USE_DESC:
        o_ptr.store([first_m, first_n], acc.to(DTYPE))
    else:
        o_ptrs = o_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :]
        tl.store(o_ptrs, acc.to(DTYPE), mask=rows & cols)


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
def _gemm_tiles(
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


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M"])
def _lora_gemm(
    o_ptr,
    p_ptr,
    q_ptr,
    u_ptr,
    v_ptr,
    keep_bits_ptr,
    bias_ptr,
    scale_ptr,
    inv_keep,
    M,
    N,
    L,
    R,
    stride_om,
    stride_pm,
    stride_ql,
    stride_qn,
    stride_um,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_L: tl.constexpr,
    ALIGN_O: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    USE_DESC: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    OVERLAP: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    # Multiples of 8 half-precision elements are 16 bytes: see :func:`.common.multiple`.
    if ALIGN_O:
        stride_om = multiple(stride_om, 8)
        N = multiple(N, 8)
    if ALIGN_P:
        stride_pm = multiple(stride_pm, 8)
        L = multiple(L, 8)
    if ALIGN_Q:
        if Q_TRANSPOSED:
            stride_qn = multiple(stride_qn, 8)
        else:
            stride_ql = multiple(stride_ql, 8)
    if OVERLAP:
        factor = inv_keep
        if HAS_SCALE:
            factor *= tl.load(scale_ptr).to(tl.float32)
        _gemm_tiles(
            o_ptr, p_ptr, q_ptr, u_ptr, v_ptr, keep_bits_ptr, bias_ptr, factor, M, N, L, R,
            stride_um, stride_vr, stride_vn, stride_keep_m, DTYPE, HAS_BIAS, HAS_DROPOUT,
            Q_TRANSPOSED, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_L, SLICES, BLOCK_R, CHUNKS,
            GROUP_M, ALIGN_U, ALIGN_V, V_TRANSPOSED,
        )  # fmt: skip
    elif PERSISTENT:
        # A fixed number of programs (the tables have one per SM) walk the tiles a grid apart.
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _gemm_tile(
                tile, o_ptr, p_ptr, q_ptr, u_ptr, v_ptr, keep_bits_ptr, bias_ptr, scale_ptr,
                inv_keep, M, N, L, R, stride_om, stride_pm, stride_ql, stride_qn, stride_um,
                stride_vr, stride_vn, stride_keep_m, DTYPE, HAS_BIAS, HAS_DROPOUT, HAS_SCALE,
                EVEN_L, USE_DESC, Q_TRANSPOSED, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_R,
                CHUNKS, GROUP_M, ALIGN_U, ALIGN_V, V_TRANSPOSED,
            )  # fmt: skip
    else:
        _gemm_tile(
            tl.program_id(0), o_ptr, p_ptr, q_ptr, u_ptr, v_ptr, keep_bits_ptr, bias_ptr, scale_ptr,
            inv_keep, M, N, L, R, stride_om, stride_pm, stride_ql, stride_qn, stride_um, stride_vr,
            stride_vn, stride_keep_m, DTYPE, HAS_BIAS, HAS_DROPOUT, HAS_SCALE, EVEN_L, USE_DESC,
            Q_TRANSPOSED, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_R, CHUNKS, GROUP_M,
            ALIGN_U, ALIGN_V, V_TRANSPOSED,
        )  # fmt: skip


def lora_gemm(
    o: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor | None,
    config: GemmConfig,
    *,
    bias: torch.Tensor | None = None,
    keep_bits: torch.Tensor | None = None,
    inv_keep: float = 1.0,
    input_precision: str = "ieee",
) -> None:
    """Write ``o = p q + scale · D(u v) + bias``.

    Args:
        o: ``(M, N)`` in p's dtype, inner stride 1.
        p: ``(M, L)``, inner stride 1.
        q: ``(L, N)`` in p's dtype, one of its strides 1.
        u: ``(M, R)``, inner stride 1, any floating dtype; cast to p's.
        v: ``(R, N)``, any strides and floating dtype; cast to p's.
        scale: 0-d tensor, read on the device, or None for 1.
        bias: ``(N,)``, contiguous, any floating dtype, or None.
        keep_bits: packed mask of ``u v``, int32 ``(M, words)``, or None.
        inv_keep: factor of the kept entries of ``u v``.
        input_precision: of fp32 products, "ieee" or "tf32".
    """
    tensors = o, p, q, u, v, keep_bits, bias, scale
    launch(_lora_gemm, _arguments, config, tensors, (float(inv_keep),), input_precision)


def _arguments(config, o, p, q, u, v, keep_bits, bias, scale, input_precision: str) -> Arguments:
    (M, L), N, R = p.shape, q.shape[1], u.shape[1]
    transposed = q.stride(0) == 1 and q.stride(1) != 1
    block_m, block_n, block_l = config.block_m, config.block_n, config.block_l
    block_q = (block_n, block_l) if transposed else (block_l, block_n)
    block_r, chunks = config.rank_blocks(R)
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    return Arguments(
        grid=(min(tiles, config.programs) if config.programs else tiles,),
        operands=(
            operand(config, o, (block_m, block_n // config.slices)),
            operand(config, p, (block_m, block_l)),
            operand(config, q, block_q, transposed),
            u,
            v,
            u if keep_bits is None else keep_bits,
            u if bias is None else bias,
            u if scale is None else scale,
        ),
        numbers=(
            M,
            N,
            L,
            R,
            o.stride(0),
            p.stride(0),
            *q.stride(),
            u.stride(0),
            *v.stride(),
            0 if keep_bits is None else keep_bits.stride(0),
        ),
        constants={
            "DTYPE": TL_DTYPE[p.dtype],
            "HAS_BIAS": bias is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "HAS_SCALE": scale is not None,
            "EVEN_L": L % block_l == 0,
            "ALIGN_O": in_vectors(o),
            "ALIGN_P": in_vectors(p),
            "ALIGN_Q": in_vectors(q),
            "USE_DESC": config.descriptors,
            "Q_TRANSPOSED": transposed,
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_L": block_l,
            "BLOCK_R": block_r,
            "CHUNKS": chunks,
            "GROUP_M": config.group_m,
            "ALIGN_U": vector_of(u),
            "ALIGN_V": in_vectors(v),
            "V_TRANSPOSED": v.stride(1) != 1,
            "PERSISTENT": config.programs > 0,
            "OVERLAP": config.overlap,
            "SLICES": config.slices,
            "PDL": config.pdl,
        },
        options=config.options,
    )
