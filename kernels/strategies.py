"""Forward and backward of the layer as sequences of kernels.

A strategy is one of these. All save the same state, ``x``, ``S`` and the keep bits, so backward
need not use the forward's.

    split         ``shrink``, then ``lora_gemm``
    single_pass   both in one kernel, for small M
    seeded        ``shrink``; ``lora_add`` writes the low-rank product and the bias, and the
                  vendor's GEMM accumulates onto it in place
    addmm         ``shrink`` and the vendor's GEMM, onto whose result ``lora_add`` adds
 ``p``, ``q``, ``u``, ``v`` and ``o`` are the
operands of the kernels, in their notation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import select_config
from .common import members_of
from .config import (
    DIGITS,
    MIN_SPLIT_ROWS,
    TICKETS,
    VECTOR_BYTES,
    Config,
    cdiv,
    is_aligned,
    rank_grad_applies,
)
from .dropout import dropout_mask
from .interpreter import INTERPRETED
from .lora_add import lora_add
from .lora_gemm import lora_gemm
from .operands import BackwardOperands, ForwardOperands
from .rank_grad import rank_grad
from .shrink import shrink
from .single_pass import single_pass
from .thin_pair import thin_pair

__all__ = ["INTERPRETED", "backward", "dropout_mask", "expand", "forward"]


def forward(
    operands: ForwardOperands, strategy: str, keep_bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``y (M,N)`` in x's dtype (with a base, in the base's); the unscaled ``S (M,R)`` in x's.

    No dimension may be 0, and the scale must be a tensor.

    Args:
        keep_bits: the packed mask int32 ``(M, words)``, written; needed if there is a seed.
    """
    x, weight, lora_A, lora_B, bias, scale, seed, keep_count, base = operands
    if x.stride(1) != 1:
        operands = operands._replace(x=(x := inner_contiguous(x)))
    target = select_config.target_of(x.device)
    if strategy == "single_pass" and base is None:
        bias = None if bias is None else bias.contiguous()
        weight = weight.to(x.dtype)
        return _single_pass(x, weight.t(), lora_A.t(), lora_B.t(), scale, target, bias=bias)
    S = run_shrink(
        x, lora_A.t(), scale, target,
        scale_u=False, keep_bits=keep_bits, seed=seed, keep_count=keep_count,
    )  # fmt: skip
    return expand(operands, strategy, S), S


def expand(operands: ForwardOperands, strategy: str, S: Tensor) -> Tensor:
    """``y (M,N)`` of :func:`forward`, whose ``S`` is given; *single_pass* is *split* here.

    Args:
        S: ``(M, R)`` in x's dtype, inner stride 1.
    """
    x, weight, _, lora_B, bias, scale, _, _, base = operands
    x = inner_contiguous(x)
    target = select_config.target_of(x.device)
    if base is not None:
        y = torch.empty_like(base, memory_format=torch.contiguous_format)
        run_add(y, S, lora_B.t(), scale, target, base=inner_contiguous(base), like=x)
        return y
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.contiguous()
    if strategy == "seeded":
        y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        run_add(y, S, lora_B.t(), scale, target, bias=bias)
        return y.addmm_(x, weight.t())
    if strategy == "addmm":
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        run_add(y, S, lora_B.t(), scale, target, base=y)
        return y
    return run_gemm(x, weight.t(), S, lora_B.t(), scale, target, bias=bias)


