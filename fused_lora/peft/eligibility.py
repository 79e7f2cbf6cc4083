"""Which of PEFT's layers and calls can run fused, and why the others cannot.

A layer is eligible if its forward is exactly ``W x + b + s·B A D(x)``. If only its base layer is
special, that runs its own forward and the adapter is added to its output. Reasons are noun
phrases: ``PatchReport`` shows them after "PEFT's forward:" or "fused beside its base:".
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from ..layers.hooks import mode_reason, unusual
from ..models.targets import is_conv1d
from ..ops import cpu_gemm
from ..ops.modes import autocasts
from ..ops.validation import FLOATS

NONE_ACTIVE = "no active adapter"
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Parts:
    """The tensors and settings that a layer with a plain adapter computes with."""

    name: str
    base: nn.Module
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout: float
    weight: Tensor | None = None  # (out, in); None if the base runs its own forward
    bias: Tensor | None = None
    beside: str | None = None  # why the base runs its own forward, or None

    @property
    def narrowed(self) -> bool:
        """Whether the adapter's products are computed in less than its own precision."""
        weight = self.base._parameters.get("weight") if self.beside else self.weight
        dtype = getattr(weight, "dtype", None)
        if self.lora_A.is_cpu and dtype in cpu_gemm.EMULATED:
            return False
        return self.lora_A.dtype == torch.float32 and dtype not in (None, torch.float32)


def parts_of(layer: nn.Module, kinds: Container[type], name: str | None = None) -> Parts | str:
    """The layer's current tensors, or the reason why it runs PEFT's own forward.

    Runs at every call, so it reads ``_modules``: ``nn.Module.__getattr__`` is slower.

    Args:
        kinds: the PEFT classes whose forward is replaced.
        name: one of the layer's adapters; by default the active one.
    """
    if type(layer) not in kinds and type(layer).__module__ != "peft.tuners.lora.torchao":
        return f"a lora.{type(layer).__name__} layer"
    adapter = adapter_of(layer, name)
    if isinstance(adapter, str):
        return adapter
    name, A, B, p = adapter
    base = layer._modules["base_layer"]
    parts = Parts(name, base, A, B, layer.scaling[name], p)
    parts.beside = _base_reason(base)
    if parts.beside is None:
        weight = base._parameters["weight"]
        if not fits(A.dtype, weight.dtype):
            return f"adapters in {A.dtype} on a base in {weight.dtype}"
        parts.weight = weight if type(base) is nn.Linear else weight.t()
        parts.bias = base._parameters["bias"]
    return parts


def adapter_of(
    layer: nn.Module, name: str | None = None
) -> tuple[str, Tensor, Tensor, float] | str:
    """A layer's active adapter: its name, ``lora_A``, ``lora_B`` and dropout; or why it is special.

    ``name`` selects another adapter.

    Reads ``_modules``, as :func:`parts_of`.
    """
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    modules = layer._modules
    all_A = modules["lora_A"]._modules
    if name is None:
        names = [name for name in layer.active_adapters if name in all_A]
        if len(names) != 1:
            return f"{len(names)} active adapters" if names else NONE_ACTIVE
        (name,) = names
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        return f"the variant {variant.removesuffix('LinearVariant') or variant}"
    lora_A, lora_B = all_A[name], modules["lora_B"]._modules[name]
    drop = modules["lora_dropout"]._modules[name]
    if type(drop) is not nn.Dropout and type(drop) is not nn.Identity:
        return f"a dropout of class {type(drop).__name__}"
    for role, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear:
            return f"a {role} of class {type(module).__name__}"
        # Missing: a tensor that is no Parameter, as in the replicas of DataParallel.
        if "bias" not in module._parameters or module._parameters["bias"] is not None:
            return f"a bias in {role}"
    for role, module in (("lora_dropout", drop), ("lora_A", lora_A), ("lora_B", lora_B)):
        if reason := unusual(module):
            return f"{role}: {reason}"
    A, B = lora_A._parameters["weight"], lora_B._parameters["weight"]
    if A.dtype != B.dtype:
        return "lora_A and lora_B in different dtypes"
    return name, A, B, drop.p if type(drop) is nn.Dropout and drop.training else 0.0


def _base_reason(base: nn.Module) -> str | None:
    """Why a base layer runs its own forward; None if that is the plain product."""
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"a base layer of class {type(base).__name__}"
    if reason := unusual(base):
        return f"base_layer: {reason}"
    if "weight" not in base._parameters or "bias" not in base._parameters:
        return "a computed weight or bias"
    weight = base._parameters["weight"]
    if weight.requires_grad:
        return "a trainable base weight"
    if weight.dtype not in FLOATS:
        return f"a base weight in {weight.dtype}"
    return None


def fits(adapter: torch.dtype, compute: torch.dtype) -> bool:
    """Whether an adapter can run in ``compute``: its own dtype, or half precision for float32."""
    return adapter == compute or (compute in _HALVES and adapter == torch.float32)


def input_reason(layer: nn.Module, x: Tensor, parts: Parts) -> str | None:
    """Why a call with ``x`` runs PEFT's own forward; None if it runs fused."""
    lora_A, lora_B, scaling = parts.lora_A, parts.lora_B, parts.scaling
    device = lora_A.device
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.is_nested:
        return "an input that is not a plain tensor"
    if x.layout != torch.strided or x.device != device or x.dtype not in FLOATS:
        return "a sparse or non-float input, or one on another device"
    autocast = autocasts(x)
    if autocast:
        if torch.float64 in (x.dtype, lora_A.dtype):
            return "float64 under autocast"
        if x.dtype in _HALVES and x.dtype != torch.get_autocast_dtype(device.type):
            return "an input in a half precision other than autocast's"
    elif not fits(lora_A.dtype, x.dtype):
        return "an input in another dtype"
    if x.dtype != lora_A.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return "an input that PEFT must not cast"
    rank, K = lora_A.shape
    if not x.dim() or x.shape[-1] != K or not rank or lora_B.shape[1] != rank:
        return "shapes that do not match"
    if lora_B.device != device:
        return "adapters on two devices"
    if parts.beside is None:
        weight = parts.weight
        if weight.device != device or weight.shape != (lora_B.shape[0], K):
            return "a base of another shape or device"
        if weight.dtype == torch.float64 if autocast else weight.dtype != x.dtype:
            return "an input in another dtype than the base"
    if reason := scale_reason(scaling, device):
        return reason
    if parts.dropout >= 1:
        return "a dropout of every entry"
    return None if torch.compiler.is_compiling() else mode_reason()


def scale_reason(scaling, device: torch.device) -> str | None:
    """Why a scale cannot be used; None if it is a finite number or a constant."""
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.requires_grad or scaling.device != device:
            return "a scale that is not a constant 0-d tensor on the device"
        return None
    # While compiling, a number may be symbolic.
    if isinstance(scaling, Real) and (torch.compiler.is_compiling() or math.isfinite(scaling)):
        return None
    return "a scale that is not a finite number"
