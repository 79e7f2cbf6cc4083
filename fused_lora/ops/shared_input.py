"""Projections of one input (q, k and v; gate and up) as a chain of autograd nodes.

    shrink     S_i = D_i(x) A_iᵀ           of all projections: one node
    expand     y_i = x W_iᵀ + bias_i + s_i·S_i B_iᵀ           a node for each projection

Every node passes ``x`` on to the next one. So ``dx`` comes back along the chain, and each product
is added to it in place:

    expand     G_i = s_i·dY_i B_i         dB_i = s_i·dY_iᵀ S_i         dx += dY_i W_i
    shrink     dA_i = G_iᵀ D_i(x)         dx += Σ D_i(G_i A_i)

The nodes need not be created together: a layer can compute its ``y`` later, or never. Then only its
thin ``S`` was computed in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _dispatch_tls_is_dispatch_key_included as _is_included

from . import dispatch, dropout, reference, shared_torch, torch_impl
from .modes import is_dynamo_compiling, is_transformed, without_autocast
from .operands import Projection

# Set during the backward of torch.autograd.grad(..., is_grads_batched=True).
_VMAP = torch._C._dispatch_key_parse("VmapMode")


class Shrunk(NamedTuple):
    """The result of :func:`shrink`.

    Attributes:
        x: the input for the first :func:`expand`: an alias that belongs to the chain.
        S: ``S_i (M, R_i)``, unscaled; None for a projection without an adapter.
    """

    x: Tensor
    S: tuple[Tensor | None, ...]


def shrink(
    x: Tensor,
    projections: Sequence[Projection],
    seeds: Sequence[Tensor | None],
    impl: str,
    on_backward: Callable[[], None] | None = None,
) -> Shrunk:
    """``S_i = D_i(x) A_iᵀ`` of all projections, in one node.

    Args:
        x: ``(..., K)``, a plain tensor in the dtype of the products; autocast is off.
        seeds: of each dropout, or None.
        on_backward: called when the node's backward starts.
    """
    keep_counts = tuple(dropout.keep_count(p.dropout_p) for p in projections)
    adapters = [p.lora_A for p in projections]
    adapted = next((p for p in projections if p.lora_A is not None), None)
    if adapted is None:
        return Shrunk(x, (None,) * len(projections))
    runner = runner_of(flatten(x), adapted, impl, any(seed is not None for seed in seeds))
    if not torch.is_grad_enabled():
        S, _ = runner.shrink(flatten(x), adapters, seeds, keep_counts)
        return Shrunk(x.detach(), tuple(S))
    if x.requires_grad:
        alias, *S = _Shrink.apply(
            x, runner, tuple(seeds), keep_counts, on_backward, None, *adapters
        )
        return Shrunk(alias, tuple(S))
    # A node for each projection: as of layers alone, backward may run for one after the other.
    with torch.no_grad():
        made = runner.shrink(flatten(x), adapters, seeds, keep_counts)
    S = []
    for seed, count, adapter, *result in zip(seeds, keep_counts, adapters, *made, strict=True):
        if adapter is not None:
            parts = tuple([part] for part in result)
            _, s = _Shrink.apply(x, runner, (seed,), (count,), on_backward, parts, adapter)
        S.append(None if adapter is None else s)
    return Shrunk(x.detach(), tuple(S))


def expand(x: Tensor, S: Tensor | None, projection: Projection, impl: str):
    """``y (..., N)`` of one projection, and ``x`` for the next one.

    Args:
        x: from :func:`shrink`, or from the last call.
        S: the projection's, from :func:`shrink`.
    """
    weight, _, lora_B, bias, scaling, _ = projection
    runner = runner_of(flatten(x), projection, impl, projection.dropout_p > 0)
    args = x, S, weight, lora_B, bias, scaling, runner
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, S, lora_B, bias)
    ):
        return _Expand.apply(*args)
    return _expanded(*args), x


def draw_seeds(x: Tensor, projections: Sequence[Projection]) -> list[Tensor | None]:
    """Each dropout's seed, drawn in order, as the projections would draw them one by one."""
    return [
        dropout.draw_seed(x.device)
        if p.lora_A is not None and dropout.keep_count(p.dropout_p) < dropout.KEEP_ALL
        else None
        for p in projections
    ]


