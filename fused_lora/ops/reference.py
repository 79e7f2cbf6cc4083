"""The formulas in differentiable eager PyTorch: the oracle for every other implementation.

    S  = D(x) Aᵀ            y  = x Wᵀ + bias + s·S Bᵀ
    G  = s·dY B             dx = dY W + D(G A)         dA = Gᵀ D(x)         dB = s·dYᵀ S

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operands import BackwardOperands
from . import activations
from .cpu_gemm import HALF
from .dropout import KEEP_ALL, keep_mask, make_keep_bits
from .modes import is_differentiated
from .operands import Operands, Projection
from .segments import keep_bits_of
from .torch_impl import as_dtype


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    mask: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``y`` from ``x (..., K)``; ``mask`` is ``D`` as a matrix of 0 and 1/(1-p), or None.

    ``base (..., N)``, if given, replaces ``x Wᵀ + bias``; ``y`` then has its dtype.
    """
    dropped = x if mask is None else x * mask.view(x.shape)
    S = F.linear(dropped, lora_A.to(x.dtype))
    if base is None:
        base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return (base + scaled(F.linear(S, lora_B.to(x.dtype)), scaling)).to(base.dtype)


def scaled(branch: Tensor, scaling: float | Tensor) -> Tensor:
    """``scaling · branch`` in branch's dtype, the product rounded but not the scale."""
    if isinstance(scaling, Tensor):
        return as_dtype(branch * _factor(scaling, branch), branch.dtype)
    return scaling * branch


def add_scaled(base: Tensor, branch: Tensor, scaling: float | Tensor) -> Tensor:
    """``base + scaling · branch`` in base's dtype; no half-precision tensor has the scale."""
    if isinstance(scaling, Tensor):
        y = torch.addcmul(base, branch, _factor(scaling, branch))
    elif branch.dtype in HALF:  # torch.add would round the scale
        y = torch.addcmul(base, branch, branch.new_ones(1), value=scaling)
    else:
        y = torch.add(base, branch, alpha=scaling)
    return as_dtype(y, base.dtype)


def _factor(scaling: Tensor, branch: Tensor) -> Tensor:
    """The 0-d scale as a factor of ``branch``.

    As one element ``(1,)`` a float32 scale widens an operator in half precision; without a
    dimension it would be rounded. A copy, if it may be written in place before backward.
    """
    if is_differentiated(branch):
        scaling = scaling.clone()
    return scaling.reshape(1) if branch.dtype in HALF else scaling


