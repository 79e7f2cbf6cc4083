"""The pure-PyTorch implementation: CPU, MPS and any other device.

Formulas and saved state are those of the kernels. ``1/(1-p)`` and ``s`` multiply only the thin S
and G, and the low-rank product accumulates into the base output in place. No matrix of size M×N or
M×K is allocated except the results and, with dropout, the mask and one temporary in backward.

On a CPU without instructions for a half-precision dtype, PyTorch's products in that dtype are plain
loops, 10 to 60 times slower than in float32. This module then computes in float32 on widened
operands: ``x`` and ``dY`` are widened whole, the weight in blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operands import BackwardOperands, ForwardOperands
from . import dropout
from .constants import constant
from .cpu_gemm import is_widened, thin_products, wide_product
from .modes import is_observed

make_keep_bits = dropout.make_keep_bits

_zeros: dict[torch.dtype, Tensor] = {}  # on the CPU, by dtype


# Below, ``as_dtype`` is inlined on the hot path: with cold caches a Python call costs about 1 µs.


def forward(operands: ForwardOperands) -> tuple[Tensor, Tensor]:
    """``y (M,N)`` and ``S (M,R)``, in x's dtype.

    ``S`` may be row-major or column-major. Its dtype is that of :func:`.cpu_gemm.thin_products`,
    which can be wider.
    """
    x, weight, lora_A, lora_B, bias, scaling, keep_bits, inv_keep, base = operands
    given = x.dtype
    dtype, turned = thin_products(x, lora_A)
    A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
    if keep_bits is not None:
        # ``D(x)`` without its factor, written over the mask to save a large temporary.
        operand = dropout.keep_mask(keep_bits, x.shape[1], dtype).mul_(x)
    else:
        operand = x if dtype is given else x.to(dtype)
    S = _scaled_mm(operand, A.t(), scaling, inv_keep, turned)
    Bt = B.t()
    if base is None:
        # After S, so that y is still in the cache when S Bᵀ is added: saves 5 % of a CPU's step.
        if weight.dtype != given:
            weight = weight.to(given)
        if bias is not None and bias.dtype != given:
            bias = bias.to(given)
        if dtype is not given and is_widened(x, weight, 1):
            if keep_bits is not None:
                del operand  # D(x); the base product reads x
                operand = x.to(dtype)
            return wide_product(operand, weight.t(), S, Bt, given, bias=bias), S
        y = F.linear(x, weight, bias)
        return y.addmm_(S, Bt) if dtype is given else y.add_(torch.mm(S, Bt)), S
    if base.dtype == dtype:
        return torch.addmm(base, S, Bt), S
    del operand
    branch = torch.mm(S, Bt)
    if torch.promote_types(base.dtype, dtype) == dtype:
        return branch.add_(base).to(base.dtype), S
    return (base + branch).to(base.dtype), S


def backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, each in the dtype of its tensor."""
    dy, x, weight, lora_A, lora_B, S, scaling, keep_bits, inv_keep, needs = operands
    given = dy.dtype
    dtype, turned = thin_products(dy, lora_A)
    dx = dA = dB = mask = None
    wide_dy = dy if dtype is given else dy.to(dtype)
    # The thin products come first: dY is still in the cache, or they load it for dx.
    if needs[2]:
        dB = _rank_gradient(wide_dy, S if S.dtype == dtype else S.to(dtype), lora_B.dtype, turned)
    if needs[0] or needs[1]:
        if keep_bits is not None:
            mask = dropout.keep_mask(keep_bits, lora_A.shape[1], dtype)
        # G carries 1/(1-p) for both dx and dA, so that the mask stays zeros and ones.
        B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
        G = _scaled_mm(wide_dy, B, scaling, inv_keep, turned)
    if needs[0]:
        A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    if needs[0] and mask is not None:  # before dA, which overwrites the mask
        dx = _input_gradient(dy, wide_dy, weight, G, A, mask)
    if needs[1]:
        if mask is not None:
            dropped = mask.mul_(x)
        else:
            dropped = x if dtype is given else x.to(dtype)
        dA = _mm_as(G.t(), dropped, lora_A.dtype)
        del dropped  # if widened, it takes twice the memory of x
    if needs[0] and mask is None:
        dx = _input_gradient(dy, wide_dy, weight, G, A, None)
    return dx, dA, dB


def _input_gradient(dy, wide_dy, weight: Tensor | None, G, A, mask: Tensor | None) -> Tensor:
    """``dY W + D(G A)``; ``wide_dy`` is dY in the dtype of the thin products."""
    if weight is None:
        dx = torch.mm(G, A)
        if mask is not None:
            dx.mul_(mask)
        return dx if dx.dtype == dy.dtype else dx.to(dy.dtype)
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    if wide_dy is not dy and is_widened(dy, weight, 0):
        return wide_product(wide_dy, weight, G, A, dy.dtype, mask=mask)
    dx = torch.mm(dy, weight)
    if mask is not None:
        return dx.addcmul_(torch.mm(G, A), mask)
    return dx.addmm_(G, A) if G.dtype == dx.dtype else dx.add_(torch.mm(G, A))


def _scaled_mm(
    a: Tensor, b: Tensor, scaling: float | Tensor, inv_keep: float, turned: bool
) -> Tensor:
    """``scaling · inv_keep · a b``, rounded once if the scale is a number.

    Args:
        turned: whether to compute the transpose, ``bᵀ aᵀ``.
    """
    if turned:
        return _scaled_mm(b.t(), a.t(), scaling, inv_keep, False).t()
    if isinstance(scaling, Tensor) or scaling == 0:  # alpha=0 would not propagate NaN and inf
        return torch.mm(a, b).mul_(scaling * inv_keep)
    ignored = _zeros.get(a.dtype) if type(a) is Tensor and a.is_cpu else None
    if ignored is None:
        ignored = constant(_zero, a.dtype, a.device)
        if ignored.is_cpu and not is_observed():
            _zeros[a.dtype] = ignored
    return torch.addmm(ignored, a, b, beta=0, alpha=scaling * inv_keep)


def _rank_gradient(dy: Tensor, S: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    """``dYᵀ S``, contiguous."""
    if not turned:
        return _mm_as(dy.t(), S, dtype)
    dB = torch.mm(S.t(), dy).t()
    if dB.dtype == dtype:
        return dB.contiguous()
    return dB.to(dtype, memory_format=torch.contiguous_format)


def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` in ``dtype``: from the fp32 accumulator where the device can, else converted."""
    if dtype == torch.float32 and a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    product = torch.mm(a, b)
    return product if product.dtype == dtype else product.to(dtype)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, but without the microsecond that it takes as a no-op."""
    return t if t.dtype == dtype else t.to(dtype)
