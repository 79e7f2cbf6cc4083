"""The thin product that shrinks to the rank.

    U = s · D(P) Q        P (M,L)   Q (L,R)   U (M,R)

Forward: ``S``, without s, from P = x, Q = Aᵀ and the keep bits, which are computed here from a seed
if they are not given. Backward: ``G`` from P = dY, Q = B. The kernel is bound by memory bandwidth:
one read of P. The contraction may be split over programs; the last program to arrive adds the
partial sums in a fixed order, so results are bitwise reproducible.

For the n projections of one input, each with its own mask, the members' products are one launch:

    U_i = s · D_i(P) Q_i        Q (L,n·R)   U (M,n·R)

For rows sorted into segments, each with its own matrix and scale:

    U_g = s_g · D(P_g) Q_g      Q (G,L,R)
"""

import torch
import triton
import triton.language as tl

from .common import (
    BLOCK_ENTRY,
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
    wait_for_previous,
)
from .config import DIGITS, ShrinkConfig, cdiv, split_evenly
from .dropout import dropout_mask, first_digit, keep_words
from .launch import Arguments, launch


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M", "scale_u", "keep_count", "first_digit"])
def _shrink(
    u_ptr,
    p_ptr,
    q_ptr,
    keep_bits_ptr,
    scale_ptr,
    parts_ptr,
    tickets_ptr,
    seed_ptr,
    segments_ptr,
    rows_ptr,
    factor,
    keep_count,
    first_digit,
    M,
    L,
    R,
    scale_u,
    l_per_split,
    stride_ps,
    stride_pr,
    stride_um,
    stride_pm,
    stride_qg,
    stride_ql,
    stride_qr,
    stride_keep_m,
    MEMBERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DIGITS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_L: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
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
    if ALIGN_Q:
        if Q_TRANSPOSED:
            stride_qr = multiple(stride_qr, 8)
        else:
            stride_ql = multiple(stride_ql, 8)
            R = multiple(R, 8)
    # The blocks of one row of tiles run at the same time: they share P in the L2 cache.
    block_r = tl.program_id(0) % (MEMBERS * BLOCKS_R)
    first_m = tl.program_id(0) // (MEMBERS * BLOCKS_R) * BLOCK_M
    if SEGMENTS:
        entry_ptr = segments_ptr + tl.program_id(0) // BLOCKS_R * BLOCK_ENTRY
        segment, first_m, M = segment_rows(entry_ptr)
        if first_m >= M:  # the table may have more entries than there are blocks
            return
        if ALIGN_Q:
            stride_qg = multiple(stride_qg, 8)
        q_ptr += segment * stride_qg
        scale_ptr += segment
    if MEMBERS > 1:
        member = block_r // BLOCKS_R
        block_r = block_r % BLOCKS_R
        first_r = member * R
        q_ptr += advance(1, stride_qr) * first_r
        keep_bits_ptr += advance(1, M) * (member * stride_keep_m)
        seed_ptr += member
    split = tl.program_id(1)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first_l = split * l_per_split
    last_l = tl.minimum(first_l + l_per_split, L)
    if not USE_DESC:
        p_ptrs = p_ptr + offs_m.to(tl.int64)[:, None] * stride_pm + (first_l + offs_l)[None, :]
    q_ptrs = (
        q_ptr
        + (first_l + offs_l).to(tl.int64)[:, None] * stride_ql
        + offs_r.to(tl.int64)[None, :] * stride_qr
    )
    rows = offs_m[:, None] < M
    cols = offs_r[None, :] < R
    if DIGITS:
        seed = tl.load(seed_ptr)  # inside the loop it would be copied ahead in every step
        rows_of_mask = offs_m
        if HAS_ROWS:
            rows_of_mask = tl.load(rows_ptr + offs_m, mask=offs_m < M, other=0)
        # Every block of ranks makes the mask, the first one stores it.
        stored_words = tl.where(block_r == 0, stride_keep_m, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # A split is a whole number of blocks, so only the last block of L may need a mask along L.
    for start in range(first_l, last_l, BLOCK_L):
        if USE_DESC:
            p = p_ptr.load([first_m, start])
        elif EVEN_L:
            p = tl.load(p_ptrs, mask=rows, other=0.0)
        else:
            p = tl.load(p_ptrs, mask=rows & (start + offs_l[None, :] < L), other=0.0)
        if EVEN_L:
            q = tl.load(q_ptrs, mask=cols, other=0.0)
        else:
            q = tl.load(q_ptrs, mask=(start + offs_l[:, None] < L) & cols, other=0.0)
        if DIGITS:
            offs_w = start // 64 + tl.arange(0, BLOCK_L // 64)
            made = keep_words(seed, rows_of_mask, offs_w, keep_count, first_digit, DIGITS)
            tl.store(
                keep_bits_ptr + offs_m.to(tl.int64)[:, None] * stride_keep_m + offs_w[None, :],
                made,
                mask=rows & (offs_w[None, :] < stored_words),
            )
            words = tl.join(made.to(tl.int32), (made >> 32).to(tl.int32))
            p = keep_entries(p, tl.reshape(words, (BLOCK_M, BLOCK_L // 32)), BLOCK_M, BLOCK_L)
        elif HAS_DROPOUT:
            words = load_keep_words(
                keep_bits_ptr, stride_keep_m, first_m, start, M, BLOCK_M, BLOCK_L
            )
            p = keep_entries(p, words, BLOCK_M, BLOCK_L)
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_R)
        acc = tl.dot(p, q, acc, input_precision=INPUT_PRECISION)
        if not USE_DESC:
            p_ptrs += BLOCK_L
        q_ptrs += advance(BLOCK_L, stride_ql)
    if MEMBERS > 1:
        offs_r += first_r
    if SPLIT:
        part_ptrs = parts_ptr + offs_r[None, :]
        own_ptrs = part_ptrs + split.to(tl.int64) * stride_ps
        tl.store(own_ptrs + offs_m.to(tl.int64)[:, None] * stride_pr, acc, mask=rows & cols)
        if is_last(tickets_ptr + tl.program_id(0), tl.num_programs(1)):
            if SEGMENTS:  # loaded again: kept until here, 16 rows spill on sm_90
                _, first_m, M = segment_rows(entry_ptr)
            for row in range(0, BLOCK_M, SUM_ROWS):
                offs = first_m + row + tl.arange(0, SUM_ROWS)
                within = (offs[:, None] < M) & cols
                ptrs = part_ptrs + offs.to(tl.int64)[:, None] * stride_pr
                total = sum_parts(ptrs, stride_ps, tl.num_programs(1), within)
                _store(u_ptr, total, offs, offs_r, within, stride_um, factor, scale_u, scale_ptr)
    else:
        _store(u_ptr, acc, offs_m, offs_r, rows & cols, stride_um, factor, scale_u, scale_ptr)


@triton.jit
def _store(u_ptr, acc, offs_m, offs_r, inside, stride_um, factor, scale_u, scale_ptr):
    # Once per result, instead of at every entry of P. ``scale_u`` is not a constexpr: without the
    # load of the scale, several tiles spill.
    acc *= factor * tl.where(scale_u != 0, tl.load(scale_ptr).to(tl.float32), 1.0)
    u_ptrs = u_ptr + offs_m.to(tl.int64)[:, None] * stride_um + offs_r[None, :]
    tl.store(u_ptrs, acc.to(u_ptr.dtype.element_ty), mask=inside)


def shrink(
    u: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    config: ShrinkConfig,
    *,
    scale_u: bool = True,
    keep_bits: torch.Tensor | None = None,
    inv_keep: float = 1.0,
    input_precision: str = "ieee",
    tickets: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    keep_count: int = 0,
    digits: int = DIGITS,
    segments: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> None:
    """Write ``u = scale · D(p) q``.

    Args:
        u: ``(M, R)``, inner stride 1, any floating dtype; rounded once, from the fp32 sum.
        p: ``(M, L)``, inner stride 1.
        q: ``(L, R)`` in p's dtype, any strides.
        scale: 0-d tensor, read on the device.
        scale_u: whether the scale multiplies ``u``, as in ``G``; else its factor is 1.
        q, u, keep_bits, seed: of one member; or ``(L, n·R)``, ``(M, n·R)``, contiguous
            ``(n, M, words)`` and ``(n,)``, for n members.
        keep_bits: packed mask of ``p``, int32 ``(M, words)``, or None; with a seed it is written.
        inv_keep: factor of the kept entries of ``p``; applied to ``u``.
        input_precision: of fp32 products, "ieee" or "tf32".
        tickets: int32 zeros, at least ``n · config.blocks(M, R, R)``, contiguous; zeros again
            afterwards. Launches that may run at the same time need different ones. None: made here
            if the contraction is split.
        seed, keep_count, digits: the mask's, as in :func:`.dropout.dropout_mask`; a seed of None
            means that ``keep_bits`` is given.
        segments: the table of :meth:`.segments.Segments.blocks` for ``config.block_m``; then q is
            ``(G, L, R)`` and the scale ``(G,)``, contiguous. Rows of u and keep bits of no segment
            are not written. None: all rows have one q.
        rows: int64 ``(M,)``, contiguous: the row of the mask that each row has, with a seed; None:
            its own.
    """
    (M, L), members = p.shape, members_of(keep_bits)
    R = q.shape[-1] // members
    first, random = 0, 0
    if seed is not None:
        if config.makes_mask:
            keep_bits, first = keep_bits.view(torch.int64), first_digit(keep_count)
            random = digits - first
        else:
            stacked = keep_bits.view(members, M, -1), seed.view(members)
            for one, its_seed in zip(*stacked, strict=True):
                dropout_mask(one, its_seed, keep_count, digits, rows)
            seed = rows = None
    _, splits = split_evenly(L, config.splits, config.block_l)
    parts = None
    if splits > 1:
        # A whole number of 16 rows apart, for any M: Triton specialises on multiples of 16.
        padded = torch.empty(
            (splits, cdiv(M, 16) * 16, members * R), dtype=torch.float32, device=u.device
        )
        parts = padded[:, :M]
        if tickets is None:
            tickets = tickets_for(config, _grid_rows(config, p, segments), R, R, members, u)
    else:
        tickets = None
    tensors = u, p, q, keep_bits, scale, parts, tickets, seed, segments, rows
    scalars = float(inv_keep), keep_count, first
    launch(_shrink, _arguments, config, tensors, scalars, scale_u, input_precision, random)


def _grid_rows(config: ShrinkConfig, p: torch.Tensor, segments: torch.Tensor | None) -> int:
    """Rows of a result that has as many blocks as are launched."""
    return p.shape[0] if segments is None else segments.shape[0] * config.block_m


def _arguments(
    config,
    u,
    p,
    q,
    keep_bits,
    scale,
    parts,
    tickets,
    seed,
    segments,
    rows,
    scale_u: bool,
    input_precision: str,
    digits: int,
) -> Arguments:
    (M, L), members = p.shape, members_of(keep_bits)
    R = q.shape[-1] // members
    one, stride_qg = of_segments(q)
    block_m, block_l, block_r = config.block_m, config.block_l, config.block_r(R)
    l_per_split, splits = split_evenly(L, config.splits, block_l)
    return Arguments(
        grid=(members * config.blocks(_grid_rows(config, p, segments), R, R), splits),
        operands=(
            u,
            operand(config, p, (block_m, block_l)),
            q,
            p if keep_bits is None else keep_bits,
            scale,
            u if parts is None else parts,
            u if tickets is None else tickets,
            u if seed is None else seed,
            segments,
            rows,
        ),
        numbers=(
            M,
            L,
            R,
            int(scale_u),
            l_per_split,
            *((0, 0) if parts is None else parts.stride()[:2]),
            u.stride(0),
            p.stride(0),
            stride_qg,
            *one.stride(),
            0 if keep_bits is None else keep_bits.stride(-2),
        ),
        constants={
            "MEMBERS": members,
            "SEGMENTS": segments is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "DIGITS": digits,
            "HAS_ROWS": rows is not None,
            "SPLIT": splits > 1,
            "EVEN_L": L % block_l == 0,
            "ALIGN_P": in_vectors(p),
            "ALIGN_Q": in_vectors(one[:, :R]) and (stride_qg or 0) % 8 == 0,
            "Q_TRANSPOSED": one.stride(1) != 1,
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