def backward(
    operands: BackwardOperands, strategy: str, side: torch.cuda.Stream | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, each in the dtype of its tensor.

    The scale must be a tensor.

    Args:
        side: a stream on which ``dA`` and ``dB`` are computed beside ``dx``; None: the current one.
            Not used by the library, since nobody has measured it.
    """
    dy, _, weight, lora_A, lora_B, S, scale, keep_bits, inv_keep, needs = operands
    operands = operands._replace(dy=(dy := inner_contiguous(dy)))
    target = select_config.target_of(dy.device)
    G = dx = None
    # Allocated on the current stream, whose allocator then knows when they are free.
    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs[1] else None
    dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs[2] else None
    tickets = None
    if (needs[1] or needs[2]) and dy.shape[0] > MIN_SPLIT_ROWS:
        tickets = torch.empty(TICKETS, dtype=torch.int32, device=dy.device)
    missing_dB = dB
    if needs[2] and (needs[0] or needs[1]) and strategy != "single_pass":
        G = run_thin_pair(dB, dy, S, lora_B, scale, target, tickets)
        missing_dB = dB if G is None else None
    if G is None and tickets is not None:
        tickets.zero_()
    if needs[0] and strategy == "single_pass" and weight is not None:
        dx, G = _single_pass(
            dy, weight.to(dy.dtype), lora_B, lora_A, scale, target,
            scale_u=True, keep_bits=keep_bits, inv_keep=inv_keep,
        )  # fmt: skip
    elif G is None and (needs[0] or needs[1]):
        G = run_shrink(dy, lora_B, scale, target, tickets=tickets)
    if side is None:
        dx = _input_gradient(operands, G, strategy, target) if needs[0] and dx is None else dx
        _adapter_gradients(operands, G, dA, missing_dB, target, tickets)
        return dx, dA, dB
    main = torch.cuda.current_stream(dy.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        _adapter_gradients(operands, G, dA, missing_dB, target, tickets)
    dx = _input_gradient(operands, G, strategy, target) if needs[0] and dx is None else dx
    main.wait_stream(side)
    return dx, dA, dB


def _input_gradient(operands: BackwardOperands, G: Tensor, strategy: str, target) -> Tensor:
    dy, _, weight, lora_A, _, _, _, keep_bits, inv_keep, _ = operands
    masking = keep_bits, inv_keep
    if weight is not None:
        weight = weight.to(dy.dtype)
        if strategy == "split":
            return run_gemm(
                dy, weight, G, lora_A, None, target, keep_bits=keep_bits, inv_keep=inv_keep
            )
        if strategy == "addmm":
            dx = torch.mm(dy, weight)
            run_add(dx, G, lora_A, None, target, *masking, base=dx)
            return dx
    dx = torch.empty((dy.shape[0], lora_A.shape[1]), dtype=dy.dtype, device=dy.device)
    run_add(dx, G, lora_A, None, target, *masking)
    return dx if weight is None else dx.addmm_(dy, weight)


def _adapter_gradients(operands: BackwardOperands, G, dA, dB, target, tickets) -> None:
    """Write ``dA`` and ``dB``, if they are not None; ``tickets`` are zeros or None."""
    dy, x, _, _, _, S, scale, keep_bits, inv_keep, _ = operands
    if dA is not None:
        run_rank_grad(dA, G, inner_contiguous(x), None, target, tickets, keep_bits, inv_keep)
    if dB is not None:
        run_rank_grad(dB.t(), inner_contiguous(S), dy, scale, target, tickets)


def run_shrink(
    p,
    q,
    scale,
    target,
    scale_u=True,
    keep_bits=None,
    seed=None,
    keep_count=1 << DIGITS,
    tickets=None,
    segments=None,
    rows=None,
) -> Tensor:
    """``scale · D(p) q``; with a seed ``keep_bits`` are written.

    With ``(n, M, words)`` keep bits it is the product of n members; with :class:`.Segments` that of
    a stack ``(G, L, R)``, and ``rows`` are those of the mask.
    """
    (M, L), members = p.shape, members_of(keep_bits)
    R = q.shape[-1] // members
    u = rank_matrix(M, members * R, p)
    config = cached_config(
        select_config.shrink_config,
        target,
        p.element_size(),
        M,
        L,
        R,
        describable=is_describable(p),
        members=members,
        segments=0 if segments is None else segments.count,
    )
    shrink(
        u, p, q.to(p.dtype), scale, config,
        scale_u=scale_u, keep_bits=keep_bits, seed=seed, keep_count=keep_count,
        inv_keep=(1 << DIGITS) / keep_count, input_precision=precision_of(p),
        tickets=_enough(tickets, members * config.blocks(M, R, R)),
        segments=None if segments is None else segments.blocks(config.block_m), rows=rows,
    )  # fmt: skip
    return u


def run_gemm(
    p, q, u, v, scale, target, bias=None, keep_bits=None, inv_keep=1.0, o=None, segments=None
) -> Tensor:
    """``o = p q + scale · D(u v) + bias``; o is made, unless it is given.

    With :class:`.Segments` v is a stack ``(G, R, N)``, and q and the bias may be stacks.
    """
    q = inner_dense(q)
    if o is None:
        o = torch.empty((p.shape[0], q.shape[-1]), dtype=p.dtype, device=p.device)
    aligned = is_describable(p) and is_describable(q) and is_describable(o)
    config = cached_config(
        select_config.gemm_config,
        target,
        p.element_size(),
        *o.shape,
        u.shape[1],
        aligned=aligned,
        segments=0 if segments is None else segments.count,
    )
    lora_gemm(
        o, p, q, u, v, scale, config,
        bias=bias, keep_bits=keep_bits, inv_keep=inv_keep, input_precision=precision_of(p),
        segments=None if segments is None else segments.blocks(config.block_m),
    )  # fmt: skip
    return o


def run_add(
    o,
    u,
    v,
    scale,
    target,
    keep_bits=None,
    inv_keep=1.0,
    base=None,
    bias=None,
    like=None,
    segments=None,
) -> None:
    """Write ``o = base + scale · D(u v) + bias``.

    ``like`` has the product's dtype, by default o's. With ``(n, M, words)`` keep bits the sum of n
    members' products is added; with :class:`.Segments` v is a stack ``(G, R, N)``.
    """
    like, members = o if like is None else like, members_of(keep_bits)
    config = cached_config(
        select_config.add_config,
        target,
        like.element_size(),
        *o.shape,
        u.shape[1] // members,
        members=members,
        segments=0 if segments is None else segments.count,
    )
    lora_add(
        o, u, v, scale, config,
        base=base, dot_dtype=like.dtype, bias=bias,
        keep_bits=keep_bits, inv_keep=inv_keep, input_precision=precision_of(like),
        segments=None if segments is None else segments.blocks(config.block_m),
    )  # fmt: skip


def _single_pass(p, q, z, v, scale, target, scale_u=False, bias=None, keep_bits=None, inv_keep=1.0):
    q = inner_dense(q)
    o = torch.empty((p.shape[0], q.shape[1]), dtype=p.dtype, device=p.device)
    u = rank_matrix(p.shape[0], z.shape[1], p)
    config = cached_config(
        select_config.single_pass_config,
        target,
        p.element_size(),
        *o.shape,
        u.shape[1],
        describable=is_describable(p) and is_describable(q),
    )
    single_pass(
        o, u, p, q, z.to(p.dtype), v, scale, config,
        scale_u=scale_u, bias=bias,
        keep_bits=keep_bits, inv_keep=inv_keep, input_precision=precision_of(p),
    )  # fmt: skip
    return o, u


def run_rank_grad(
    o, u, p, scale, target, tickets, keep_bits=None, inv_keep=1.0, segments=None
) -> None:
    """Write ``o = scale · uᵀ D(p)``; with ``(n, M, words)`` keep bits for n members.

    With :class:`.Segments` o is a stack ``(G, R, L)``.
    """
    (M, L), members = p.shape, members_of(keep_bits)
    R = u.shape[1] // members
    masked = keep_bits is not None
    if segments is None and not rank_grad_applies(M, R, masked=masked):
        # the vendor's GEMM is better
        product = _wide_mm(u.to(p.dtype).t(), p)
        o.copy_(product) if scale is None else torch.mul(product, scale, out=o)
        return
    config = cached_config(
        select_config.rank_grad_config,
        target,
        p.element_size(),
        M,
        L,
        R,
        describable=is_describable(p),
        members=members,
        segments=0 if segments is None else segments.count,
    )
    rank_grad(
        o, u, p, scale, config,
        keep_bits=keep_bits, inv_keep=inv_keep, input_precision=precision_of(p),
        tickets=_enough(tickets, members * config.blocks(R, L, R)),
        segments=None if segments is None else segments.items(),
    )  # fmt: skip


def _enough(tickets: Tensor | None, blocks: int) -> Tensor | None:
    """``tickets``, or None if there are too few: then the launcher makes its own."""
    return tickets if tickets is not None and tickets.numel() >= blocks else None


def run_thin_pair(dB: Tensor, dy, S, lora_B, scale, target, tickets) -> Tensor | None:
    """Write ``dB`` and return ``G``, in one pass over dY; None if two passes move fewer bytes.

    Sets ``tickets``, if any, to 0.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    config = cached_config(
        select_config.thin_pair_config,
        target,
        dy.element_size(),
        M,
        N,
        R,
        describable=is_describable(dy),
    )
    if config is None:
        return None
    G = rank_matrix(M, R, dy)
    thin_pair(G, dB, dy, lora_B.to(dy.dtype), inner_contiguous(S), scale, config, tickets=tickets)
    return G


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in fp32, as the accumulator holds it."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # interpreted


@lru_cache(maxsize=4096)
def cached_config(choose, *args, **kwargs) -> Config:
    """``choose(*args, **kwargs)``, cached: ``launch`` identifies a config by its ``id``."""
    return choose(*args, **kwargs)


def rank_matrix(M: int, R: int, like: Tensor) -> Tensor:
    """An uninitialised ``(M, R)`` in ``like``'s dtype whose rows start on 16-byte boundaries."""
    vector = VECTOR_BYTES // like.element_size()
    return like.new_empty((M, cdiv(R, vector) * vector))[:, :R]


def inner_contiguous(t: Tensor) -> Tensor:
    """``t`` with inner stride 1; its rows may have any stride, and may overlap."""
    if t.stride(1) == 1:
        return t
    if t.shape[1] == 1:  # any stride is valid, and ``contiguous`` keeps it
        return t.as_strided(t.shape, (t.stride(0), 1))
    return t.contiguous()


def inner_dense(t: Tensor) -> Tensor:
    """A matrix, or a stack of matrices, one of whose inner strides is 1."""
    return t if 1 in t.stride()[-2:] else t.contiguous()


def is_describable(t: Tensor) -> bool:
    """Whether a tensor descriptor (or a 16-byte copy) can address the rows of ``t`` or ``tᵀ``.

    Of a stack: those of every matrix.
    """
    if t.dim() == 3:
        return is_describable(t[0]) and is_aligned(t.stride(0) * t.element_size())
    (pitch, inner), (rows, columns) = t.stride(), t.shape
    if inner != 1 and pitch == 1:
        pitch, inner, columns = inner, pitch, rows
    return inner == 1 and pitch >= columns and is_aligned(pitch * t.element_size(), t.data_ptr())


def precision_of(t: Tensor) -> str:
    """TF32 only if the user allowed it in PyTorch's settings."""
    allowed = t.dtype == torch.float32 and t.is_cuda and not torch.version.hip
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
