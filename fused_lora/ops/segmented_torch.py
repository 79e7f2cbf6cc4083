"""The layer over rows sorted into segments, in PyTorch: the parts of :mod:`.segmented`.

The formulas are those of :mod:`.torch_impl` for each segment, so are the results from four rows on.
Nothing passes from one segment to another: not even a NaN. Experts' calls that are faster
with wide products run in :mod:`.segmented_wide`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dropout, segmented_wide
from .cpu_gemm import is_widened, thin_products, wide_product
from .segments import Bounds, Segments, keep_bits_of, ranks_of
from .shared_input import needs_new_tensors
from .torch_impl import add_product, as_dtype, scaled_mm, times


class Adapters:
    """The adapters of all segments, each in the dtype that a product needs.

    A stack is cast once and whole: a cast of each matrix would cost more than the product.

    Args:
        A, B: stacks ``(G, R, K)`` and ``(G, N, R)``, or lists of ``(R_g, K)`` and ``(N, R_g)``;
            None in the lists is a segment without an adapter.
    """

    def __init__(self, A: Tensor | Sequence[Tensor | None], B: Tensor | Sequence[Tensor | None]):
        self.given = A, B
        self.ranks = ranks_of(A)
        self._cast: dict[tuple[int, torch.dtype], Sequence[Tensor]] = {}

    def dtype(self, which: int, g: int) -> torch.dtype:
        """The dtype that ``A_g`` (0) or ``B_g`` (1) is given in."""
        given = self.given[which]
        return (given if isinstance(given, Tensor) else given[g]).dtype

    def matrix(self, which: int, g: int, dtype: torch.dtype) -> Tensor:
        """``A_g`` (0) or ``B_g`` (1) in ``dtype``."""
        given = self.given[which]
        if not isinstance(given, Tensor):
            return as_dtype(given[g], dtype)
        if (which, dtype) not in self._cast:
            self._cast[which, dtype] = as_dtype(given, dtype).contiguous().unbind()
        return self._cast[which, dtype][g]


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor | None],
    lora_B: Tensor | Sequence[Tensor | None],
    bias: Tensor | None,
    scaling: Sequence[float | Tensor],
    segments: Segments,
    seed: Tensor | None,
    keep_counts: Sequence[int],
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """``y (M, N)``; each ``S_g``, unscaled, None without rows or an adapter; and the keep bits.

    See :class:`.segmented.SegmentedOperands`.
    """
    if segmented_wide.is_wide(x, weight, lora_A, scaling, keep_counts):
        operands = x, weight, lora_A, lora_B, bias, scaling[0], segments
        return *segmented_wide.forward(*operands), None
    adapters, bounds, keep_bits = Adapters(lora_A, lora_B), segments.bounds, None
    if seed is not None:
        keep_bits = keep_bits_of(seed, segments, *x.shape, keep_counts)
    weight = as_dtype(weight, x.dtype)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    varies = weight.dim() == 3  # the rows of an expert
    at_once = weight.dim() == 2 and not is_widened(x, weight, 1)
    if at_once:
        y = F.linear(x, weight, bias if bias is None or bias.dim() == 1 else None)
    else:
        y = x.new_empty((x.shape[0], weight.shape[-2]))
        _rest(y, bounds, x, weight, bias)
    S: list[Tensor | None] = [None] * len(bounds)
    for g, (a, b) in enumerate(bounds):
        if a == b:
            continue
        xs, ys, Bt = x[a:b], y[a:b], None
        if (rank := adapters.ranks[g]) is not None:
            dtype, turned = thin_products(xs, rank, adapters.dtype(0, g), varies)
            At = adapters.matrix(0, g, dtype).t()
            if keep_counts[g] == dropout.KEEP_ALL:
                S[g] = times(1.0, as_dtype(xs, dtype), At, turned)
            else:
                dropped = dropout.keep_mask(keep_bits[a:b], xs.shape[1], dtype).mul_(xs)
                S[g] = times(dropout.KEEP_ALL / keep_counts[g], dropped, At, turned)
                del dropped
            Bt = adapters.matrix(1, g, dtype).t()
        if not at_once:
            _expand(ys, xs, _of(weight, g, 2), _of(bias, g, 1), S[g], Bt, scaling[g])
            continue
        if bias is not None and bias.dim() == 2:
            ys.add_(bias[g])
        if Bt is not None:
            add_product(ys, S[g], Bt, scaling[g])
    return y, S, keep_bits


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | Sequence[Tensor | None],
    lora_B: Tensor | Sequence[Tensor | None],
    S: Tensor | Sequence[Tensor | None],
    scaling: Sequence[float | Tensor],
    segments: Segments,
    keep_bits: Tensor | None,
    keep_counts: Sequence[int],
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[Tensor | None, Tensor | list | None, Tensor | list | None]:
    """``dx (M, K)``, and ``dA`` and ``dB`` as the adapters are given: stacks or lists.

    A segment without rows has zeros in a stack, None in a list.

    Args:
        x: ``(M, K)``; None if no ``dA`` is needed.
        weight: as in :func:`forward`; None if neither ``dx`` nor a ``dA`` is needed.
        S: of :func:`forward`, or the kernels' ``(M, R)``.
        needs: whether ``dx`` is needed, and of which segments ``dA`` and ``dB``.
    """
    need_x, need_A, need_B = needs
    adapters, bounds = Adapters(lora_A, lora_B), segments.bounds
    if isinstance(S, Tensor):
        S = [S[a:b, :rank] for (a, b), rank in zip(bounds, adapters.ranks, strict=True)]
    if segmented_wide.is_wide(dy, weight, lora_A, scaling, keep_counts):
        operands = dy, x, weight, lora_A, lora_B, S, scaling[0], segments
        return segmented_wide.backward(*operands, (need_x, any(need_A), any(need_B)))
    dA, dB = (_zeros(t, n) for t, n in ((lora_A, need_A), (lora_B, need_B)))
    dx, at_once, varies = None, False, weight is not None and weight.dim() == 3
    if need_x:
        weight = as_dtype(weight, dy.dtype)
        at_once = weight.dim() == 2 and not is_widened(dy, weight, 0)
        if at_once:
            dx = torch.mm(dy, weight)
        else:
            dx = dy.new_empty((dy.shape[0], weight.shape[-1]))
            _rest(dx, bounds, dy, weight.mT, None)
    for g, (a, b) in enumerate(bounds):
        if a == b:
            continue
        ds, G, A, mask, inv_keep = dy[a:b], None, None, None, dropout.KEEP_ALL / keep_counts[g]
        if (rank := adapters.ranks[g]) is not None and (need_x or need_A[g] or need_B[g]):
            dtype, turned = thin_products(ds, rank, adapters.dtype(0, g), varies)
            wide = as_dtype(ds, dtype)
            if need_B[g]:
                product = wide.t(), as_dtype(S[g], dtype)
                dB[g] = scaled_mm(*product, scaling[g], adapters.dtype(1, g), turned).contiguous()
            if need_x or need_A[g]:
                G = scaled_mm(wide, adapters.matrix(1, g, dtype), scaling[g], dtype, turned)
                A = adapters.matrix(0, g, dtype)
                if inv_keep != 1:
                    mask = dropout.keep_mask(keep_bits[a:b], A.shape[1], dtype)
        if need_x and not at_once:
            _input_gradient(dx[a:b], ds, _of(weight, g, 2), G, A, mask, inv_keep)
        elif need_x and G is not None and mask is None:
            add_product(dx[a:b], G, A, 1.0)
        elif need_x and G is not None:
            dx[a:b].addcmul_(torch.mm(G, A), mask, value=inv_keep)
        if need_A[g] and G is not None:
            dropped = as_dtype(x[a:b], G.dtype) if mask is None else mask.mul_(x[a:b])
            dA[g] = scaled_mm(G.t(), dropped, inv_keep, adapters.dtype(0, g))
    return dx, _as_given(dA, lora_A, need_A), _as_given(dB, lora_B, need_B)


def _zeros(adapters, needs: Sequence[bool]) -> Tensor | list[None]:
    """Where to write gradients: zeros for a stack; a list for a sequence, and in double backward
    and ``vmap``, which must not find tensors that are written in place.
    """
    if isinstance(adapters, Tensor) and any(needs) and not needs_new_tensors():
        return torch.zeros_like(adapters, memory_format=torch.contiguous_format)
    return [None] * len(adapters)


def _as_given(gradients: Tensor | list, adapters, needs: Sequence[bool]) -> Tensor | list | None:
    """A stack if the adapters are one, None if it is not needed."""
    if isinstance(gradients, Tensor) or not isinstance(adapters, Tensor):
        return gradients
    if not any(needs):
        return None
    zeros = torch.zeros_like(adapters[0])
    return torch.stack([zeros if gradient is None else gradient for gradient in gradients])


def _rest(y: Tensor, bounds: Bounds, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write the rows of ``y`` that belong to no segment: the base output of one weight, else 0."""
    rest = slice(bounds[-1][1], None)
    if weight.dim() == 3:
        y[rest] = 0
    else:
        bias = None if bias is None or bias.dim() == 2 else bias
        _expand(y[rest], x[rest], weight, bias, None, None, 1.0)


