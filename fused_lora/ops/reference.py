"""The formulas in differentiable eager PyTorch: the oracle for every other implementation.

    S  = D(x) Aᵀ            y  = x Wᵀ + bias + s·S Bᵀ
    G  = s·dY B             dx = dY W + D(G A)         dA = Gᵀ D(x)         dB = s·dYᵀ S

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operands import BackwardOperands
from .dropout import KEEP_ALL, keep_mask, make_keep_bits
from .operands import Operands


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
    return (base + scaling * F.linear(S, lora_B.to(x.dtype))).to(base.dtype)


def add_scaled(base: Tensor, branch: Tensor, scaling: float | Tensor) -> Tensor:
    """``base + scaling · branch`` in base's dtype; no half-precision tensor has the scale."""
    if isinstance(scaling, Tensor):
        # One element of float32 widens the operator; a 0-d tensor would be rounded to half.
        return torch.addcmul(base, branch, scaling.reshape(1)).to(base.dtype)
    return torch.add(base, branch, alpha=scaling).to(base.dtype)


def forward(operands: Operands) -> Tensor:
    """``y (..., N)`` of one call, with the same dropout mask as every other implementation."""
    x, weight, lora_A, lora_B, bias, scaling, seed, keep_count, _, base = operands
    mask = None
    if seed is not None:
        K = x.shape[-1]
        keep_bits = make_keep_bits(seed, x.numel() // max(1, K), K, keep_count)
        mask = keep_mask(keep_bits, K, x.dtype) * (KEEP_ALL / keep_count)
    return lora_linear(x, weight, lora_A, lora_B, bias, scaling, mask, base)


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
