"""The frozen product, with the low-rank product fused into it.

    O = P Q + s · D(U V) + bias        P (M,L)   Q (L,N)   U (M,R)   V (R,N)   O (M,N)

Forward: ``y`` from P = x, Q = Wᵀ, U = S, V = Bᵀ. Backward: ``dx`` from P = dY, Q = W, U = G, V = A
and the keep bits, without s. Scale and mask act on U V only: it comes before the loop over L, or
with ``GemmConfig.overlap`` after it, in :mod:`.lora_gemm_overlap`.

For rows sorted into segments, each with its own matrices, scale and bias, or one of these for all:

    O_g = P_g Q_g + s_g · D(U_g V_g) + bias_g        Q (G,L,N)   V (G,R,N)
"""

import torch
import triton
import triton.language as tl

from .common import (
    BLOCK_ENTRY,
    TL_DTYPE,
    add_low_rank,
    advance,
    grouped_tile,
    in_vectors,
    keep_entries,
    load_keep_words,
    multiple,
    of_segments,
    operand,
    segment_rows,
    vector_of,
    wait_for_previous,
)
from .config import GemmConfig, cdiv
from .launch import Arguments, launch
from .lora_gemm_overlap import gemm_tiles


@triton.jit
def _gemm_tile(
    first_m,
    tile_n,
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
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
):
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
    segments_ptr,
    inv_keep,
    M,
    N,
    L,
    R,
    stride_om,
    stride_pm,
    stride_qg,
    stride_ql,
    stride_qn,
    stride_um,
    stride_vg,
    stride_vr,
    stride_vn,
    stride_keep_m,
    stride_bias_g,
    DTYPE: tl.constexpr,
    SEGMENTS: tl.constexpr,
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
    tl.static_assert(
        not SEGMENTS or not (USE_DESC or PERSISTENT),
        "a descriptor's block would be stored beyond the end of a segment",
    )
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
        gemm_tiles(
            o_ptr, p_ptr, q_ptr, u_ptr, v_ptr, keep_bits_ptr, bias_ptr, factor, M, N, L, R,
            stride_um, stride_vr, stride_vn, stride_keep_m, DTYPE, HAS_BIAS, HAS_DROPOUT,
            Q_TRANSPOSED, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_L, SLICES, BLOCK_R, CHUNKS,
            GROUP_M, ALIGN_U, ALIGN_V, V_TRANSPOSED,
        )  # fmt: skip
    elif PERSISTENT:
        # A fixed number of programs (the tables have one per SM) walk the tiles a grid apart.
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            _gemm_tile(
                tile_m * BLOCK_M, tile_n, o_ptr, p_ptr, q_ptr, u_ptr, v_ptr, keep_bits_ptr,
                bias_ptr, scale_ptr, inv_keep, M, N, L, R, stride_om, stride_pm, stride_ql,
                stride_qn, stride_um, stride_vr, stride_vn, stride_keep_m, DTYPE, HAS_BIAS,
                HAS_DROPOUT, HAS_SCALE, EVEN_L, USE_DESC, Q_TRANSPOSED, INPUT_PRECISION, BLOCK_M,
                BLOCK_N, BLOCK_L, BLOCK_R, CHUNKS, ALIGN_U, ALIGN_V, V_TRANSPOSED,
            )  # fmt: skip
    else:
        tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m = tile_m * BLOCK_M
        if SEGMENTS:
            segment, first_m, M = segment_rows(segments_ptr + tile_m * BLOCK_ENTRY)
            if first_m >= M:  # the table may have more entries than there are blocks
                return
            if ALIGN_Q:
                stride_qg = multiple(stride_qg, 8)
            if ALIGN_V:
                stride_vg = multiple(stride_vg, 8)
            q_ptr += segment * stride_qg
            v_ptr += segment * stride_vg
            bias_ptr += segment * stride_bias_g
            scale_ptr += segment
        _gemm_tile(
            first_m, tile_n, o_ptr, p_ptr, q_ptr, u_ptr, v_ptr, keep_bits_ptr, bias_ptr, scale_ptr,
            inv_keep, M, N, L, R, stride_om, stride_pm, stride_ql, stride_qn, stride_um, stride_vr,
            stride_vn, stride_keep_m, DTYPE, HAS_BIAS, HAS_DROPOUT, HAS_SCALE, EVEN_L, USE_DESC,
            Q_TRANSPOSED, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_R, CHUNKS,
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
    segments: torch.Tensor | None = None,
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
        segments: the table of :meth:`.segments.Segments.blocks` for ``config.block_m``; then v is
            ``(G, R, N)`` and the scale ``(G,)``, contiguous; q may be ``(G, L, N)`` and the bias
            ``(G, N)``. Rows of no segment are not written. The config has no descriptors and no
            ``programs``. None: all rows have one v.
    """
    tensors = o, p, q, u, v, keep_bits, bias, scale, segments
    launch(_lora_gemm, _arguments, config, tensors, (float(inv_keep),), input_precision)


def _arguments(
    config, o, p, q, u, v, keep_bits, bias, scale, segments, input_precision: str
) -> Arguments:
    (M, L), N, R = p.shape, q.shape[-1], u.shape[1]
    q_of_one, stride_qg = of_segments(q)
    v_of_one, stride_vg = of_segments(v)
    stride_bias_g = None
    if segments is not None:
        M = segments.shape[0] * config.block_m  # a block for each entry of the table
        stride_qg = stride_qg or 0
        stride_bias_g = 0 if bias is None or bias.dim() == 1 else bias.stride(0)
    transposed = q_of_one.stride(0) == 1 and q_of_one.stride(1) != 1
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
            segments,
        ),
        numbers=(
            M,
            N,
            L,
            R,
            o.stride(0),
            p.stride(0),
            stride_qg,
            *q_of_one.stride(),
            u.stride(0),
            stride_vg,
            *v_of_one.stride(),
            0 if keep_bits is None else keep_bits.stride(0),
            stride_bias_g,
        ),
        constants={
            "DTYPE": TL_DTYPE[p.dtype],
            "SEGMENTS": segments is not None,
            "HAS_BIAS": bias is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "HAS_SCALE": scale is not None,
            "EVEN_L": L % block_l == 0,
            "ALIGN_O": in_vectors(o),
            "ALIGN_P": in_vectors(p),
            "ALIGN_Q": in_vectors(q_of_one) and (stride_qg or 0) % 8 == 0,
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
            "ALIGN_V": in_vectors(v_of_one) and (stride_vg or 0) % 8 == 0,
            "V_TRANSPOSED": v_of_one.stride(1) != 1,
            "PERSISTENT": config.programs > 0,
            "OVERLAP": config.overlap,
            "SLICES": config.slices,
            "PDL": config.pdl,
        },
        options=config.options,
    )
