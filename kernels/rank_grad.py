"""The gradients of the adapter's two matrices.

    O = s · Uᵀ D(P)        U (M,R)   P (M,L)   O (R,L)

``dA``, without s, from U = G, P = x and the keep bits; ``dBᵀ`` from U = S, P = dY. The kernel is
bound by memory bandwidth: one read of P. The rows may be split over programs; the last program to
arrive adds the partial sums in a fixed order, so results are bitwise reproducible.

For the n projections of one input, each with its own mask, the members' products are one launch:

    O_i = s · U_iᵀ D_i(P)        U (M,n·R)   O (n·R,L)

For rows sorted into segments, each with its own result and scale:

    O_g = s_g · U_gᵀ D(P_g)      O (G,R,L)

A program then sums an item: up to SEGMENT_ROWS rows of one segment. A segment of several items has
as many partial sums, which the last of its programs to arrive adds in their order.
"""

import torch
import triton
import triton.language as tl

from .common import (
    ITEM_ENTRY,
    TL_DTYPE,
    advance,
    in_vectors,
    is_last,
    keep_entries,
    load_keep_words,
    members_of,
    multiple,
    of_segments,
    operand,
    rows_at_once,
    segment_rows,
    sum_parts,
    tickets_for,
    vector_of,
    wait_for_previous,
)
from .config import SEGMENT_ROWS, RankGradConfig, cdiv, split_evenly
from .launch import Arguments, launch


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M", "m_per_split"])
def _rank_grad(
    o_ptr,
    u_ptr,
    p_ptr,
    keep_bits_ptr,
    scale_ptr,
    parts_ptr,
    tickets_ptr,
    segments_ptr,
    factor,
    M,
    m_per_split,
    L,
    R,
    stride_ps,
    stride_pr,
    stride_og,
    stride_or,
    stride_ol,
    stride_um,
    stride_pm,
    stride_keep_m,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_U: tl.constexpr,
    USE_DESC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    if ALIGN_P:
        stride_pm = multiple(stride_pm, 8)
        L = multiple(L, 8)
    if ALIGN_U > 1:
        stride_um = multiple(stride_um, ALIGN_U)
        R = multiple(R, ALIGN_U)
    # The blocks of one column of tiles run at the same time: they share P in the L2 cache.
    block_r = tl.program_id(0) % (MEMBERS * BLOCKS_R)
    if MEMBERS > 1:
        member = block_r // BLOCKS_R
        block_r = block_r % BLOCKS_R
        rows_before = member * R
        u_ptr += rows_before
        keep_bits_ptr += advance(1, M) * member * multiple(stride_keep_m, 4)
    first_r = block_r * BLOCK_R
    first_l = tl.program_id(0) // (MEMBERS * BLOCKS_R) * BLOCK_L
    split = tl.program_id(1)
    offs_l = first_l + tl.arange(0, BLOCK_L)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    offs_m = tl.arange(0, BLOCK_M)
    first_m = split * m_per_split
    last_m = tl.minimum(first_m + m_per_split, M)
    if SEGMENTS:
        item_ptr = segments_ptr + split * ITEM_ENTRY
        _, first_m, M = segment_rows(item_ptr)
        last_m = M
        if tl.load(item_ptr + 3) == 0:  # the table may have more entries than there are items
            return
    rows = (first_m + offs_m).to(tl.int64)
    u_ptrs = u_ptr + rows[None, :] * stride_um + offs_r[:, None]
    if not USE_DESC:
        p_ptrs = p_ptr + rows[:, None] * stride_pm + offs_l[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    # A split is a whole number of blocks, so only the last one needs a mask along the rows.
    for m in range(first_m, last_m, BLOCK_M):
        inside = m + offs_m < M
        u = tl.load(u_ptrs, mask=inside[None, :] & (offs_r[:, None] < R), other=0.0)
        if USE_DESC:
            p = p_ptr.load([m, first_l])
            if SEGMENTS:  # zeros of U do not cancel a NaN of the next segment
                p = tl.where(inside[:, None], p, 0.0)
        else:
            p = tl.load(p_ptrs, mask=inside[:, None] & (offs_l[None, :] < L), other=0.0)
        if HAS_DROPOUT:
            words = load_keep_words(keep_bits_ptr, stride_keep_m, m, first_l, M, BLOCK_M, BLOCK_L)
            p = keep_entries(p, words, BLOCK_M, BLOCK_L)
        # (BLOCK_R, BLOCK_M) @ (BLOCK_M, BLOCK_L)
        acc = tl.dot(u.to(DTYPE), p, acc, input_precision=INPUT_PRECISION)
        u_ptrs += advance(BLOCK_M, stride_um)
        if not USE_DESC:
            p_ptrs += advance(BLOCK_M, stride_pm)
    cols = offs_l[None, :] < L
    if MEMBERS > 1:
        first_r += rows_before
        offs_r += rows_before
        R += rows_before
    if SEGMENTS:  # loaded here: kept during the loop, some tiles spill
        segment = tl.load(item_ptr).to(tl.int64)
        o_ptr += segment * stride_og
        scale_ptr += segment
    if SEGMENTS and SPLIT:
        parts = tl.load(item_ptr + 3)
        if parts == 1:
            inside = (offs_r[:, None] < R) & cols
            _store(
                o_ptr, acc, offs_r, offs_l, inside, stride_or, stride_ol,
                factor, scale_ptr, HAS_DROPOUT, HAS_SCALE,
            )  # fmt: skip
            return
        split = tl.load(item_ptr + 4)
        first_part = tl.load(item_ptr + 5)
        parts_ptr += first_part.to(tl.int64) * stride_ps
        tickets_ptr += first_part * tl.num_programs(0)
    if SPLIT:
        part_ptrs = parts_ptr + offs_l[None, :]
        own_ptrs = part_ptrs + split.to(tl.int64) * stride_ps
        inside = (offs_r[:, None] < R) & cols
        tl.store(own_ptrs + offs_r.to(tl.int64)[:, None] * stride_pr, acc, mask=inside)
        ticket_ptr = tickets_ptr + tl.program_id(0)
        if not SEGMENTS:
            parts = tl.num_programs(1)
        if is_last(ticket_ptr, parts):
            for row in range(0, BLOCK_R, SUM_ROWS):
                offs = first_r + row + tl.arange(0, SUM_ROWS)
                within = (offs[:, None] < R) & cols
                ptrs = part_ptrs + offs.to(tl.int64)[:, None] * stride_pr
                total = sum_parts(ptrs, stride_ps, parts, within)
                _store(
                    o_ptr, total, offs, offs_l, within, stride_or, stride_ol,
                    factor, scale_ptr, HAS_DROPOUT, HAS_SCALE,
                )  # fmt: skip
    else:
        inside = (offs_r[:, None] < R) & cols
        _store(
            o_ptr, acc, offs_r, offs_l, inside, stride_or, stride_ol,
            factor, scale_ptr, HAS_DROPOUT, HAS_SCALE,
        )  # fmt: skip


@triton.jit
def _store(
    o_ptr, acc, offs_r, offs_l, inside, stride_or, stride_ol,
    factor, scale_ptr, HAS_FACTOR: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    # Once per result, instead of at every entry of P.
    if HAS_FACTOR:
        acc *= factor
    if HAS_SCALE:
        acc *= tl.load(scale_ptr).to(tl.float32)
    o_ptrs = (
        o_ptr + offs_r.to(tl.int64)[:, None] * stride_or + offs_l.to(tl.int64)[None, :] * stride_ol
    )
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=inside)


def rank_grad(
    o: torch.Tensor,
    u: torch.Tensor,
    p: torch.Tensor,
    scale: torch.Tensor | None,
    config: RankGradConfig,
    *,
    keep_bits: torch.Tensor | None = None,
    inv_keep: float = 1.0,
    input_precision: str = "ieee",
    tickets: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> None:
    """Write ``o = scale · uᵀ D(p)``.

    Args:
        o: ``(R, L)``, any strides and floating dtype; rounded once, from the fp32 sum.
        u: ``(M, R)``, inner stride 1, any floating dtype; cast to p's.
        p: ``(M, L)``, inner stride 1.
        scale: 0-d tensor, read on the device, or None for 1.
        keep_bits: packed mask of ``p``, int32 ``(M, words)``, or None.
        inv_keep: factor of the kept entries of ``p``.
        input_precision: of fp32 products, "ieee" or "tf32".
        u, o, keep_bits: of one member; or ``(M, n·R)``, ``(n·R, L)`` and contiguous
            ``(n, M, words)``, for n members.
        tickets: int32 zeros, at least ``n · config.blocks(R, L, R)``, contiguous; zeros again
            afterwards. Launches that may run at the same time need different ones. None: made here
            if the rows are split. Not used with segments.
        segments: the table of :meth:`.segments.Segments.items`; then o is ``(G, R, L)`` and the
            scale ``(G,)``, contiguous, and ``config.splits`` is not used. Without rows a segment's
            result is 0. None: all rows have one result.
    """
    (M, L), members = p.shape, members_of(keep_bits)
    R = u.shape[1] // members
    parts = None
    splits = _parts(config, M, segments)
    if splits > 1:
        parts = torch.empty((splits, members * R, L), dtype=torch.float32, device=o.device)
        if segments is not None:
            tickets = tickets_for(config, R, L, R, splits, o)
        elif tickets is None:
            tickets = tickets_for(config, R, L, R, members, o)
    else:
        tickets = None
    tensors = o, u, p, keep_bits, scale, parts, tickets, segments
    launch(_rank_grad, _arguments, config, tensors, (float(inv_keep),), input_precision)


def _parts(config: RankGradConfig, M: int, segments: torch.Tensor | None) -> int:
    """The most partial sums that are written at the same time; at most 1: none.

    A segment of c > 1 items has more than (c - 1) · SEGMENT_ROWS rows, at least half of c times
    as many.
    """
    if segments is not None:
        return 2 * M // SEGMENT_ROWS if M > SEGMENT_ROWS else 1
    return split_evenly(M, config.splits, config.block_m)[1]


def _arguments(
    config, o, u, p, keep_bits, scale, parts, tickets, segments, input_precision: str
) -> Arguments:
    (M, L), members = p.shape, members_of(keep_bits)
    R = u.shape[1] // members
    block_m, block_l, block_r = config.block_m, config.block_l, config.block_r(R)
    one, stride_og = of_segments(o)
    m_per_split, splits = split_evenly(M, config.splits, block_m)
    return Arguments(
        grid=(
            members * config.blocks(R, L, R),
            splits if segments is None else segments.shape[0],
        ),
        operands=(
            o,
            u,
            operand(config, p, (block_m, block_l)),
            u if keep_bits is None else keep_bits,
            u if scale is None else scale,
            u if parts is None else parts,
            u if tickets is None else tickets,
            segments,
        ),
        numbers=(
            M,
            m_per_split,
            L,
            R,
            *((0, 0) if parts is None else parts.stride()[:2]),
            stride_og,
            *one.stride(),
            u.stride(0),
            p.stride(0),
            0 if keep_bits is None else keep_bits.stride(-2),
        ),
        constants={
            "DTYPE": TL_DTYPE[p.dtype],
            "MEMBERS": members,
            "SEGMENTS": segments is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "HAS_SCALE": scale is not None,
            "SPLIT": parts is not None,
            "ALIGN_P": in_vectors(p),
            "ALIGN_U": vector_of(u[:, :R]),
            "USE_DESC": config.descriptors,
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": block_m,
            "BLOCK_L": block_l,
            "BLOCK_R": block_r,
            "BLOCKS_R": cdiv(R, block_r),
            "SUM_ROWS": rows_at_once(config, R),
            "PDL": config.pdl,
        },
        options=config.options,
    )
