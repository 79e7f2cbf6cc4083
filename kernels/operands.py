"""The operands of a layer's forward and backward, the same for every implementation.

``ops/torch_impl.py`` and ``strategies.py`` compute the same two functions of them, and
``ops/reference.py`` the backward. ``M`` tokens, ``K`` in_features, ``N`` out_features, ``R`` rank.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from .config import DIGITS


class ForwardOperands(NamedTuple):
    """The operands of ``y (M,N)`` and ``S (M,R)``.

    Attributes:
        x: ``(M, K)``.
        weight: ``(N, K)``; None with a ``base``.
        lora_A: ``(R, K)``.
        lora_B: ``(N, R)``.
        bias: ``(N,)`` or None.
        scaling: ``s``, a float or a 0-d tensor.
        seed: of dropout, a 0-d int64 tensor, or None.
        keep_count: the probability that an entry is kept, in units of ``2**-DIGITS``.
        base: ``(M, N)``, which replaces ``x Wᵀ + bias``; ``y`` has its dtype. Or None.
    """

    x: Tensor
    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    seed: Tensor | None = None
    keep_count: int = 1 << DIGITS
    base: Tensor | None = None


class BackwardOperands(NamedTuple):
    """The operands of ``dx (M,K)``, ``dA`` and ``dB``.

    Attributes:
        dy: ``(M, N)``.
        x: ``(M, K)``; None if ``dA`` is not needed.
        weight: ``(N, K)``; None for the adapter's part of ``dx`` alone.
        lora_A, lora_B, scaling: as in :class:`ForwardOperands`.
        keep_bits: the packed dropout mask, int32 ``(M, words)``, or None.
        inv_keep: the factor of kept entries.
        S: ``(M, R)`` from the forward; None if ``dB`` is not needed.
        needs: which of ``dx``, ``dA``, ``dB`` to compute; the others are None.
    """

    dy: Tensor
    x: Tensor | None
    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    S: Tensor | None
    scaling: float | Tensor
    keep_bits: Tensor | None = None
    inv_keep: float = 1.0
    needs: tuple[bool, bool, bool] = (True, True, True)


# From a tuple of all fields. In C, in half the time of the generated __new__.
pack_forward = partial(tuple.__new__, ForwardOperands)
pack_backward = partial(tuple.__new__, BackwardOperands)
