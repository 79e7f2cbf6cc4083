"""The forward of modules with adapted Parameters: fused, or with ``W + s·B A`` in their places."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..distributed import sharding
from ..ops.modes import outside_graphs, without_autocast
from .base import LoRALayer
from .expert_calls import call_reason, experts_reason
from .experts import ExpertAdapter, experts_forward, unsupported


def unfused_reason(module: nn.Module, frozen: bool = True) -> str | None:
    """Why a module with adapters runs its own forward; None if it is experts that run fused.

    Args:
        frozen: whether its Parameters must be frozen already.
    """
    return unsupported(module) or experts_reason(module, frozen)


@outside_graphs  # the number of an expert's tokens is data
def of_experts(
    base: nn.Module,
    active: list[LoRALayer],
    kept: list[LoRALayer],
    args: tuple,
    kwargs: dict,
):
    """The forward of a module with stacks, fused if :func:`unfused_reason` has none against it.

    Args:
        active: the layers whose adapters add to it.
        kept: merged and disabled layers, which compute with the base weight kept aside.
    """
    check_active(active)
    reason = "a Parameter that is merged and disabled" if kept else unfused_reason(base)
    if reason is None:
        reason = "other arguments" if len(args) != 3 or kwargs else call_reason(base, *args)
    if reason is None:
        adapters = {layer.parameter_name: _adapter(layer) for layer in active}
        return experts_forward(base, *args, adapters, impl=active[0].impl)
    if not kept and not active[0].__dict__.get("_told"):
        active[0].__dict__["_told"] = True
        warnings.warn(
            f"fused_lora: the adapters of a {type(base).__name__} compute W + s·B A at every call"
            f" ({reason})",
            stacklevel=2,
        )
    return summed(base, active, kept, reason, args, kwargs)


def check_active(layers: list[LoRALayer]) -> None:
    for layer in layers:
        if layer.parameter_name not in layer.holder._parameters:
            raise RuntimeError(
                f"expected {layer.parameter_name} to be a Parameter, got one that a parametrization"
                " computes: remove it"
            )
        if sharding.is_shard(layer.weight, layer.lora_A, layer.lora_B):
            raise ValueError(
                "expected whole tensors, got sharded ones: call fully_shard on the outermost layer"
                " around the experts or on a module that contains it, not on a part of it"
            )
        if layer.lora_A.is_meta != layer.weight.is_meta:
            layer.check_values()


def summed(
    base: nn.Module,
    active: list[LoRALayer],
    kept: list[LoRALayer],
    reason: str,
    args: tuple,
    kwargs: dict,
):
    """The module's own forward, with ``W + s·B A`` in the Parameters' places."""
    if dropping := [x.parameter_name for x in active if x.dropout and x.training]:
        raise RuntimeError(
            f"expected dropout=0, got dropout of the adapters of {' and '.join(dropping)}, which"
            f" compute W + s·B A as one matrix ({reason}): set layer.dropout = 0"
        )
    if base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules()):
        raise RuntimeError(
            f"expected a {type(base).__name__} without activation checkpointing of its own, whose"
            " recomputation would omit the adapter: checkpoint a module that contains it"
        )
    weights = {layer.parameter_name: layer.plain_weight() for layer in kept}
    weights |= {layer.parameter_name: _sum(layer) for layer in active}
    # Another name that is tied to the Parameter keeps the plain value.
    return functional_call(base, weights, args, kwargs, tie_weights=False)


def _adapter(layer: LoRALayer) -> ExpertAdapter:
    p = layer.dropout if layer.training else 0.0
    return ExpertAdapter.of(layer.lora_A, layer.lora_B, layer.num_matrices, layer._scale(), p)


def _sum(layer: LoRALayer) -> Tensor:
    """``W + s·B A`` in the Parameter's shape and dtype, differentiable in the adapter."""
    weight = layer.weight_like(layer)
    A, B = layer.stacked({"lora_A": layer.lora_A, "lora_B": layer.lora_B})
    with without_autocast(weight):
        delta = torch.bmm(B.to(weight.dtype), A.to(weight.dtype)) * layer._scale()
    return layer.from_matrix(weight + delta.to(weight.dtype).view(weight.shape))
