"""Projections of one input, and the gated MLP, in PyTorch: the parts of :mod:`.shared_input`.

The formulas are those of :mod:`.torch_impl` for each projection. Adapters without dropout act as
one adapter of the sum of their ranks: one product computes all ``S``, one all ``dA``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, dropout
from .cpu_gemm import is_widened, thin_products, wide_product
from .torch_impl import add_product, as_dtype, scaled_mm, times


def shrink(
    x: Tensor,
    adapters: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    keep_counts: Sequence[int],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """``S_i = D_i(x) A_iᵀ (M, R_i)``, unscaled, and the keep bits; None where there are none.

    Args:
        x: ``(M, K)``.
        adapters: ``A_i (R_i, K)``, any floating dtype; None for a projection without an adapter.
        seeds, keep_counts: of each dropout, see :mod:`.dropout`.
    """
    S: list[Tensor | None] = [None] * len(adapters)
    keep_bits: list[Tensor | None] = [None] * len(adapters)
    for one in _together(adapters, seeds):
        ranks = [adapters[i].shape[0] for i in one]
        dtype, turned = thin_products(x, sum(ranks), adapters[one[0]].dtype)
        stacked = _stacked([adapters[i] for i in one], dtype)
        parts = times(1.0, as_dtype(x, dtype), stacked.t(), turned)
        for i, part in zip(one, parts.split(ranks, 1), strict=True):
            S[i] = part
    for i, seed in enumerate(seeds):
        if seed is None or adapters[i] is None:
            continue
        dtype, turned = thin_products(x, adapters[i].shape[0], adapters[i].dtype)
        keep_bits[i] = dropout.make_keep_bits(seed, *x.shape, keep_counts[i])
        dropped = dropout.keep_mask(keep_bits[i], x.shape[1], dtype).mul_(x)
        factor = dropout.KEEP_ALL / keep_counts[i]
        S[i] = times(factor, dropped, as_dtype(adapters[i], dtype).t(), turned)
        del dropped  # before the next one is allocated
    return S, keep_bits


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    S: Tensor | None,
    lora_B: Tensor | None,
    scaling: float | Tensor,
) -> Tensor:
    """``y = x Wᵀ + bias + s·S Bᵀ (M, N)``; without an adapter ``S`` and ``lora_B`` are None."""
    weight = as_dtype(weight, x.dtype)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    Bt = None if S is None else as_dtype(lora_B, S.dtype).t()
    if is_widened(x, weight, 1):
        wide = x.float()
        S = None if S is None else as_dtype(S, wide.dtype)
        Bt = None if Bt is None else as_dtype(Bt, wide.dtype)
        return wide_product(wide, weight.t(), S, Bt, scaling, x.dtype, bias=bias)
    y = F.linear(x, weight, bias)
    return y if S is None else add_product(y, S, Bt, scaling)


def thin_gradients(
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float | Tensor,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """``G = s·dY B (M, R)`` and ``dB = s·dYᵀ S`` in B's dtype; ``needs`` says which."""
    dtype, turned = thin_products(dy, lora_B.shape[1], lora_B.dtype)
    wide = as_dtype(dy, dtype)
    G = dB = None
    if needs[1]:
        # As dBᵀ: in bfloat16 the vendor's GEMM takes a third of the memory, and less time.
        dB = scaled_mm(as_dtype(S, dtype).t(), wide, scaling, lora_B.dtype).t().contiguous()
    if needs[0]:
        G = scaled_mm(wide, as_dtype(lora_B, dtype), scaling, dtype, turned)
    return G, dB


def base_gradient(dy: Tensor, weight: Tensor, dx: Tensor | None = None) -> Tensor:
    """``dx + dY W (M, K)``, in place; a new tensor without ``dx``."""
    weight = as_dtype(weight, dy.dtype)
    if is_widened(dy, weight, 0):
        product = wide_product(dy.float(), weight, None, None, 1.0, dy.dtype)
        return product if dx is None else dx.add_(product)
    return torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)


