"""The thin product that shrinks to the rank.

    U = s · D(P) Q        P (M,L)   Q (L,R)   U (M,R)

Forward: ``S``, without s, from P = x, Q = Aᵀ and the keep bits. Backward: ``G`` from P = dY, Q = B.
The kernel is bound by memory bandwidth: one read of P. The contraction may be split over programs;
the partial sums are added in a fixed order, so results are bitwise reproducible.
"""

import torch
import triton
import triton.language as tl

from .common import advance, in_vectors, load_keep_bits, multiple, operand, sum_partials
from .config import ShrinkConfig, cdiv, split_evenly
from .launch import Arguments, launch


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M", "scale_u"])
def _shrink(
    u_ptr,
    p_ptr,
    q_ptr,
    keep_bits_ptr,
    scale_ptr,
    factor,
    M,
    L,
    R,
    scale_u,
    l_per_split,
    stride_us,
    stride_um,
    stride_pm,
    stride_ql,
    stride_qr,
    stride_keep_m,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_L: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    USE_DESC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if ALIGN_P:
        stride_pm = multiple(stride_pm, 8)
        L = multiple(L, 8)
    if ALIGN_Q:
        if Q_TRANSPOSED:
            stride_qr = multiple(stride_qr, 8)
        else:
            stride_ql = multiple(stride_ql, 8)
            R = multiple(R, 8)
    first_m = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
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
        if HAS_DROPOUT:
            keep = load_keep_bits(keep_bits_ptr, stride_keep_m, first_m, start, M, BLOCK_M, BLOCK_L)
            # Selected, not multiplied by zero: NaN and infinity at a dropped entry do not count.
            p = tl.where(keep != 0, p, 0.0).to(q.dtype)
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_R)
        acc = tl.dot(p, q, acc, input_precision=INPUT_PRECISION)
        if not USE_DESC:
            p_ptrs += BLOCK_L
        q_ptrs += advance(BLOCK_L, stride_ql)
    # Once per result, instead of at every entry of P; with splits, ``sum_partials`` does it.
    if HAS_SCALE:
        # ``scale_u`` is not a constexpr: without the load of the scale, several tiles spill.
        acc *= factor * tl.where(scale_u != 0, tl.load(scale_ptr).to(tl.float32), 1.0)
    u_ptrs = (
        u_ptr
        + split.to(tl.int64) * stride_us
        + offs_m.to(tl.int64)[:, None] * stride_um
        + offs_r[None, :]
    )
    tl.store(u_ptrs, acc.to(u_ptr.dtype.element_ty), mask=rows & cols)


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
) -> None:
    """Write ``u = scale · D(p) q``.

    Args:
        u: ``(M, R)``, inner stride 1, any floating dtype; rounded once, from the fp32 sum.
        p: ``(M, L)``, inner stride 1.
        q: ``(L, R)`` in p's dtype, any strides.
        scale: 0-d tensor, read on the device.
        scale_u: whether the scale multiplies ``u``, as in ``G``; else its factor is 1.
        keep_bits: packed mask of ``p``, int32 ``(M, words)``, or None.
        inv_keep: factor of the kept entries of ``p``; applied to ``u``.
        input_precision: of fp32 products, "ieee" or "tf32".
    """
    M, L = p.shape
    _, splits = split_evenly(L, config.splits, config.block_l)
    out = u
    if splits > 1:
        out = torch.empty((splits, M, q.shape[1]), dtype=torch.float32, device=u.device)
    tensors = out, p, q, keep_bits, scale
    launch(_shrink, _arguments, config, tensors, (float(inv_keep),), scale_u, input_precision)
    if splits > 1:
        sum_partials(u, out, inv_keep, scale if scale_u else None)


def _arguments(
    config, out, p, q, keep_bits, scale, scale_u: bool, input_precision: str
) -> Arguments:
    (M, L), R = p.shape, q.shape[1]
    block_m, block_l, block_r = config.block_m, config.block_l, config.block_r(R)
    l_per_split, splits = split_evenly(L, config.splits, block_l)
    return Arguments(
        grid=(cdiv(M, block_m), splits, cdiv(R, block_r)),
        operands=(
            out,
            operand(config, p, (block_m, block_l)),
            q,
            p if keep_bits is None else keep_bits,
            scale,
        ),
        numbers=(
            M,
            L,
            R,
            int(scale_u),
            l_per_split,
            out.stride(0) if splits > 1 else 0,
            out.stride(-2),
            p.stride(0),
            *q.stride(),
            0 if keep_bits is None else keep_bits.stride(0),
        ),
        constants={
            "HAS_DROPOUT": keep_bits is not None,
            "HAS_SCALE": splits == 1,
            "EVEN_L": L % block_l == 0,
            "ALIGN_P": in_vectors(p),
            "ALIGN_Q": in_vectors(q),
            "Q_TRANSPOSED": q.stride(1) != 1,
            "USE_DESC": config.descriptors,
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": block_m,
            "BLOCK_L": block_l,
            "BLOCK_R": block_r,
        },
        options=config.options,
    )