def _of(stack: Tensor | None, g: int, dims: int) -> Tensor | None:
    """The segment's own weight or bias; what all segments share, itself."""
    return stack if stack is None or stack.dim() == dims else stack[g]


def _expand(y, x, weight, bias, S, Bt, scaling) -> None:
    """Write ``x Wᵀ + bias + s·S Bᵀ`` to ``y``."""
    if is_widened(x, weight, 1):
        wide = x.float()
        U, V = (None, None) if S is None else (as_dtype(t, wide.dtype) for t in (S, Bt))
        y.copy_(wide_product(wide, weight.t(), U, V, scaling, x.dtype, bias=bias))
        return
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    if S is not None:
        _add_rounded(y, S, Bt, scaling)


def _add_rounded(y: Tensor, U: Tensor, V: Tensor, scaling: float | Tensor) -> None:
    """Add ``scaling · U V`` to ``y`` in place; a product in a wider dtype is rounded first.

    Eager rounds it too. An operator on two dtypes would convert all of ``y`` twice.
    """
    if U.dtype == y.dtype or isinstance(scaling, Tensor) or scaling == 0:
        add_product(y, U, V, scaling)
    else:
        y.add_(torch.mm(U, V).to(y.dtype), alpha=scaling)


def _input_gradient(dx, dy, weight, G, A, mask, inv_keep) -> None:
    """Write ``dY W + D(G A)`` to ``dx``."""
    if is_widened(dy, weight, 0):
        factor = 1.0 if mask is None else inv_keep
        dx.copy_(wide_product(dy.float(), weight, G, A, factor, dy.dtype, mask=mask))
        return
    torch.mm(dy, weight, out=dx)
    if G is not None and mask is None:
        _add_rounded(dx, G, A, 1.0)
    elif G is not None:
        dx.addcmul_(torch.mm(G, A), mask, value=inv_keep)
