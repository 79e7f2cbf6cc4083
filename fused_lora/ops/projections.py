"""The functional API of several projections of one input, and of the gated MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, shared_input
from .functional import linear
from .gated_mlp import gated_mlp
from .modes import autocasts, is_eager, is_observed, without_autocast
from .operands import Projection
from .validation import check_options, check_projection, check_same_dtype, is_plain


def fused_lora_projections(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    training: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """``y_i = x W_iᵀ + bias_i + s_i·D_i(x) A_iᵀ B_iᵀ``: several linear layers of one input.

    Values, masks and errors are those of one :func:`fused_lora_linear` each. But ``x`` is read once
    for all ``D_i(x) A_iᵀ``, cast once under autocast, and kept once; and the gradients of ``x`` are
    added up in place. Twice differentiable in ``x``, the adapters and the biases.

    Args:
        x: ``(..., in)``, as in :func:`fused_lora_linear`.
        projections: one or more :class:`Projection`, in any mixture of ranks, scales and dropouts;
            one without an adapter is a frozen linear layer.
        training: if False, nothing is dropped.
        impl: as in :func:`fused_lora_linear`.

    Returns:
        One ``(..., out_i)`` per projection, in x's dtype; under autocast, in autocast's.

    Raises:
        TypeError, ValueError: as in :func:`fused_lora_linear`; the message starts with the
            projection's index.
    """
    if isinstance(projections, Projection) or not isinstance(projections, Sequence):
        raise TypeError(f"expected a sequence of Projection, got {type(projections).__name__}")
    if not projections:
        raise ValueError("expected at least one projection, got none")
    layers = [
        _checked(x, layer, f"projection {i}", training, impl) for i, layer in enumerate(projections)
    ]
    if not is_fusible(x, layers, impl):
        return tuple(_alone(x, layer, impl) for layer in layers)
    return in_chain(x, layers, impl)


def fused_lora_gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """``y = down(act(gate(x)) · up(x))``: the gated MLP of Llama and others, as one function.

    Values and masks are those of three calls of :func:`fused_lora_linear`. Backward keeps ``x`` and
    the outputs of gate and up; it computes the activation and the product again. Twice
    differentiable in ``x``, the adapters and the biases.

    Args:
        x: ``(..., in)``, as in :func:`fused_lora_linear`.
        gate, up: :class:`Projection` with weights ``(hidden, in)``; any adapters, or none.
        down: the same with a weight ``(out, hidden)``.
        activation: "silu", "gelu", "gelu_tanh" (gelu's tanh approximation) or "relu".
        training: if False, nothing is dropped.
        impl: as in :func:`fused_lora_linear`.

    Returns:
        ``(..., out)`` in x's dtype; under autocast, in autocast's.

    Raises:
        TypeError, ValueError: as in :func:`fused_lora_linear`, where the message starts with the
            projection's name; another activation.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if activation not in activations.FORWARD:
        known = ", ".join(activations.FORWARD)
        raise ValueError(f"expected activation to be one of {known}, got {activation!r}")
    layers = [
        _checked(x, gate, "gate", training, impl),
        _checked(x, up, "up", training, impl),
    ]
    hidden = gate.weight.shape[0]
    if up.weight.shape[0] != hidden:
        raise ValueError(f"expected up's weight of shape ({hidden}, in), got {_shape(up.weight)}")
    layers.append(_checked(_rows(x, hidden), down, "down", training, impl))
    if not is_fusible(x, layers, impl):
        inner = [_alone(x, layer, impl) for layer in layers[:2]]
        return _alone(activations.FORWARD[activation](inner[0]) * inner[1], layers[2], impl)
    return as_block(x, layers, activation, impl)


def is_fusible(x: Tensor, layers: Sequence[Projection], impl: str) -> bool:
    """Whether validated operands can run as a chain or a block; else each layer runs alone.

    Alone run: what a compiler, an exporter, a dispatch mode or a transform sees, tensor subclasses
    (sharded, quantised, nested) and the implementations that are not written for several layers.
    """
    if impl in ("reference", "triton:single_pass") or not is_eager() or not is_plain(x):
        return False
    any_dtype = autocasts(x) and x.dtype != torch.float64
    return all(
        (any_dtype or layer.weight.dtype == x.dtype) and all(map(is_plain, layer[:4]))
        for layer in layers
    )


def in_chain(x: Tensor, layers: Sequence[Projection], impl: str) -> tuple[Tensor, ...]:
    """The outputs of fusible projections."""
    x = as_autocast(x)
    with without_autocast(x):
        seeds = shared_input.draw_seeds(x, layers)
        x, S = shared_input.shrink(x, layers, seeds, impl)
        outputs = []
        for layer, s in zip(layers, S, strict=True):
            y, x = shared_input.expand(x, s, layer, impl)
            outputs.append(y)
    return tuple(outputs)


def as_block(
    x: Tensor,
    layers: Sequence[Projection],
    activation: str,
    impl: str,
    order: Sequence[int] = (0, 1, 2),
) -> Tensor:
    """The output of a fusible gated MLP.

    Args:
        order: the layers in the order in which they draw dropout's seeds.
    """
    x = as_autocast(x)
    with without_autocast(x):
        drawn = shared_input.draw_seeds(x, [layers[i] for i in order])
        seeds = [drawn[order.index(i)] for i in range(3)]
        return gated_mlp(x, layers, activation, seeds, impl)


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype in which autocast computes products; itself without autocast."""
    if not autocasts(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _checked(x: Tensor, layer: Projection, name: str, training: bool, impl: str) -> Projection:
    """``layer``, validated, with the dropout that applies."""
    if not isinstance(layer, Projection):
        raise TypeError(f"{name}: expected a Projection, got {type(layer).__name__}")
    try:
        check_options(impl, layer.dropout_p)
        check_projection(x, *layer[:5])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    return layer if training else layer._replace(dropout_p=0.0)


def _rows(x: Tensor, columns: int) -> Tensor:
    """A tensor like ``x`` without rows, to validate the operands of a later product."""
    return torch.empty((0, columns), dtype=x.dtype, device=x.device)


def _alone(x: Tensor, layer: Projection, impl: str) -> Tensor:
    """The output of one projection, in every mode."""
    weight, lora_A, lora_B, bias, scaling, dropout_p = layer
    if lora_A is None:
        if not autocasts(x):
            check_same_dtype(x, weight)
            bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)
    args = x, weight, lora_A, lora_B, bias, scaling, dropout_p
    return linear(*args, True, impl, is_observed())


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
