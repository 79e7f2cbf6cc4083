"""The pure-PyTorch implementation: CPU, MPS and any other device.

Formulas and saved state are those of the kernels. ``s`` multiplies sums in at least float32, before
they are rounded: as a number it is the ``alpha`` of a product. The low-rank product accumulates
into the base output in place. No matrix of size M×N or M×K is allocated except the results and,
with dropout, the mask and one temporary in backward. Forward allocates one more in half precision
if the scale is a tensor, and both directions do for few rows or columns (see ``sums_apart``).

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
from .cpu_gemm import HALF, is_widened, sums_apart, thin_products, wide_product, wide_sum
from .modes import is_observed

_zeros: dict[torch.dtype, Tensor] = {}  # on the CPU, by dtype


# Below, ``as_dtype`` and the common cases of the helpers are inlined on the hot path: with cold
# caches a Python call costs about 1 µs.


def forward(
    operands: ForwardOperands, keep_bits: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y (M,N)`` and ``S (M,R)``, in x's dtype, and the keep bits or None; ``S`` is unscaled.

    With a seed, ``keep_bits`` are computed from it unless they are given. ``S`` may be row-major or
    column-major. Its dtype is that of :func:`.cpu_gemm.thin_products`, which can be wider.
    """
    x, weight, lora_A, lora_B, bias, scaling, seed, keep_count, base = operands
    if seed is not None and keep_bits is None:
        keep_bits = dropout.make_keep_bits(seed, *x.shape, keep_count)
    given = x.dtype
    dtype, turned = thin_products(x, lora_A.shape[0], lora_A.dtype)
    A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
    if keep_bits is not None:
        # ``D(x)`` without its factor, written over the mask to save a large temporary.
        operand = dropout.keep_mask(keep_bits, x.shape[1], dtype).mul_(x)
    else:
        operand = x if dtype is given else x.to(dtype)
    if keep_bits is None and not turned:
        S = torch.mm(operand, A.t())
    else:
        S = times(dropout.KEEP_ALL / keep_count, operand, A.t(), turned)
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
            y = wide_product(operand, weight.t(), S, Bt, scaling, given, bias=bias)
            return y, S, keep_bits
        y = F.linear(x, weight, bias)
        is_common = dtype is given and type(scaling) is float and scaling and not turned
        if is_common and B.stride(1) == 1:
            return y.addmm_(S, Bt, alpha=scaling), S, keep_bits
    else:
        del operand
        is_common = base.dtype == dtype and type(scaling) is float and scaling
        if is_common and Bt.stride(0) == 1 and (not turned or sums_apart(S, Bt.shape[1])):
            return torch.addmm(base, S, Bt, alpha=scaling), S, keep_bits
        y = base.clone(memory_format=torch.contiguous_format)
    return add_product(y, S, Bt, scaling), S, keep_bits


def rank_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """The dtype in which :func:`forward` returns ``S`` for ``x (M,K)``."""
    return thin_products(x, lora_A.shape[0], lora_A.dtype)[0]


def backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)``, each in the dtype of its tensor."""
    dy, x, weight, lora_A, lora_B, S, scaling, keep_bits, inv_keep, needs = operands
    given = dy.dtype
    dtype, turned = thin_products(dy, lora_A.shape[0], lora_A.dtype)
    dx = dA = dB = mask = None
    wide_dy = dy if dtype is given else dy.to(dtype)
    # The thin products come first: dY is still in the cache, or they load it for dx.
    is_common = type(scaling) is float and scaling and not turned
    if needs[2]:
        wide_S = S if S.dtype == dtype else S.to(dtype)
        if is_common and lora_B.dtype == dtype:
            dB = torch.addmm(lora_B, wide_dy.t(), wide_S, beta=0, alpha=scaling)
        else:
            dB = scaled_mm(wide_dy.t(), wide_S, scaling, lora_B.dtype, turned)
            if turned:
                dB = dB.contiguous()
    if needs[0] or needs[1]:
        if keep_bits is not None:
            mask = dropout.keep_mask(keep_bits, lora_A.shape[1], dtype)
        B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
        if is_common and needs[2]:
            G = torch.addmm(wide_S, wide_dy, B, beta=0, alpha=scaling)
        else:
            G = scaled_mm(wide_dy, B, scaling, dtype, turned)
    if needs[0]:
        A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    # The mask is zeros and ones: its factor ``inv_keep`` multiplies the products.
    if needs[0] and mask is not None:  # before dA, which overwrites the mask
        dx = _input_gradient(dy, wide_dy, weight, G, A, inv_keep, mask)
    if needs[1]:
        if mask is not None:
            dropped = mask.mul_(x)
        else:
            dropped = x if dtype is given else x.to(dtype)
        if mask is None and lora_A.dtype == dtype:
            dA = torch.mm(G.t(), dropped)
        else:
            dA = scaled_mm(G.t(), dropped, inv_keep, lora_A.dtype)
        del dropped  # if widened, it takes twice the memory of x
    if needs[0] and mask is None:
        dx = _input_gradient(dy, wide_dy, weight, G, A, 1.0, None)
    return dx, dA, dB


def _input_gradient(dy, wide_dy, weight: Tensor | None, G, A, inv_keep, mask: Tensor | None):
    """``dY W + inv_keep · mask · G A``; ``wide_dy`` is dY in the dtype of the thin products."""
    if weight is None:
        if mask is not None and G.dtype == torch.float16:
            # The mask comes first: the factor may overflow, and 0 · inf is NaN.
            dx = torch.mm(G, A).mul_(mask).mul_(inv_keep)
        else:
            dx = times(inv_keep, G, A)
            if mask is not None:
                dx.mul_(mask)
        return dx if dx.dtype == dy.dtype else dx.to(dy.dtype)
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    if wide_dy is not dy and is_widened(dy, weight, 0):
        return wide_product(wide_dy, weight, G, A, inv_keep, dy.dtype, mask=mask)
    if mask is None and dy.dtype == G.dtype and G.dtype not in HALF:
        # If the second product is not summed apart, it rounds the first's sum once per term.
        if (
            not sums_apart(G, A.shape[1])
            and (A.shape[0] > weight.shape[0] or weight.stride(0) == 1)
            and type(weight) in (Tensor, torch.nn.Parameter)
        ):
            return torch.mm(G, A).addmm_(dy, weight)
        return torch.mm(dy, weight).addmm_(G, A)
    dx = torch.mm(dy, weight)
    if mask is not None:
        return dx.addcmul_(torch.mm(G, A), mask, value=inv_keep)
    return add_product(dx, G, A, 1.0)


def add_product(y: Tensor, U: Tensor, V: Tensor, scaling: float | Tensor) -> Tensor:
    """Add ``scaling · U V`` to ``y`` in place; returns it."""
    if isinstance(scaling, Tensor) or scaling == 0:  # alpha=0 would not propagate NaN and inf
        if U.dtype not in HALF:
            return add_product(y, U * scaling, V, 1.0)
        branch = torch.mm(U, V)
        if not isinstance(scaling, Tensor):
            return y.add_(branch, alpha=scaling)
        # In float32: an elementwise operator rounds a 0-d tensor to the dtype of its other
        # operands, but one element of float32 widens them.
        scaling = scaling.to(torch.promote_types(scaling.dtype, torch.float32))
        return y.addcmul_(branch, scaling.reshape(1))
    if U.dtype == y.dtype and (
        (V.stride(0) == 1 == U.stride(1)) or y.dtype in HALF or sums_apart(U, V.shape[1])
    ):
        return y.addmm_(U, V, alpha=scaling)
    return y.add_(torch.mm(U, V), alpha=scaling)


def times(factor: float, a: Tensor, b: Tensor, turned: bool = False) -> Tensor:
    """``factor · a b``, rounded once.

    Args:
        factor: not 0, whose product would not propagate NaN and infinity.
        turned: whether to compute the transpose, ``bᵀ aᵀ``.
    """
    if turned:
        return times(factor, b.t(), a.t()).t()
    if factor == 1:
        return torch.mm(a, b)
    ignored = _zeros.get(a.dtype) if type(a) is Tensor and a.is_cpu else None
    if ignored is None:
        # Zeros, since compilers and vmap compute 0 · ignored. Not cached on a GPU, where the tensor
        # may lie in the memory pool of one of inductor's CUDA graphs.
        ignored = a.new_zeros(())
        if type(a) is Tensor and a.is_cpu and not is_observed():
            _zeros[a.dtype] = ignored
    return torch.addmm(ignored, a, b, beta=0, alpha=factor)


def scaled_mm(
    a: Tensor, b: Tensor, scaling: float | Tensor, dtype: torch.dtype, turned: bool = False
) -> Tensor:
    """``scaling · a b`` in ``dtype``; ``turned`` as above.

    Float16 is rounded to once, from scaled float32 sums. On a CPU, where float32 sums cost a tenth
    of a step, bfloat16 products are rounded as eager rounds them: with float32's range, none are
    lost.
    """
    is_half, in_bfloat16 = a.dtype in HALF, a.dtype == torch.bfloat16 and not a.is_cuda
    if not isinstance(scaling, Tensor) and scaling != 0 and (a.dtype == dtype or in_bfloat16):
        product = times(scaling, a, b, turned)
    else:
        if not is_half or in_bfloat16:
            product = times(1.0, a, b, turned)
            product = product.float() if is_half else product
        elif a.is_cuda:
            product = torch.mm(a, b, out_dtype=torch.float32)
        else:
            product = wide_sum(a, b)
        if type(scaling) is not float or scaling != 1:
            product.mul_(scaling)
    return product if product.dtype == dtype else product.to(dtype)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, but without the microsecond that it takes as a no-op.

    An export would record the no-op, with an assertion that refuses a later cast of the model.
    """
    return t if t.dtype == dtype else t.to(dtype)