def forward(operands: Operands) -> Tensor:
    """``y (..., N)`` of one call, with the same dropout mask as every other implementation."""
    x, weight, lora_A, lora_B, bias, scaling, seed, keep_count, _, base = operands
    mask = None
    if seed is not None:
        K = x.shape[-1]
        keep_bits = make_keep_bits(seed, x.numel() // max(1, K), K, keep_count)
        mask = keep_mask(keep_bits, K, x.dtype) * (KEEP_ALL / keep_count)
    return lora_linear(x, weight, lora_A, lora_B, bias, scaling, mask, base)


def projection(x: Tensor, layer: Projection, mask: Tensor | None = None) -> Tensor:
    """The output of one projection, with or without an adapter."""
    weight, lora_A, lora_B, bias, scaling, _ = layer
    if lora_A is None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return lora_linear(x, weight, lora_A, lora_B, bias, scaling, mask)


def gated_mlp(
    x: Tensor,
    layers: Sequence[Projection],
    activation: str,
    masks: Sequence[Tensor | None] = (None,) * 3,
) -> Tensor:
    """``down(act(gate(x)) · up(x))``; the masks are as in :func:`lora_linear`."""
    gate, up = (projection(x, layers[i], masks[i]) for i in range(2))
    return projection(activations.FORWARD[activation](gate) * up, layers[2], masks[2])


def segmented(operands, keep_bits: Tensor | None = None) -> Tensor:
    """``y (M, N)`` of rows sorted into segments, see :class:`.segmented.SegmentedOperands`.

    Args:
        keep_bits: the packed mask; None: computed from the seed, if there is one.
    """
    x, weight, lora_A, lora_B, bias, scaling, segments, seed, keep_counts, _ = operands
    bounds = segments.bounds
    if keep_bits is None and seed is not None:
        keep_bits = keep_bits_of(seed, segments, *x.shape, keep_counts)
    parts = []
    for g, (a, b) in enumerate(bounds):
        # If no segment has rows, the first one connects y to the operands.
        if a == b and (g or bounds[-1][1]):
            continue
        W = weight[g] if weight.dim() == 3 else weight
        own = bias if bias is None or bias.dim() == 1 else bias[g]
        mask = None
        if keep_counts[g] < KEEP_ALL:
            mask = keep_mask(keep_bits[a:b], x.shape[1], x.dtype) * (KEEP_ALL / keep_counts[g])
        layer = Projection(W, lora_A[g], lora_B[g], own, scaling[g])
        parts.append(projection(x[a:b], layer, mask))
    rest = x[bounds[-1][1] :]
    if weight.dim() == 3:
        parts.append(rest.new_zeros((rest.shape[0], weight.shape[1])))
    else:
        shared = None if bias is None or bias.dim() == 2 else bias
        parts.append(projection(rest, Projection(weight, bias=shared)))
    return torch.cat(parts)


def backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, differentiable in ``dy``, ``x`` and the parameters.

    ``S`` is computed again from ``x``, if that was saved, so that derivatives pass through it. All
    but the base product is computed in at least float32, so no half-precision result has the scale.
    """
    dy, x, weight, lora_A, lora_B, S, scaling, keep_bits, inv_keep, needs = operands
    dtype = torch.promote_types(dy.dtype, torch.float32)
    wide_dy, A, B = dy.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
    dx = dA = dB = mask = None
    dropped = None if x is None else x.to(dtype)
    if keep_bits is not None:
        mask = keep_mask(keep_bits, lora_A.shape[1], dtype) * inv_keep
        dropped = None if x is None else dropped * mask
    G = scaling * (wide_dy @ B)
    if needs[0]:
        dx = G @ A
        if mask is not None:
            dx = dx * mask
        if weight is not None:
            dx = dy @ weight.to(dy.dtype) + dx
        dx = dx.to(dy.dtype)
    if needs[1]:
        dA = (G.t() @ dropped).to(lora_A.dtype)
    if needs[2]:
        S = S.to(dtype) if dropped is None else dropped @ A.t()
        dB = (scaling * (wide_dy.t() @ S)).to(lora_B.dtype)
    return dx, dA, dB


def base_gradient(dy: Tensor, weight: Tensor, dx: Tensor | None = None) -> Tensor:
    """``dx + dY W``, differentiable in ``dy`` and ``dx``."""
    product = dy @ weight.to(dy.dtype)
    return product if dx is None else dx + product


def thin_gradients(
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float | Tensor,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """``G = s·dY B`` and ``dB = s·dYᵀ S``, differentiable in all tensors but the scale."""
    dtype = torch.promote_types(dy.dtype, torch.float32)
    wide_dy = dy.to(dtype)
    G = scaling * (wide_dy @ lora_B.to(dtype)) if needs[0] else None
    dB = (scaling * (wide_dy.t() @ S.to(dtype))).to(lora_B.dtype) if needs[1] else None
    return G, dB


def input_gradients(
    x: Tensor | None,
    dx: Tensor | None,
    adapters: Sequence[Tensor | None],
    G: Sequence[Tensor | None],
    keep_bits: Sequence[Tensor | None],
    inv_keeps: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx + Σ D_i(G_i A_i)`` and the ``dA_i = G_iᵀ D_i(x)``, differentiable in all tensors."""
    dA: list[Tensor | None] = [None] * len(adapters)
    for i, (lora_A, g, bits) in enumerate(zip(adapters, G, keep_bits, strict=True)):
        if g is None:
            continue
        dtype = torch.promote_types(g.dtype, torch.float32)
        A, g, mask = lora_A.to(dtype), g.to(dtype), None
        if bits is not None:
            mask = keep_mask(bits, A.shape[1], dtype) * inv_keeps[i]
        if dx is not None:
            branch = g @ A
            dx = (dx.to(dtype) + (branch if mask is None else branch * mask)).to(dx.dtype)
        if needs[i]:
            dropped = x.to(dtype) if mask is None else x.to(dtype) * mask
            dA[i] = (g.t() @ dropped).to(lora_A.dtype)
    return dx, dA
