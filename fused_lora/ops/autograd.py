"""The chain rule of the layer; who computes each product is :mod:`.dispatch`'s business.

Saved for backward: ``x``, ``S`` and the keep bits, each only if a gradient asks for it, and the
parameters. Never the dropped ``x``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed.sharding import ready
from . import dispatch, dropout, reference
from .modes import autocasts


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    keep: int,
    impl: str,
    base: Tensor | None = None,
) -> Tensor:
    """``y (..., N)`` for validated arguments; ``seed`` is None without dropout.

    ``base (..., N)`` takes the place of ``x Wᵀ + bias``.
    """
    if type(x) is not Tensor:
        x = ready(x)
    if base is not None:
        base = ready(base)
    args = (x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl, base)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or (bias is not None and bias.requires_grad)
        or (base is not None and base.requires_grad)
    ):
        return _LoRALinear.apply(*args)
    return forward(*args)[0]


def forward(x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl, base):
    """``y (..., N)``, ``S (M,R)``, the keep bits or None, and who ran."""
    flat = x if x.dim() == 2 else _flatten(x)
    if base is not None:
        base = _flatten(base)
    runner = dispatch.choose(flat, weight, lora_B, impl, seed is not None, base)
    keep_bits = None if seed is None else runner.dropout_mask(seed, *flat.shape, keep)
    y, S = runner.forward(
        flat, weight, lora_A, lora_B, bias, scaling, keep_bits, dropout.KEEP_ALL / keep, base=base
    )
    if x.dim() != 2:
        # A plain view could not be modified in place by the next layer.
        y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return y, S, keep_bits, runner


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        y, S, keep_bits, runner = forward(*args)
        scaling = args[5]
        if isinstance(scaling, Tensor):  # a new one may be written in place before backward
            scaling = scaling.clone()
        save(ctx, args, S, keep_bits, scaling, runner)
        return y

    @staticmethod
    def backward(ctx, dy):
        return backward(ctx, dy)


def save(ctx, args: tuple, S: Tensor, keep_bits: Tensor | None, scaling, runner) -> None:
    """Keep for backward what the gradients of ``args``, those of :func:`forward`, ask for."""
    x, weight, lora_A, lora_B, bias, _, _, keep, *_ = args
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    is_tensor = isinstance(scaling, Tensor)
    number = None if is_tensor else scaling
    bias_dtype = bias.dtype if need_bias else None
    ctx.call = runner, number, dropout.KEEP_ALL / keep, x.shape, x.dtype, bias_dtype
    ctx.save_for_backward(
        x if need_A else None,
        weight if need_x else None,
        lora_A,
        lora_B,
        S if need_B else None,
        keep_bits if need_x or need_A else None,
        scaling if is_tensor else None,
    )


def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of :func:`forward`; differentiable under ``create_graph``."""
    # The saved tensors already have the dtypes that autocast chose in forward.
    if autocasts(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)
    need_x, _, need_A, need_B, need_bias, *_, need_base = ctx.needs_input_grad
    x, weight, lora_A, lora_B, S, keep_bits, scaling = ctx.saved_tensors
    runner, number, inv_keep, x_shape, dtype, bias_dtype = ctx.call
    twice = torch.is_grad_enabled()
    if type(dy) is not Tensor:
        dy = ready(dy)
    flat_dy = dy if dy.dim() == 2 else _flatten(dy)
    if flat_dy.dtype != dtype:  # the base output's
        flat_dy = flat_dy.to(dtype)
    dx, dA, dB = (reference if twice else runner).backward(
        flat_dy,
        x if x is None or x.dim() == 2 else _flatten(x),
        weight,
        lora_A,
        lora_B,
        S,
        number if scaling is None else scaling,
        keep_bits,
        inv_keep,
        (need_x, need_A, need_B),
    )
    if twice and need_B and need_x and x is None:
        dB = _OnceDifferentiable.apply(dB)
    db = None
    if need_bias:
        wide = torch.promote_types(dy.dtype, torch.float32)
        db = flat_dy.sum(0, dtype=wide).to(bias_dtype)
    if need_x and len(x_shape) != 2:
        dx = dx.view(x_shape)
    return dx, None, dA, dB, db, None, None, None, None, dy if need_base else None


class _OnceDifferentiable(torch.autograd.Function):
    """``dB`` depends on an x that was not saved, since a frozen ``lora_A`` does not ask for it."""

    @staticmethod
    def forward(ctx, dB):
        return dB.view_as(dB)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "expected lora_A to require grad: the derivative of lora_B's gradient needs x, which is"
            " not saved for a frozen lora_A; impl='reference' saves it"
        )


def _flatten(t: Tensor) -> Tensor:
    """``(..., n)`` as ``(M, n)``; the strides of a matrix are left as they are."""
    # Size.numel() would make a constant of a symbolic number.
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