def input_gradients(
    x: Tensor | None,
    dx: Tensor | None,
    adapters: Sequence[Tensor | None],
    G: Sequence[Tensor | None],
    keep_bits: Sequence[Tensor | None],
    inv_keeps: Sequence[float],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """``dA_i = G_iᵀ D_i(x)`` in A's dtype, and ``dx += Σ D_i(G_i A_i)``, in place.

    Args:
        x: ``(M, K)``; None if no ``dA`` is needed.
        dx: ``(M, K)`` in the dtype of the layer; None if it is not needed.
        adapters: ``A_i``; None for a projection without an adapter.
        G: ``(M, R_i)``; None where no gradient arrived.
        keep_bits, inv_keeps: the masks, or None, and the factors of kept entries.
        needs: which ``dA`` to compute; the others are None.
    """
    dA: list[Tensor | None] = [None] * len(adapters)
    used = [None if g is None else a for a, g in zip(adapters, G, strict=True)]
    for one in _together(used, keep_bits):
        together = G[one[0]] if len(one) == 1 else torch.cat([G[i] for i in one], 1)
        if dx is not None:
            stacked = _stacked([adapters[i] for i in one], together.dtype)
            add_product(dx, together, stacked, 1.0)
            del stacked
        if any(needs[i] for i in one):
            _stacked_gradients(together, x, one, adapters, dA)
    for i, bits in enumerate(keep_bits):
        if bits is None or used[i] is None:
            continue
        lora_A, g, inv_keep = adapters[i], G[i], inv_keeps[i]
        mask = dropout.keep_mask(bits, lora_A.shape[1], g.dtype)
        if dx is not None:
            dx.addcmul_(torch.mm(g, as_dtype(lora_A, g.dtype)), mask, value=inv_keep)
        if needs[i]:
            dA[i] = scaled_mm(g.t(), mask.mul_(x), inv_keep, lora_A.dtype)
        del mask
    return [d if need else None for d, need in zip(dA, needs, strict=True)]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``h = act(gate) · up``."""
    return activations.FORWARD[activation](gate).mul_(up)


def gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    weight: Tensor,
    lora_A: Tensor | None,
    G: Tensor | None,
    keep_bits: Tensor | None,
    inv_keep: float,
    need_A: bool,
    may_overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(dgate, dup, dA)`` of ``y = down(act(gate) · up)``, whose ``h`` is computed again.

    The products with ``dh`` come last, so that three matrices of the hidden size suffice, and with
    dropout the mask.

    Args:
        dy: ``(M, N)``.
        gate, up: ``(M, I)``.
        weight: ``(N, I)`` of the down projection; ``lora_A (R, I)`` and ``G (M, R)`` are its too.
        may_overwrite: whether ``gate`` and ``up`` are not needed any more.
    """
    act = activations.FORWARD[activation](gate)
    dgate = activations.derivative(up, gate, activation, out=gate if may_overwrite else None)
    h, dA = torch.mul(act, up, out=up) if may_overwrite else act * up, None
    weight = as_dtype(weight, dy.dtype)
    reuses = not is_widened(dy, weight, 0)
    if G is not None:
        A = as_dtype(lora_A, G.dtype)
        mask = None
        if keep_bits is not None:
            mask = dropout.keep_mask(keep_bits, h.shape[1], h.dtype)
            h.mul_(mask)
        if need_A:
            dA = scaled_mm(G.t(), as_dtype(h, G.dtype), inv_keep, lora_A.dtype)
    if G is None or mask is None:
        dh = torch.mm(dy, weight, out=h) if reuses else base_gradient(dy, weight)
        if G is not None:
            add_product(dh, G, A, 1.0)
    else:
        in_float16 = G.dtype == torch.float16
        out = h if reuses and G.dtype == h.dtype else torch.empty_like(h, dtype=G.dtype)
        torch.addmm(out, G, A, beta=0, alpha=1.0 if in_float16 else inv_keep, out=out)
        dh = as_dtype(out.mul_(mask), h.dtype)
        if in_float16:  # the factor last: it may overflow, and 0 · inf is NaN
            dh.mul_(inv_keep)
        del mask, out
        base_gradient(dy, weight, dh)
    # Over dh, which lies in up's memory: autograd holds that until the end in any case.
    return dgate.mul_(dh), dh.mul_(act), dA


def _together(adapters: Sequence, dropped: Sequence) -> list[list[int]]:
    """The indices of adapters without dropout, one list for each dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, (adapter, drop) in enumerate(zip(adapters, dropped, strict=True)):
        if adapter is not None and drop is None:
            groups.setdefault(adapter.dtype, []).append(i)
    return list(groups.values())


def _stacked(adapters: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Adapters as one, in ``dtype``."""
    cast = [as_dtype(adapter, dtype) for adapter in adapters]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def _stacked_gradients(G: Tensor, x: Tensor, members: list[int], adapters, dA: list) -> None:
    """Write the ``dA`` of stacked adapters without dropout."""
    dtype = adapters[members[0]].dtype
    is_rounded = G.dtype == torch.bfloat16 and not G.is_cuda  # as scaled_mm rounds it there
    product = scaled_mm(G.t(), as_dtype(x, G.dtype), 1.0, G.dtype if is_rounded else dtype)
    ranks = [adapters[i].shape[0] for i in members]
    for i, part in zip(members, product.split(ranks), strict=True):
        dA[i] = as_dtype(part, dtype)  # views, as the gradients of torch.cat are
