"""The layer over rows sorted into segments, as one autograd Function.

    y_g = x_g W_gᵀ + bias_g + s_g·D(x_g) A_gᵀ B_gᵀ

Saved for backward are ``x``, each ``S_g``, the keep bits and the parameters, as by
:mod:`.autograd`; never a matrix of an expert's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, segmented_torch
from .modes import without_autocast
from .segments import Segments, keep_bits_of
from .shared_input import needs_new_tensors


class SegmentedOperands(NamedTuple):
    """Validated operands of a call.

    Attributes:
        x: ``(M, K)``.
        weight: ``(N, K)`` or ``(G, N, K)``.
        lora_A, lora_B: stacks ``(G, R, K)`` and ``(G, N, R)``, or tuples of ``(R_g, K)`` and
            ``(N, R_g)``, None where a segment has no adapter.
        bias: ``(N,)`` or ``(G, N)``, or None.
        scaling: ``s_g`` of each segment, floats or 0-d tensors.
        segments: which rows are whose.
        seed: of dropout, or None; one for all segments.
        keep_counts: of each segment.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor | tuple[Tensor | None, ...]
    lora_B: Tensor | tuple[Tensor | None, ...]
    bias: Tensor | None
    scaling: tuple[float | Tensor, ...]
    segments: Segments
    seed: Tensor | None
    keep_counts: tuple[int, ...]


def segmented_linear(operands: SegmentedOperands) -> Tensor:
    """``y (M, N)``, differentiable twice; autocast is off."""
    A, B = operands.lora_A, operands.lora_B
    stacked = isinstance(A, Tensor)
    adapters = (A, B) if stacked else (*A, *B)
    call = operands._replace(x=None, weight=None, lora_A=None, lora_B=None, bias=None)
    return _SegmentedLinear.apply(
        call, stacked, operands.x, operands.weight, operands.bias, *adapters
    )


class _SegmentedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, stacked, x, weight, bias, *adapters):
        bounds, keep_bits = call.segments.bounds, None
        if call.seed is not None:
            keep_bits = keep_bits_of(call.seed, call.segments, *x.shape, call.keep_counts)
        y, S = segmented_torch.forward(
            x, weight, segmented_torch.Adapters(*_halves(adapters, stacked)), bias, call.scaling,
            bounds, keep_bits, call.keep_counts,
        )  # fmt: skip
        need_x, _, need_bias, *need = ctx.needs_input_grad[2:]
        if not (need_x or need_bias or any(need)):
            return y
        # A scale may be written in place before backward.
        scaling = [s.clone() if isinstance(s, Tensor) else s for s in call.scaling]
        ctx.call = call._replace(scaling=tuple(scaling)), stacked
        first_B = 1 if stacked else len(adapters) // 2
        need_more, need_B = need_x or any(need[:first_B]), any(need[first_B:])
        ctx.save_for_backward(
            x if need_more else None,
            weight if need_more else None,
            bias,
            keep_bits if need_more else None,
            *adapters,
            *(S if need_B else [None] * len(S)),
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy):
            return (_differentiable if needs_new_tensors() else _backward)(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    call, stacked = ctx.call
    need_x, _, need_bias, *need = ctx.needs_input_grad[2:]
    x, weight, bias, keep_bits, *saved = ctx.saved_tensors
    adapters, S = saved[: len(need)], saved[len(need) :]
    A, B = _halves(adapters, stacked)
    G, bounds = len(call.segments), call.segments.bounds
    dy = dy.contiguous()
    need_A, need_B = ([need[0]] * G, [need[1]] * G) if stacked else (need[:G], need[G:])
    in_place = stacked and not needs_new_tensors()
    dA, dB = (
        torch.zeros_like(t) if in_place and any(n) else [None] * G
        for t, n in ((A, need_A), (B, need_B))
    )
    dx = segmented_torch.backward(
        dy, x if any(need_A) else None, weight if need_x else None,
        segmented_torch.Adapters(A, B), S, call.scaling, bounds, keep_bits, call.keep_counts,
        (need_x, need_A, need_B), dA, dB,
    )  # fmt: skip
    db = _bias_gradient(dy, bias, bounds) if need_bias else None
    if stacked:
        each = zip((dA, dB), adapters, need, strict=True)
        dA, dB = (_as_stack(d, t) if n else None for d, t, n in each)
    return None, None, dx, None, db, *((dA, dB) if stacked else (*dA, *dB))


def _as_stack(gradients: Tensor | list[Tensor | None], stack: Tensor) -> Tensor:
    if isinstance(gradients, Tensor):
        return gradients
    zeros = torch.zeros_like(stack[0])
    return torch.stack([zeros if gradient is None else gradient for gradient in gradients])


def _bias_gradient(dy: Tensor, bias: Tensor, bounds) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    if bias.dim() == 1:
        return dy.sum(0, dtype=wide).to(bias.dtype)
    return torch.stack([dy[a:b].sum(0, dtype=wide) for a, b in bounds]).to(bias.dtype)


def _differentiable(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients under ``create_graph`` and ``vmap``: the reference's."""
    call, stacked = ctx.call
    x, weight, bias, keep_bits, *saved = ctx.saved_tensors
    if x is None:  # without gradients of x and A the products that are left are derivable
        return _backward(ctx, dy)
    inputs = [None, None, x, weight, bias, *saved[: len(ctx.needs_input_grad) - 5]]
    twice = torch.is_grad_enabled()
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    with torch.enable_grad():
        for i in wanted:
            # Aliases: the derivative must not follow the history of x to the same parameters.
            alias = inputs[i].view_as(inputs[i]) if twice else inputs[i].detach()
            inputs[i] = alias if twice else alias.requires_grad_()
        _, _, x, weight, bias, *adapters = inputs
        A, B = _halves(adapters, stacked)
        y = reference.segmented(
            call._replace(x=x, weight=weight, lora_A=A, lora_B=B, bias=bias), keep_bits
        )
    found = torch.autograd.grad(
        y, [inputs[i] for i in wanted], dy, create_graph=twice, allow_unused=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _halves(adapters: Sequence, stacked: bool) -> tuple:
    """``lora_A`` and ``lora_B`` of the Function's last arguments."""
    if stacked:
        return tuple(adapters)
    half = len(adapters) // 2
    return tuple(adapters[:half]), tuple(adapters[half:])
