"""The layer over rows sorted into segments, as one autograd Function.

    y_g = x_g W_gᵀ + bias_g + s_g·D(x_g) A_gᵀ B_gᵀ

Saved for backward are ``x``, each ``S_g``, the keep bits and the parameters, as by
:mod:`.autograd`; ``x`` also if only its own gradient is needed, for second derivatives. Never a
matrix of an expert's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference, segmented_torch, segmented_triton
from .modes import without_autocast
from .segments import Segments, ranks_of
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
        impl: the requested implementation.
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
    impl: str = "auto"


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
        A, B = _halves(adapters, stacked)
        runner = _runner(x, weight, A, call)
        operands = (
            x, weight, A, B, bias, call.scaling, call.segments, call.seed, call.keep_counts,
        )  # fmt: skip
        if runner is None:
            y, S, keep_bits = segmented_torch.forward(*operands)
        else:
            kernels = partial(segmented_triton.forward, strategy=runner.decision.forward)
            fallback = segmented_torch.forward
            y, S, keep_bits = runner.run(kernels, fallback, *operands)
        need_x, _, need_bias, *need = ctx.needs_input_grad[2:]
        if not (need_x or need_bias or any(need)):
            return y
        # A scale may be written in place before backward.
        scaling = [s.clone() if isinstance(s, Tensor) else s for s in call.scaling]
        if isinstance(S, list):  # PyTorch's, one for each segment: so is backward
            runner = None
        else:
            S = [S]
        about_bias = None if bias is None else (bias.shape, bias.dtype, weight.dim())
        ctx.call = call._replace(scaling=tuple(scaling)), stacked, runner, about_bias
        first_B = 1 if stacked else len(adapters) // 2
        need_more, need_B = need_x or any(need[:first_B]), any(need[first_B:])
        ctx.save_for_backward(
            x if need_more else None,
            weight if need_more else None,
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
    call, stacked, runner, about_bias = ctx.call
    need_x, _, need_bias, *need = ctx.needs_input_grad[2:]
    x, weight, keep_bits, *saved = ctx.saved_tensors
    adapters, S = saved[: len(need)], saved[len(need) :]
    A, B = _halves(adapters, stacked)
    G, dy = len(call.segments), dy.contiguous()
    need_A, need_B = ([need[0]] * G, [need[1]] * G) if stacked else (need[:G], need[G:])
    operands = (
        dy, x if any(need_A) else None, weight, A, B,
        S if runner is None else S[0], call.scaling, call.segments, keep_bits, call.keep_counts,
        (need_x, need_A, need_B),
    )  # fmt: skip
    if runner is None or needs_new_tensors():
        dx, dA, dB = segmented_torch.backward(*operands)
    else:
        kernels = partial(segmented_triton.backward, strategy=runner.decision.backward)
        fallback = segmented_torch.backward
        dx, dA, dB = runner.run(kernels, fallback, *operands)
    db = _bias_gradient(dy, *about_bias, call.segments) if need_bias else None
    return None, None, dx, None, db, *((dA, dB) if stacked else (*dA, *dB))


def _bias_gradient(dy: Tensor, shape, dtype, weight_dim: int, segments: Segments) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    if len(shape) == 2:
        return torch.stack([dy[a:b].sum(0, dtype=wide) for a, b in segments.bounds]).to(dtype)
    if weight_dim == 3:  # rows of no segment are 0, without a bias
        is_outside = segments.owners(len(dy)) == len(segments)
        dy = dy.masked_fill(is_outside.unsqueeze(1), 0)
    return dy.sum(0, dtype=wide).to(dtype)


def _differentiable(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients under ``create_graph`` and ``vmap``: the reference's."""
    call, stacked, _, about_bias = ctx.call
    x, weight, keep_bits, *saved = ctx.saved_tensors
    if x is None:  # without gradients of x and A the products that are left are derivable
        return _backward(ctx, dy)
    shape, dtype, _ = about_bias or (None, None, None)
    # y is linear in the bias, whose values are not kept: zeros have the same derivatives.
    bias = None
    if about_bias is not None:
        bias = x.new_zeros(shape, dtype=dtype).requires_grad_(ctx.needs_input_grad[4])
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
    if not y.requires_grad:  # no row has an adapter, and x needs no gradient
        return (None,) * len(inputs)
    found = torch.autograd.grad(
        y, [inputs[i] for i in wanted], dy, create_graph=twice, allow_unused=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _runner(x: Tensor, weight: Tensor, lora_A, call: SegmentedOperands):
    """What runs the kernels; None: PyTorch's operators."""
    if call.impl == "auto" and not x.is_cuda:
        return None
    each = zip(ranks_of(lora_A), call.keep_counts, strict=True)
    adapted = [(rank, count) for rank, count in each if rank is not None]
    of_call = dispatch.SegmentedCall.of(x, weight, call.segments, adapted)
    return dispatch.choose_segmented(x, call.impl, of_call)


def _halves(adapters: Sequence, stacked: bool) -> tuple:
    """``lora_A`` and ``lora_B`` of the Function's last arguments."""
    if stacked:
        return tuple(adapters)
    half = len(adapters) // 2
    return tuple(adapters[:half]), tuple(adapters[half:])
