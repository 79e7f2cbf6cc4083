"""The two thin products of backward that read dY, in one pass over it.

    V = s · P Q        O = s · Pᵀ U        P (M,L)   Q (L,R)   U (M,R)   V (M,R)   O (L,R)

``G`` and ``dB``: P = dY, Q = B, U = S, V = G, O = dB. A program computes its part of both for one
block of columns and a range of rows. A second launch adds the partial sums, in a fixed order, so
results are bitwise reproducible: they are too many for the last program of each block to add. They
grow with the rank, so from some rank on :mod:`.shrink` and :mod:`.rank_grad`, which read P twice,
move fewer bytes.
"""

import torch
import triton
import triton.language as tl

from .common import TL_DTYPE, advance, in_vectors, multiple, sum_parts, vector_of, wait_for_previous
from .config import ThinPairConfig, cdiv, padded_rank, split_evenly
from .launch import Arguments, launch


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M", "m_per_split"])
def _thin_pair(
    v_parts_ptr,
    o_parts_ptr,
    p_ptr,
    q_ptr,
    u_ptr,
    M,
    m_per_split,
    L,
    R,
    stride_pm,
    stride_ql,
    stride_qr,
    stride_um,
    DTYPE: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    if ALIGN_P:
        stride_pm = multiple(stride_pm, 8)
        L = multiple(L, 8)
    if ALIGN_U > 1:
        stride_um = multiple(stride_um, ALIGN_U)
        R = multiple(R, ALIGN_U)
    block = tl.program_id(0)
    split = tl.program_id(1)
    offs_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    first_m = split * m_per_split
    last_m = tl.minimum(first_m + m_per_split, M)
    ranks = offs_r[None, :] < R
    cols = offs_l[None, :] < L
    q_ptrs = (
        q_ptr + offs_l.to(tl.int64)[:, None] * stride_ql + offs_r.to(tl.int64)[None, :] * stride_qr
    )
    q = tl.load(q_ptrs, mask=(offs_l[:, None] < L) & ranks, other=0.0)
    rows = (first_m + offs_m).to(tl.int64)
    p_ptrs = p_ptr + rows[:, None] * stride_pm + offs_l[None, :]
    u_ptrs = u_ptr + rows[None, :] * stride_um + offs_r[:, None]
    # Partial sums lie without gaps: (blocks, M, R) and (splits, L, R).
    v_ptrs = v_parts_ptr + (block.to(tl.int64) * M + rows[:, None]) * R + offs_r[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    # A split is a whole number of blocks, so only the last one needs a mask along the rows.
    for m in range(first_m, last_m, BLOCK_M):
        inside = m + offs_m < M
        p = tl.load(p_ptrs, mask=inside[:, None] & cols, other=0.0)
        u = tl.load(u_ptrs, mask=inside[None, :] & (offs_r[:, None] < R), other=0.0)
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_R)
        v = tl.dot(p, q)
        # (BLOCK_R, BLOCK_M) @ (BLOCK_M, BLOCK_L)
        acc = tl.dot(u.to(DTYPE), p, acc)
        tl.store(v_ptrs, v, mask=inside[:, None] & ranks)
        p_ptrs += advance(BLOCK_M, stride_pm)
        u_ptrs += advance(BLOCK_M, stride_um)
        v_ptrs += advance(BLOCK_M, R)
    o_ptrs = (
        o_parts_ptr + (split.to(tl.int64) * L + offs_l[None, :].to(tl.int64)) * R + offs_r[:, None]
    )
    tl.store(o_ptrs, acc, mask=(offs_r[:, None] < R) & cols)


@triton.jit
def _sum_tile(
    out_ptr,
    parts_ptr,
    factor,
    tile,
    rows,
    R,
    splits,
    stride_om,
    stride_or,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``out (rows, R) = factor · Σ parts (splits, rows, R)`` for one tile of BLOCK rows."""
    offs_m = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    inside = (offs_m[:, None] < rows) & (offs_r[None, :] < R)
    part_ptrs = parts_ptr + offs_m[:, None] * R + offs_r[None, :]
    acc = sum_parts(part_ptrs, advance(1, rows) * R, splits, inside) * factor
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_r[None, :].to(tl.int64) * stride_or
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "m_splits", "tickets"])
def _sum_pair(
    v_ptr,
    o_ptr,
    v_parts_ptr,
    o_parts_ptr,
    scale_ptr,
    tickets_ptr,
    M,
    m_splits,
    L,
    R,
    l_blocks,
    tickets,
    stride_vm,
    stride_ol,
    stride_or,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    factor = tl.load(scale_ptr).to(tl.float32)
    tile = tl.program_id(0)
    for first in range(tile * BLOCK, tickets, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(tickets_ptr + at, 0, mask=at < tickets)
    v_tiles = tl.cdiv(M, BLOCK)
    if tile < v_tiles:
        _sum_tile(v_ptr, v_parts_ptr, factor, tile, M, R, l_blocks, stride_vm, 1, BLOCK, BLOCK_R)
    else:
        tile -= v_tiles
        _sum_tile(
            o_ptr, o_parts_ptr, factor, tile, L, R, m_splits, stride_ol, stride_or, BLOCK, BLOCK_R
        )


def thin_pair(
    v: torch.Tensor,
    o: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    u: torch.Tensor,
    scale: torch.Tensor,
    config: ThinPairConfig,
    *,
    tickets: torch.Tensor | None = None,
) -> None:
    """Write ``v = scale · p q`` and ``o = scale · pᵀ u``, each rounded once, from fp32 sums.

    Args:
        v: ``(M, R)``, inner stride 1, any floating dtype; ``R`` at most
            :data:`.config.THIN_PAIR_MAX_RANK`.
        o: ``(L, R)``, any strides and floating dtype.
        p: ``(M, L)`` in half precision, inner stride 1.
        q: ``(L, R)`` in p's dtype, any strides.
        u: ``(M, R)``, inner stride 1, any floating dtype; cast to p's.
        scale: 0-d tensor, read on the device.
        tickets: int32, contiguous; set to 0 for a later kernel that needs it so. Or None.
    """
    (M, L), R = p.shape, q.shape[1]
    _, splits = split_evenly(M, config.splits, config.block_m)
    blocks = cdiv(L, config.block_l)
    v_parts = torch.empty((blocks, M, R), dtype=torch.float32, device=p.device)
    o_parts = torch.empty((splits, L, R), dtype=torch.float32, device=p.device)
    launch(_thin_pair, _arguments, config, (v_parts, o_parts, p, q, u), ())
    launch(_sum_pair, _sum_arguments, None, (v, o, v_parts, o_parts, scale, tickets), ())


def _arguments(config, v_parts, o_parts, p, q, u) -> Arguments:
    (M, L), R = p.shape, q.shape[1]
    m_per_split, splits = split_evenly(M, config.splits, config.block_m)
    return Arguments(
        grid=(cdiv(L, config.block_l), splits),
        operands=(v_parts, o_parts, p, q, u),
        numbers=(M, m_per_split, L, R, p.stride(0), *q.stride(), u.stride(0)),
        constants={
            "DTYPE": TL_DTYPE[p.dtype],
            "ALIGN_P": in_vectors(p),
            "ALIGN_U": vector_of(u),
            "BLOCK_M": config.block_m,
            "BLOCK_L": config.block_l,
            "BLOCK_R": config.block_r(R),
            "PDL": config.pdl,
        },
        options=config.options,
    )


def _sum_arguments(_, v, o, v_parts, o_parts, scale, tickets) -> Arguments:
    (M, R), L = v.shape, o.shape[0]
    block_r = padded_rank(R)
    block = 1024 // block_r
    return Arguments(
        grid=(cdiv(M, block) + cdiv(L, block),),
        operands=(v, o, v_parts, o_parts, scale, v_parts if tickets is None else tickets),
        numbers=(
            M,
            o_parts.shape[0],
            L,
            R,
            v_parts.shape[0],
            0 if tickets is None else tickets.numel(),
            v.stride(0),
            *o.stride(),
        ),
        constants={"BLOCK": block, "BLOCK_R": block_r},
        options={"num_warps": 4},
    )