def runner_of(x: Tensor, projection: Projection, impl: str, dropped: bool):
    """What computes a projection's parts: :mod:`.shared_torch`, or the kernels.

    Args:
        x: ``(M, K)``, the projection's input.
    """
    if projection.lora_B is None:
        return shared_torch
    runner = dispatch.choose(x, projection.weight, projection.lora_B, impl, dropped)
    return shared_torch if runner is torch_impl else runner


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, runner, seeds, keep_counts, on_backward, made, *adapters):
        ctx.set_materialize_grads(False)
        if made is None:
            made = runner.shrink(flatten(x), adapters, seeds, keep_counts)
        S, keep_bits = made
        alias = x.detach()
        need_x, need_A = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        constant = [] if need_x else [alias]
        constant += [
            s for s, need in zip(S, need_A, strict=True) if s is not None and not (need or need_x)
        ]
        ctx.mark_non_differentiable(*constant)
        ctx.call = runner, keep_counts, on_backward, x.shape, x.dtype
        ctx.save_for_backward(x if any(need_A) else None, *adapters, *keep_bits)
        return alias, *S

    @staticmethod
    def backward(ctx, dx, *G):
        runner, keep_counts, on_backward, shape, dtype = ctx.call
        if on_backward is not None:
            on_backward()
        x, *saved = ctx.saved_tensors
        adapters, keep_bits = saved[: len(G)], saved[len(G) :]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        arrived = next((g for g in (dx, *G) if g is not None), None)
        if arrived is None:
            return (None,) * len(ctx.needs_input_grad)
        if not need_x:
            dx = None
        elif dx is not None:
            dx = flatten(dx)
        else:  # only in a second derivative
            dx = arrived.new_zeros((arrived.shape[0], shape[-1]), dtype=dtype)
        needs = [need and g is not None for need, g in zip(needs, G, strict=True)]
        inv_keeps = [dropout.KEEP_ALL / count for count in keep_counts]
        x = None if x is None else flatten(x)
        with without_autocast(arrived):
            if needs_new_tensors():
                dx, dA = reference.input_gradients(x, dx, adapters, G, keep_bits, inv_keeps, needs)
            else:
                dA = runner.input_gradients(x, dx, adapters, G, keep_bits, inv_keeps, needs)
        return None if dx is None else dx.view(shape), *(None,) * 5, *dA


def _expanded(x, S, weight, lora_B, bias, scaling, runner) -> Tensor:
    y = runner.expand(flatten(x), weight, bias, S, lora_B, scaling)
    if x.dim() != 2:
        # Not ``view``: autograd forbids in-place changes to a view that a Function returns.
        y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return y


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, S, weight, lora_B, bias, scaling, runner):
        ctx.set_materialize_grads(False)
        y = _expanded(x, S, weight, lora_B, bias, scaling, runner)
        alias = x.detach()
        need_x, need_S, _, need_B, need_bias, *_ = ctx.needs_input_grad
        if not need_x:  # or the next projection would compute dY W for nothing
            ctx.mark_non_differentiable(alias)
        is_tensor = isinstance(scaling, Tensor)
        bias_dtype = bias.dtype if need_bias else None
        ctx.call = runner, None if is_tensor else scaling, x.shape, bias_dtype
        ctx.save_for_backward(
            weight if need_x else None,
            lora_B if need_S or need_B else None,
            S if need_B else None,
            scaling.clone() if is_tensor else None,  # it may be written in place before backward
        )
        return y, alias

    @staticmethod
    def backward(ctx, dy, dx):
        if dy is None:
            return dx, *(None,) * 6
        weight, lora_B, S, scaling = ctx.saved_tensors
        runner, number, shape, bias_dtype = ctx.call
        need_x, need_S, _, need_B, need_bias, *_ = ctx.needs_input_grad
        scaling = number if scaling is None else scaling
        flat_dy, G, dB, db = flatten(dy), None, None, None
        new = needs_new_tensors()
        with without_autocast(dy):
            if need_S or need_B:
                thin = (reference if new else runner).thin_gradients
                G, dB = thin(flat_dy, lora_B, S, scaling, (need_S, need_B))
            if need_bias:
                wide = torch.promote_types(dy.dtype, torch.float32)
                db = flat_dy.sum(0, dtype=wide).to(bias_dtype)
            if need_x:
                base = (reference if new else shared_torch).base_gradient
                dx = base(flat_dy, weight, None if dx is None else flatten(dx)).view(shape)
            else:
                dx = None
        return dx, G, None, dB, db, None, None


def needs_new_tensors() -> bool:
    """Whether this backward must write nothing in place.

    So under ``create_graph`` and ``vmap``, and where compiled autograd traces it.
    """
    return (
        torch.is_grad_enabled() or is_transformed() or _is_included(_VMAP) or is_dynamo_compiling()
    )


def flatten(t: Tensor) -> Tensor:
    """``(..., n)`` as ``(M, n)``."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
