"""Which of PEFT's adapters on Parameters (``target_parameters``) run fused: those on experts.

PEFT puts one ``ParamWrapper`` around another for each Parameter of a module, the last one
outermost, and computes ``W + s·B A`` of all experts at each call. ``lora_A (E·rank, in)`` has the
expert as its slowest dimension, ``lora_B (out, rank·E)`` as its fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.experts import (
    ExpertAdapter,
    experts_forward,
    follows_autocast,
    unsupported,
    weight_of,
)
from ..layers.hooks import changed
from ..ops import cpu_gemm
from ..ops.modes import autocasts, is_exporting, is_recorded
from ..ops.validation import FLOATS
from .eligibility import NONE_ACTIVE, adapter_of, fits, mode_reason, scale_reason, unusual

_HALVES = (torch.float16, torch.bfloat16)
_INDICES = (torch.int32, torch.int64)
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
    reason = reason or unsupported(experts) or _experts_reason(experts)
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


def _experts_reason(experts: nn.Module) -> str | None:
    """Why the Parameters of the experts cannot be used, or something runs beside their forward."""
    if reason := unusual(experts):
        return reason
    if any(changed(module) for module in experts.modules()):
        return "a hook in the experts"
    names = ["gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"]
    for name in names:
        weight = experts._parameters.get(name)
        if weight is None:
            return f"a computed {name}"
        if weight.dim() != 3 or len(weight) != experts.num_experts:
            return f"a {name} of another shape"
        if weight.dtype not in FLOATS:
            return f"a {name} in {weight.dtype}"
        if weight.requires_grad:
            return "a trainable base weight"
        bias = experts._parameters.get(f"{name}_bias")
        shape = weight_of(experts, name).shape[:2]
        if experts.has_bias and (bias is None or bias.shape != shape):
            return f"a computed {name}_bias"
    up, down = (experts._parameters[name] for name in names)
    if up.dtype != down.dtype or up.device != down.device:
        return "experts in two dtypes or on two devices"
    return None


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
    stacks = A.reshape(E, rank, K), B.reshape(N, rank, E).permute(2, 0, 1)
    return ExpertAdapter(*stacks, scaling)


def call_reason(parts: ExpertParts, x, index, shares) -> str | None:
    """Why a call runs PEFT's own forward; None if it runs fused."""
    weight = parts.experts._parameters["down_proj"]
    tensors = x, index, shares
    if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors):
        return "an input that is not a plain tensor"
    if any(t.is_nested or t.layout != torch.strided or t.dim() != 2 for t in tensors):
        return "an input that is not a dense matrix"
    if any(t.device != weight.device for t in tensors) or x.is_meta:
        return "an input on another device"
    if not {x.dtype, shares.dtype} <= set(FLOATS) or index.dtype not in _INDICES:
        return "an input in another dtype"
    if index.shape != shares.shape or len(index) != len(x) or not index.shape[1]:
        return "inputs of different sizes"
    up = "gate_up_proj" if getattr(parts.experts, "has_gate", True) else "up_proj"
    if x.shape[1] != weight_of(parts.experts, up).shape[2]:
        return "an input of another size"
    if follows_autocast(parts.experts):
        if not autocasts(x):
            if x.dtype != weight.dtype:
                return "an input in another dtype than the experts"
        elif torch.float64 in (x.dtype, weight.dtype):
            return "float64 under autocast"
        elif x.dtype in _HALVES and x.dtype != torch.get_autocast_dtype(x.device.type):
            return "an input in a half precision other than autocast's"
    if is_exporting() or is_recorded():
        return "an exporter or a compiler"
    return mode_reason()


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
