"""The operands of one call, from the public function to the chosen implementation."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from . import dropout
from .dropout import KEEP_ALL


class Projection(NamedTuple):
    """A frozen linear layer, with or without an adapter, as one of several that share an input.

    Attributes:
        weight: ``(out, in)`` in x's dtype (any under autocast); must not require grad.
        lora_A: ``(rank, in)``; None for a layer without an adapter.
        lora_B: ``(out, rank)``; None if ``lora_A`` is.
        bias: ``(out,)`` or None.
        scaling: ``s``, a float or a constant 0-d tensor.
        dropout_p: probability that an entry of the adapter's input is dropped, in [0, 1).
    """

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0


class Operands(NamedTuple):
    """Validated operands of a public function, in the order of the registered operator's arguments.

    Attributes:
        x: ``(..., K)``.
        weight: ``(N, K)``; None with a ``base``.
        lora_A: ``(R, K)``.
        lora_B: ``(N, R)``.
        bias: ``(N,)`` or None.
        scaling: ``s``, a float or a 0-d tensor.
        seed, keep_count: see :mod:`.dropout`; None and :data:`.dropout.KEEP_ALL` without dropout.
        impl: the requested implementation.
        base: ``(..., N)``, which replaces ``x Wᵀ + bias``; or None.
    """

    x: Tensor
    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    seed: Tensor | None = None
    keep_count: int = KEEP_ALL
    impl: str = "auto"
    base: Tensor | None = None

    def with_dropout(self, p: float) -> Operands:
        """These operands with a seed drawn for dropout; unchanged if ``p`` rounds to 0."""
        count = dropout.keep_count(p)
        if count == KEEP_ALL:
            return self
        x, weight, lora_A, lora_B, bias, scaling, _, _, impl, base = self
        seed = dropout.draw_seed(x.device)
        return pack((x, weight, lora_A, lora_B, bias, scaling, seed, count, impl, base))


# From a tuple of all fields. In C, in half the time of the generated __new__.
pack = partial(tuple.__new__, Operands)
