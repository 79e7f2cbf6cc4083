"""Which of PEFT's adapters on Parameters (``target_parameters``) run fused: those on experts.

PEFT puts one ``ParamWrapper`` around another for each Parameter of a module, the last one
outermost, and computes ``W + s·B A`` of all experts at each call. ``lora_A (E·rank, in)`` has the
expert as its slowest dimension, ``lora_B (out, rank·E)`` as its fastest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import expert_calls
from ..layers.expert_calls import experts_reason
from ..layers.experts import ExpertAdapter, experts_forward, unsupported, weight_of
from ..layers.hooks import changed
from ..models.expert_stacks import warn_of_experts
from ..models.untrained import watch_gradients
from ..ops import cpu_gemm
from .eligibility import NONE_ACTIVE, adapter_of, fits, scale_reason

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(slots=True)
class ExpertParts:
    """A module of experts and its adapters, by the name of their Parameter."""

    experts: nn.Module
    adapters: dict[str, ExpertAdapter]

    def narrowed(self, name: str) -> bool:
        """Whether an adapter's products are computed in less than its own precision."""
        weight, adapter = self.experts._parameters[name].dtype, self.adapters[name].lora_A
        if adapter.is_cpu and weight in cpu_gemm.EMULATED:
            return False
        return adapter.dtype == torch.float32 and weight != torch.float32


def wrapper_class() -> type[nn.Module] | None:
    """PEFT's class for adapters on Parameters; None before PEFT 0.17."""
    from peft.tuners.lora import layer

    return getattr(layer, "ParamWrapper", None)


def attach(model: nn.Module, config=None, targets: str | Iterable[str] | None = None) -> None:
    """Note the gradients of a model's adapters, and warn of experts without one.

    Args:
        config: of the adapter that PEFT has just added; by default the model's first, in which PEFT
            has replaced "all-linear" by names.
        targets: its ``target_modules`` as the user gave them.
    """
    watch_gradients(model)
    resolved = config is None
    if resolved:
        found = (vars(m)["peft_config"] for m in model.modules() if "peft_config" in vars(m))
        config = next(iter(next(found, {}).values()), None)
        targets = getattr(config, "target_modules", None)
    excluded = getattr(config, "exclude_modules", None)
    warn_of_experts(model, targets, excluded, resolved=resolved, cure="LoraConfig")


def chain_of(layer: nn.Module) -> list[nn.Module]:
    """A wrapper and those within it, the outermost first."""
    found = [layer]
    while type(inner := found[-1]._modules["base_layer"]) is type(layer):
        found.append(inner)
    return found


def parts_of(layer: nn.Module) -> ExpertParts | str:
    """What an outermost wrapper computes with, or the reason why PEFT's own forward runs."""
    wrappers = chain_of(layer)
    experts = wrappers[-1]._modules["base_layer"]
    reason = next((why for w in wrappers[1:] if (why := changed(w))), None)
    reason = reason or unsupported(experts) or experts_reason(experts)
    if reason:
        return reason
    adapters = {}
    for wrapper in wrappers:
        name, found = wrapper.parameter_name, adapter_of(wrapper)
        if found == NONE_ACTIVE:
            continue
        if isinstance(found, str):
            return found
        adapter = _adapter_of(wrapper, experts, *found)
        if isinstance(adapter, str):
            return adapter
        if name in adapters:
            return f"two adapters on {name}"
        adapters[name] = adapter
    return ExpertParts(experts, adapters) if adapters else NONE_ACTIVE


def _adapter_of(wrapper, experts, adapter, A: Tensor, B: Tensor, dropout) -> ExpertAdapter | str:
    """The adapter of a wrapper's Parameter as views ``(E, rank, in)`` and ``(E, out, rank)``."""
    name, E = wrapper.parameter_name, experts.num_experts
    if name not in _PARAMETERS or name not in experts._parameters:
        return f"an adapter on {name}"
    if dropout:
        return "a dropout"
    if getattr(wrapper, "_did_swap_in_out_features", False) is bool(experts.is_transposed):
        return "adapters of PEFT before 0.19.1, with in and out exchanged"
    weight = weight_of(experts, name)
    _, N, K = weight.shape
    rank = len(A) // E
    if A.shape != (rank * E, K) or B.shape != (N, rank * E) or not rank:
        return "shapes that do not match"
    if A.device != weight.device or B.device != weight.device:
        return "adapters on another device"
    if not fits(A.dtype, weight.dtype):
        return f"adapters in {A.dtype} on experts in {weight.dtype}"
    scaling = wrapper.scaling[adapter]
    if reason := scale_reason(scaling, weight.device):
        return reason
    return ExpertAdapter.of(A, B, E, scaling)


def call_reason(parts: ExpertParts, x, index, shares) -> str | None:
    """Why a call runs PEFT's own forward; None if it runs fused."""
    return expert_calls.call_reason(parts.experts, x, index, shares)


def fused(parts: ExpertParts, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """The experts' output; autograd passes to ``x``, the shares, adapters and biases."""
    return experts_forward(parts.experts, x, index, shares, parts.adapters)


def parameters_of(
    layers: dict[str, nn.Module], kind: type[nn.Module] | None
) -> Iterator[tuple[str, str, ExpertParts | str]]:
    """Each wrapped Parameter of a model: its module's name, its own, and what runs or why not."""
    inner: set[int] = set()
    for name, layer in layers.items():
        if type(layer) is not kind or id(layer) in inner:
            continue
        wrappers = chain_of(layer)
        inner |= set(map(id, wrappers))
        own = changed(layer) if "forward" in vars(layer) else None
        parts = own or parts_of(layer)
        for wrapper in wrappers:
            parameter = wrapper.parameter_name
            found = parts
            if isinstance(parts, ExpertParts) and parameter not in parts.adapters:
                found = NONE_ACTIVE
            yield name, parameter, found
