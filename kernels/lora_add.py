"""The low-rank product added to a given base.

    O = base + s · D(U V) + bias        U (M,R)   V (R,N)   O and base (M,N)

Used in place after the vendor's GEMM: in forward with U = S, V = Bᵀ, in backward with U = G, V = A,
the keep bits and no s. Used out of place if something else computes the frozen product. The kernel
is bound by memory bandwidth: one pass over O.

For the n projections of one input, its gradient has a product per member, each with its own mask:

    O = base + s · Σ D_i(U_i V_i) + bias        U (M,n·R)   V (n·R,N)

For rows sorted into segments, each with its own matrix and scale:

    O_g = base_g + s_g · D(U_g V_g) + bias      V (G,R,N)
"""

import torch
import triton
import triton.language as tl

from .common import (
    BLOCK_ENTRY,
    TL_DTYPE,
    add_low_rank,
    advance,
    in_vectors,
    keep_entries,
    load_keep_words,
    members_of,
    multiple,
    of_segments,
    segment_rows,
    vector_of,
    wait_for_previous,
)
from .config import AddConfig, cdiv
from .launch import Arguments, launch


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M"])
def _lora_add(
    o_ptr,
    base_ptr,
    u_ptr,
    v_ptr,
    keep_bits_ptr,
    bias_ptr,
    scale_ptr,
    segments_ptr,
    inv_keep,
    M,
    N,
    R,
    stride_om,
    stride_bm,
    stride_um,
    stride_vg,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ALIGN_O: tl.constexpr,
    ALIGN_BASE: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    if ALIGN_O:
        stride_om = multiple(stride_om, 8)
        N = multiple(N, 8)
    if ALIGN_BASE:
        stride_bm = multiple(stride_bm, 8)
    # Row blocks are the grid's first axis: consecutive programs share V's tile in cache, and only
    # the first axis may exceed 65,535 programs.
    block_m = tl.program_id(0)
    if BACKWARDS:
        block_m = tl.num_programs(0) - 1 - block_m
    first_m = block_m * BLOCK_M
    if SEGMENTS:
        segment, first_m, M = segment_rows(segments_ptr + block_m * BLOCK_ENTRY)
        if first_m >= M:  # the table may have more entries than there are blocks
            return
        if ALIGN_V:
            stride_vg = multiple(stride_vg, 8)
        v_ptr += segment * stride_vg
        scale_ptr += segment
    first_n = tl.program_id(1) * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    # Offsets of rows are 64-bit: M times a row stride may exceed 2³¹ elements.
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    rows = offs_m.to(tl.int64)[:, None]
    # Everything that does not depend on U V is loaded first: the product waits for a barrier, and
    # no load moves across it. But a base that is not read in vectors takes too many registers.
    base_ptrs = base_ptr + rows * stride_bm + offs_n[None, :]
    if HAS_BASE and ALIGN_BASE:
        base = tl.load(base_ptrs, mask=inside, other=0.0)
    if HAS_DROPOUT and MEMBERS == 1:
        words = load_keep_words(keep_bits_ptr, stride_keep_m, first_m, first_n, M, BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    if HAS_SCALE:
        scale = tl.load(scale_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MEMBERS == 1:
        acc = add_low_rank(
            acc, u_ptr, v_ptr, offs_m, offs_n, M, N, R, stride_um, stride_vr, stride_vn,
            DTYPE, BLOCK_R, CHUNKS, ALIGN_U, ALIGN_V, V_TRANSPOSED, INPUT_PRECISION,
        )  # fmt: skip
    else:
        keep_pitch = advance(1, M) * multiple(stride_keep_m, 4)
        for member in tl.range(0, MEMBERS, num_stages=1):
            words = load_keep_words(
                keep_bits_ptr + keep_pitch * member, stride_keep_m, first_m, first_n, M,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            first_r = multiple(R, ALIGN_U) * member
            of_member = add_low_rank(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                u_ptr + first_r, v_ptr + advance(1, stride_vr) * first_r, offs_m, offs_n,
                M, N, R, stride_um, stride_vr, stride_vn,
                DTYPE, BLOCK_R, CHUNKS, ALIGN_U, ALIGN_V, V_TRANSPOSED, INPUT_PRECISION,
            )  # fmt: skip
            acc += keep_entries(of_member, words, BLOCK_M, BLOCK_N)
        acc *= inv_keep
    if HAS_SCALE:
        acc *= scale.to(tl.float32)
    if HAS_DROPOUT and MEMBERS == 1:
        acc = keep_entries(acc * inv_keep, words, BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        acc += bias.to(tl.float32)[None, :]
    if HAS_BASE:
        if not ALIGN_BASE:
            base = tl.load(base_ptrs, mask=inside, other=0.0)
        acc += base.to(tl.float32)
    o_ptrs = o_ptr + rows * stride_om + offs_n[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=inside)


def lora_add(
    o: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor | None,
    config: AddConfig,
    *,
    base: torch.Tensor | None = None,
    dot_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    keep_bits: torch.Tensor | None = None,
    inv_keep: float = 1.0,
    input_precision: str = "ieee",
    segments: torch.Tensor | None = None,
) -> None:
    """Write ``o = base + scale · D(u v) + bias``; the rest as in :func:`.lora_gemm.lora_gemm`.

    Args:
        o: ``(M, N)``, inner stride 1, any floating dtype.
        base: ``(M, N)``, inner stride 1, any floating dtype; may be ``o`` itself; None for zeros.
        dot_dtype: the dtype that ``u`` and ``v`` are cast to; o's dtype by default.
        u, v, keep_bits: of one member; or ``(M, n·R)``, ``(n·R, N)`` and contiguous
            ``(n, M, words)``, for the sum of n members.
        segments: the table of :meth:`.segments.Segments.blocks` for ``config.block_m``; then v is
            ``(G, R, N)`` and the scale ``(G,)``, contiguous. Rows of no segment are not written.
            None: all rows have one v.
    """
    tensors = o, base, u, v, keep_bits, bias, scale, segments
    flags = dot_dtype or o.dtype, input_precision
    launch(_lora_add, _arguments, config, tensors, (float(inv_keep),), *flags)


def _arguments(
    config,
    o,
    base,
    u,
    v,
    keep_bits,
    bias,
    scale,
    segments,
    dot_dtype: torch.dtype,
    input_precision: str,
) -> Arguments:
    (M, N), members = o.shape, members_of(keep_bits)
    R = u.shape[1] // members
    one, stride_vg = of_segments(v)
    block_r, chunks = config.rank_blocks(R)
    row_blocks = cdiv(M, config.block_m) if segments is None else segments.shape[0]
    return Arguments(
        grid=(row_blocks, cdiv(N, config.block_n)),
        operands=(
            o,
            o if base is None else base,
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
            R,
            o.stride(0),
            0 if base is None else base.stride(0),
            u.stride(0),
            stride_vg,
            *one.stride(),
            0 if keep_bits is None else keep_bits.stride(-2),
        ),
        constants={
            "DTYPE": TL_DTYPE[dot_dtype],
            "MEMBERS": members,
            "SEGMENTS": segments is not None,
            "HAS_BASE": base is not None,
            "HAS_BIAS": bias is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "HAS_SCALE": scale is not None,
            "ALIGN_O": in_vectors(o),
            "ALIGN_BASE": base is not None and in_vectors(base),
            "ALIGN_U": vector_of(u[:, :R]),
            "ALIGN_V": in_vectors(one[:R]) and (stride_vg or 0) % 8 == 0,
            "V_TRANSPOSED": one.stride(1) != 1,
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": block_r,
            "CHUNKS": chunks,
            "BACKWARDS": config.backwards,
            "PDL": config.pdl,
        },
        options=config.options,
    )
