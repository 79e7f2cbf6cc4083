"""The gated MLP, ``y = down(act(gate(x)) · up(x))``, as one autograd Function.

Each of the three projections is ``x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``, with or without an adapter. Saved
for backward: ``x``, the outputs of gate and up, the three ``S`` and keep bits, and the parameters.
``h = act(gate) · up`` is computed again in backward, so half as much is kept as by three layers. If
backward runs once, it overwrites gate and up with their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from . import dropout, reference, shared_torch
from .modes import without_autocast
from .operands import Projection
from .shared_input import flatten, needs_new_tensors, runner_of


def gated_mlp(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    seeds: Sequence[Tensor | None],
    impl: str,
) -> Tensor:
    """``y (..., out)`` of validated operands.

    Args:
        x: ``(..., in)``, a plain tensor in the dtype of the products; autocast is off.
        projections: gate, up and down.
        seeds: of each dropout, or None.
    """
    keep_counts = tuple(dropout.keep_count(p.dropout_p) for p in projections)
    tensors = [t for p in projections for t in p[:5]]
    return _GatedMLP.apply(x, activation, tuple(seeds), keep_counts, impl, *tensors)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, seeds, keep_counts, impl, *tensors):
        gate, up, down = projections = _projections(tensors)
        flat = flatten(x)
        dropped = [seed is not None for seed in seeds]
        # Each projection has a strategy of its own. What gate and up share is computed by one that
        # has an adapter, and the activation by down if it has one: kernels, if any may run.
        both = runner_of(flat, up if gate.lora_A is None else gate, impl, any(dropped[:2]))
        S, bits = both.shrink(flat, (gate.lora_A, up.lora_A), seeds[:2], keep_counts[:2])
        runners, inner = [], []
        for i, (p, s) in enumerate(zip((gate, up), S, strict=True)):
            runners.append(runner_of(flat, p, impl, dropped[i]))
            inner.append(runners[i].expand(flat, p.weight, p.bias, s, p.lora_B, p.scaling))
        runners.append(runner_of(inner[0], down, impl, dropped[2]))  # h has the layout of gate
        outer = both if down.lora_A is None else runners[2]
        h = outer.gated(*inner, activation)
        last, last_bits = runners[2].shrink(h, (down.lora_A,), seeds[2:], keep_counts[2:])
        y = runners[2].expand(h, down.weight, down.bias, last[0], down.lora_B, down.scaling)
        del h
        if x.dim() != 2:
            # Not ``view``: autograd forbids in-place changes to a view that a Function returns.
            y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
        if not any(ctx.needs_input_grad):
            return y
        # A scale may be written in place before backward.
        tensors = [t.clone() if isinstance(t, Tensor) and t.dim() == 0 else t for t in tensors]
        numbers = [None if isinstance(p.scaling, Tensor) else p.scaling for p in projections]
        ctx.call = activation, keep_counts, (runners, both, outer), numbers
        ctx.save_for_backward(
            x, *inner, *S, *last, *bits, *last_bits,
            *(t if isinstance(t, Tensor) else None for t in tensors),
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy):
            return (_differentiable if needs_new_tensors() else _backward)(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    activation, keep_counts, (runners, both, outer), numbers = ctx.call
    x, gate, up, *saved = ctx.saved_tensors
    S, keep_bits = saved[:3], saved[3:6]
    projections = _projections(saved[6:], numbers)
    need_x, needs = _needs(ctx)
    shape, x, dy = x.shape, flatten(x), flatten(dy)
    inv_keeps = [dropout.KEEP_ALL / count for count in keep_counts]
    need_inner = need_x or any(any(need) for need in needs[:2])
    adapters = [p.lora_A for p in projections]
    G, dA, dB, db = ([None] * 3 for _ in range(4))

    def thin(i: int, gradient: Tensor, need_G: bool) -> None:
        """The gradients of one projection that need its output's gradient only."""
        _, _, lora_B, bias, scaling, _ = projections[i]
        _, _, need_B, need_bias = needs[i]
        if lora_B is not None and (need_G or need_B):
            args = gradient, lora_B, S[i], scaling, (need_G, need_B)
            G[i], dB[i] = runners[i].thin_gradients(*args)
        if need_bias:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            db[i] = gradient.sum(0, dtype=wide).to(bias.dtype)

    thin(2, dy, need_inner or needs[2][1])
    dx = None
    if need_inner:
        inner = [gate, up]
        del gate, up
        *inner, dA[2] = outer.gated_backward(
            dy, *inner, activation, projections[2].weight, adapters[2], G[2], keep_bits[2],
            inv_keeps[2], needs[2][1], not _get_current_graph_task_keep_graph(),
        )  # fmt: skip
        del dy
        for i in range(2):
            thin(i, inner[i], need_x or needs[i][1])
            if need_x:
                dx = shared_torch.base_gradient(inner[i], projections[i].weight, dx)
            inner[i] = None
        dA[:2] = both.input_gradients(
            x, dx, adapters[:2], G[:2], keep_bits[:2], inv_keeps[:2], [n[1] for n in needs[:2]]
        )
    elif needs[2][1]:
        h = outer.gated(gate, up, activation)
        dA[2:] = runners[2].input_gradients(
            h, None, adapters[2:], G[2:], keep_bits[2:], inv_keeps[2:], [True]
        )
    parts = ((None, dA[i], dB[i], db[i], None) for i in range(3))
    return (
        None if dx is None else dx.view(shape),
        *(None,) * 4,
        *(gradient for part in parts for gradient in part),
    )


def _differentiable(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients under ``create_graph`` and ``vmap``: the reference's, from ``x`` on."""
    activation, keep_counts, _, numbers = ctx.call
    x, *saved = ctx.saved_tensors
    keep_bits, tensors = saved[5:8], saved[8:]
    masks = [
        None
        if bits is None
        else dropout.keep_mask(bits, p.lora_A.shape[1], x.dtype) * (dropout.KEEP_ALL / count)
        for bits, p, count in zip(keep_bits, _projections(tensors), keep_counts, strict=True)
    ]
    twice = torch.is_grad_enabled()
    inputs = [x, *(None,) * 4, *tensors]
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    with torch.enable_grad():
        for i in wanted:
            # Aliases: the derivative must not follow the history of x to the same parameters.
            alias = inputs[i].view_as(inputs[i]) if twice else inputs[i].detach()
            inputs[i] = alias if twice else alias.requires_grad_()
        layers = _projections(inputs[5:], numbers)
        y = reference.gated_mlp(inputs[0], layers, activation, masks)
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=twice)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _projections(tensors, numbers=(None,) * 3) -> list[Projection]:
    """The three projections of five operands each; ``numbers`` are scales that are no tensors."""
    parts = [tensors[5 * i : 5 * i + 5] for i in range(3)]
    return [
        Projection(*part[:4], part[4] if number is None else number)
        for part, number in zip(parts, numbers, strict=True)
    ]


def _needs(ctx) -> tuple[bool, list[tuple[bool, ...]]]:
    """Whether ``x`` needs a gradient, and weight, lora_A, lora_B and bias of each projection."""
    needs = ctx.needs_input_grad
    return needs[0], [tuple(needs[5 + 5 * i : 9 + 5 * i]) for i in range(3)]
