"""Which implementation and strategy a call would use, and why: :func:`explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from .distributed.sharding import is_shard
from .layers import gated_block
from .layers.base import LoRALayer
from .layers.parameter import LoRAParameter
from .layers.parameter_forward import unfused_reason
from .layers.shared_input import MIN_ROWS
from .models.arguments import check_without_peft, described
from .ops import dropout
from .ops.dispatch import Decision, SegmentedCall, decide, decide_segmented
from .ops.segments import Segments, ranks_of
from .ops.validation import (
    check_dropout,
    check_impl,
    check_impl_of_segments,
    check_segmented,
    check_tensors,
)


def explain(
    target: nn.Module | Tensor,
    weight: Tensor | None = None,
    lora_A: Tensor | None = None,
    *,
    tokens: int = 1024,
    dropout_p: float | None = None,
    impl: str | None = None,
    segments: Segments | None = None,
) -> Decision:
    """Which implementation and strategy a call would use, and why. Runs nothing.

    Assumes an eager call on plain tensors in ``x``'s own dtype; autocast and compilers are ignored.

    Args:
        target: an adapted layer, or ``x (..., in)`` with ``weight`` and
            ``lora_A`` as for :func:`fused_lora.fused_lora_linear`. A gated MLP that is one block
            is explained by its gate.
        tokens: number of rows to assume for a layer; for experts, tokens times experts per token.
        dropout_p: the call's dropout probability. Default: the layer's (0 in eval mode), or 0 for
            tensors.
        impl: the call's ``impl``. Default: the layer's, or "auto" for tensors.
        segments: the call's, with tensors: ``weight`` and ``lora_A`` are then as for
            :func:`fused_lora.fused_lora_linear` with segments.

    Raises:
        TypeError: neither a layer nor three tensors, or an argument of the wrong type.
        ValueError: an explicit ``impl`` that cannot run here, an argument that does not fit, or a
            layer of PEFT (see :func:`patch_peft`).
    """
    block = gated_block.block_of(target) if isinstance(target, nn.Module) else None
    if block is not None:
        gate = target.get_submodule(block.layers[0])
        decision = explain(gate, tokens=tokens, dropout_p=dropout_p, impl=impl)
        why = block.reason(target) or (f"{tokens} rows" if tokens < MIN_ROWS else None)
        what = f"one block ({block.activation})" if why is None else f"layer by layer ({why})"
        return replace(decision, reason=f"{what}, gate: {decision.reason}")
    if isinstance(target, LoRALayer):
        layer = target
        if not isinstance(tokens, Integral) or isinstance(tokens, bool):
            raise TypeError(f"expected tokens to be an int, got {described(tokens)}")
        if tokens < 0:
            raise ValueError(f"expected tokens >= 0, got {tokens}")
        if layer.merged or not layer.enabled:
            state = "merged" if layer.merged else "disabled"
            return Decision("torch", None, None, f"the adapter is {state}: the base layer alone")
        if isinstance(layer, LoRAParameter):
            return _explain_parameter(layer, tokens, dropout_p, impl)
        if layer.no_kernel is not None:
            return Decision("torch", None, None, f"{layer.no_kernel}, in plain PyTorch")
        weight, lora_A = layer.to_matrix(layer.weight_like(layer)), layer.lora_A
        if is_shard(weight):
            weight = weight.to_local()  # each rank runs the kernels on its own part
        # On the meta device: only the shape and dtype of x are read.
        x = torch.empty((tokens, weight.shape[1]), dtype=weight.dtype, device="meta")
        impl = layer.impl if impl is None else impl
        if dropout_p is None:
            dropout_p = layer.dropout if layer.training else 0.0
        if layer.use_dora:
            return _explain_dora(layer, weight, tokens, dropout_p, impl)
    elif segments is not None:
        return _explain_segments(target, weight, lora_A, dropout_p or 0.0, impl or "auto", segments)
    elif all(isinstance(t, Tensor) for t in (target, weight, lora_A)):
        x = target
        if not weight.dim() == lora_A.dim() == 2:
            shapes = f"{tuple(weight.shape)} and {tuple(lora_A.shape)}"
            raise ValueError(f"expected weight (out, in) and lora_A (rank, in), got {shapes}")
        lora_B = lora_A.new_empty((weight.shape[0], lora_A.shape[0]))
        check_tensors(x, weight.detach(), lora_A, lora_B, None, 1.0)
    else:
        hint = ""
        if isinstance(target, nn.Module):
            check_without_peft(target)
            hint = ": lora_layers(model) has a model's adapted layers"
        raise TypeError(
            "expected an adapted layer, or the tensors x, weight and lora_A, got"
            f" {described(target)}{hint}"
        )
    impl = "auto" if impl is None else impl
    dropout_p = 0.0 if dropout_p is None else dropout_p
    check_impl(impl)
    check_dropout(dropout_p)
    rows = x.shape[:-1].numel()
    decision = _explain(impl, weight, x.dtype, rows, lora_A.shape[0], dropout_p)
    place = getattr(target, "shared_input", None)
    if place is not None and rows >= MIN_ROWS:
        others = [name for i, name in enumerate(place.names) if i != place.index]
        shared = f"its x may be shared with {' and '.join(others)}"
        decision = replace(decision, reason=f"{decision.reason}; {shared}")
    return decision


def _explain_parameter(layer: LoRAParameter, tokens: int, dropout_p, impl) -> Decision:
    """Of experts, the products over the segments of their tokens."""
    if reason := unfused_reason(layer.holder):
        return Decision("torch", None, None, f"W + s·B A at every call ({reason})")
    if dropout_p is None:
        dropout_p = layer.dropout if layer.training else 0.0
    impl = layer.impl if impl is None else impl
    check_impl_of_segments(impl)
    check_dropout(dropout_p)
    if impl == "reference":
        return Decision("reference", None, None, "requested: eager autograd")
    weight = layer.weight_like(layer)
    E, N, K = weight.shape
    adapted = frozenset([(layer.rank, dropout.keep_count(dropout_p))])
    call = SegmentedCall(tokens, K, N, E, True, False, adapted)
    return decide_segmented(impl, weight.device, weight.dtype, call)


def _explain_segments(x, weight, lora_A, dropout_p, impl: str, segments: Segments) -> Decision:
    if not isinstance(weight, Tensor) or weight.dim() not in (2, 3):
        raise TypeError(f"expected weight (out, in) or (G, out, in), got {described(weight)}")
    if not isinstance(lora_A, (Tensor, Sequence)):
        raise TypeError(f"expected lora_A (G, rank, in) or a sequence, got {described(lora_A)}")
    N = weight.shape[-2]
    if isinstance(lora_A, Tensor):
        lora_B = lora_A.new_empty((len(segments), N, lora_A.shape[1] if lora_A.dim() == 3 else 1))
    else:
        lora_B = [None if A is None else A.new_empty((N, A.shape[0])) for A in lora_A]
    args = x, weight.detach(), lora_A, lora_B, None, 1.0, dropout_p, impl, segments
    _, _, _, dropouts = check_segmented(*args)
    if impl == "reference":
        return Decision("reference", None, None, "requested: eager autograd")
    each = zip(ranks_of(lora_A), dropouts, strict=True)
    adapted = [(rank, dropout.keep_count(p)) for rank, p in each if rank is not None]
    call = SegmentedCall.of(x, weight, segments, adapted)
    return decide_segmented(impl, x.device, x.dtype, call)


def _explain(impl: str, weight: Tensor, dtype, rows: int, rank: int, dropout_p: float) -> Decision:
    if impl == "reference":
        return Decision("reference", None, None, "requested: eager autograd")
    dropped = dropout.keep_count(dropout_p) < dropout.KEEP_ALL
    return decide(impl, weight.device, dtype, rows, *weight.shape, rank, dropped)


def _explain_dora(layer, weight: Tensor, tokens: int, dropout_p: float, impl: str) -> Decision:
    """The decision for the fused product inside DoRA; the reason names DoRA's extra work."""
    # The mask is applied to x before that product, which therefore runs without dropout.
    inner = _explain(impl, weight, weight.dtype, tokens, layer.rank, 0.0)
    added = "DoRA adds, in PyTorch, the row norms (one read of the weight) and a scaling of y"
    if dropout_p:
        added += ", and, with dropout, a second product with the weight"
    return replace(inner, reason=f"{inner.reason}; {added}")
