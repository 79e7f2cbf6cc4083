"""The pure-PyTorch implementation: CPU, MPS and any other device.

Same formulas and same saved state as the kernels. ``1/(1-p)`` and ``s`` multiply the thin S and G
only; the low-rank product accumulates into the base output in place; nothing of size M×N or M×K is
made but the results, and with dropout the mask and in backward one temporary.

On a CPU without instructions for a half-precision dtype, PyTorch's products of that dtype are plain
loops, 10 to 60 times slower than float32's. Ours are then float32's, on widened operands: ``x`` and
``dY`` whole, the weight in blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout
from .constants import constant
from .cpu_gemm import is_widened, thin_products, wide_product
from .modes import is_observed

dropout_mask = dropout.make_keep_bits

_zeros: dict[torch.dtype, Tensor] = {}  # a CPU's, by dtype


# ``as_dtype`` is written out where every call comes by: a frame of Python costs a microsecond where
# the product before has emptied the caches.


def forward(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    keep_bits: Tensor | None,
    inv_keep: float,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y (M,N)`` and ``S (M,R)`` from ``x (M,K)``, in x's dtype.

    S may lie in either layout, and is wider where :func:`thin_products` says so.

    With ``base (M,N)`` in place of a weight, ``y`` is ``base`` and the low-rank product, in base's
    dtype.
    """
    given = x.dtype
    dtype, turned = thin_products(x, lora_A)
    A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
    if keep_bits is not None:
        # ``D(x)`` but for its factor, over the mask: another large temporary would cost more.
        operand = dropout.keep_mask(keep_bits, x.shape[1], dtype).mul_(x)
    else:
        operand = x if dtype is given else x.to(dtype)
    S = _scaled_mm(operand, A.t(), scaling, inv_keep, turned)
    Bt = B.t()
    if base is None:
        # After S, so that y is still in the cache when S Bᵀ is added: 0.05 of a CPU's step.
        if weight.dtype != given:
            weight = weight.to(given)
        if bias is not None and bias.dtype != given:
            bias = bias.to(given)
        if dtype is not given and is_widened(x, weight, 1):
            if keep_bits is not None:
                del operand
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


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float | Tensor,
    keep_bits: Tensor | None,
    inv_keep: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)`` from ``dy (M,N)``; None where ``needs`` is false.

    Without a weight, ``dx`` is the adapter's part alone.
    """
    given = dy.dtype
    dtype, turned = thin_products(dy, lora_A)
    dx = dA = dB = mask = None
    wide_dy = dy if dtype is given else dy.to(dtype)
    # The thin products come first: what they read is still in the cache, or will be.
    if needs[2]:
        dB = _rank_gradient(wide_dy, S if S.dtype == dtype else S.to(dtype), lora_B.dtype, turned)
    if needs[0] or needs[1]:
        if keep_bits is not None:
            mask = dropout.keep_mask(keep_bits, lora_A.shape[1], dtype)
        # Carries 1/(1-p) for both of its uses, so the mask itself stays zeros and ones.
        B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
        G = _scaled_mm(wide_dy, B, scaling, inv_keep, turned)
    if needs[0]:
        A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    if needs[0] and mask is not None:
        dx = _input_gradient(dy, wide_dy, weight, G, A, mask)
    if needs[1]:
        if mask is not None:
            dropped = mask.mul_(x)
        else:
            dropped = x if dtype is given else x.to(dtype)
        dA = _mm_as(G.t(), dropped, lora_A.dtype)
        del dropped  # widened, it is as large as two of x
    if needs[0] and mask is None:
        dx = _input_gradient(dy, wide_dy, weight, G, A, None)
    return dx, dA, dB


def _input_gradient(dy, wide_dy, weight: Tensor | None, G, A, mask: Tensor | None) -> Tensor:
    """``dY W + D(G A)``; ``wide_dy`` is dY in the thin products' dtype."""
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
    """``scaling · inv_keep · a b``, rounded once where the scale is a number."""
    if turned:
        return _scaled_mm(b.t(), a.t(), scaling, inv_keep, False).t()
    if isinstance(scaling, Tensor) or scaling == 0:  # alpha=0 would skip NaN and inf
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
    """``t.to(dtype)``, which takes a microsecond to find that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
