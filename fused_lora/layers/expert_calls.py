"""Which modules of experts, and which of their calls, :func:`.experts.experts_forward` computes.

Reasons are noun phrases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.modes import autocasts, is_exporting, is_recorded
from ..ops.validation import FLOATS
from .experts import first_matrix, follows_autocast, weight_of
from .hooks import changed, mode_reason, unusual

_HALVES = (torch.float16, torch.bfloat16)
_INDICES = (torch.int32, torch.int64)


def experts_reason(experts: nn.Module, frozen: bool = True) -> str | None:
    """Why the Parameters of the experts cannot be used, or something runs beside their forward.

    Args:
        frozen: whether the matrices must be frozen already.
    """
    if reason := unusual(experts):
        return reason
    if any(changed(module) for module in experts.modules()):
        return "a hook in the experts"
    names = [first_matrix(experts), "down_proj"]
    for name in names:
        weight = experts._parameters.get(name)
        if weight is None:
            return f"a computed {name}"
        if weight.dim() != 3 or len(weight) != experts.num_experts:
            return f"a {name} of another shape"
        if weight.dtype not in FLOATS:
            return f"a {name} in {weight.dtype}"
        if frozen and weight.requires_grad:
            return "a trainable base weight"
        bias = experts._parameters.get(f"{name}_bias")
        shape = weight_of(experts, name).shape[:2]
        if experts.has_bias and (bias is None or bias.shape != shape):
            return f"a computed {name}_bias"
    up, down = (experts._parameters[name] for name in names)
    if up.dtype != down.dtype or up.device != down.device:
        return "experts in two dtypes or on two devices"
    return None


def call_reason(experts: nn.Module, x, index, shares) -> str | None:
    """Why a call is not one that :func:`.experts.experts_forward` computes; None if it is."""
    weight = experts._parameters["down_proj"]
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
    if x.shape[1] != weight_of(experts, first_matrix(experts)).shape[2]:
        return "an input of another size"
    if follows_autocast(experts):
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
