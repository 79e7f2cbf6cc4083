"""PEFT's LoRA layers on this library's kernels, by one line: ``patch_peft(model)``.

The forward of PEFT's linear LoRA layers is replaced once, on the class. At every call the layer is
looked at as it then is: what is plain ``W x + b + s·B A D(x)`` runs fused; where only the base is
special, as a quantised one, it runs its own forward and the adapter runs fused beside it;
everything else runs PEFT's own forward. Nothing of the model changes: not its modules, parameters,
files or life cycle.

Differences to PEFT where a layer is fused: another stream of random numbers decides which entries
dropout drops; and where float32 adapters sit on a half-precision base, the adapter's products are
taken in the dtype of ``x`` (on a CPU in float32 if rows are few or it has no instructions for that
dtype), so that gradients are as accurate as that dtype.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from . import aten
from .autograd import autocasts
from .functional import fused_lora_add, fused_lora_linear
from .patch_report import PatchReport
from .sharding import is_shard
from .targets import is_conv1d
from .validation import FLOATS

_HALVES = (torch.float16, torch.bfloat16)

# PEFT's classes while their forward is replaced: that forward, and the one given for it.
_replaced: dict[type[nn.Module], tuple[Callable, Callable]] = {}
_everywhere = False
_patched: WeakSet[nn.Module] = WeakSet()  # layers of single models; their copies have the flag too
_FLAG = "_fused_lora_patch"
_generation = 0  # the flag's value: those that are left when PEFT has its forward back are stale


def patch_peft(model: nn.Module | None = None) -> PatchReport:
    """Run PEFT's LoRA layers fused where they are plain, and as before where they are not.

    Args:
        model: its layers, as they are now; by default every layer of PEFT's, in models to come too.

    Returns:
        What happens to each layer of ``model``, and why.

    Raises:
        ModuleNotFoundError: no PEFT.
        ValueError: a model without PEFT's LoRA layers.
    """
    global _everywhere
    from peft.tuners.lora import LoraLayer

    layers = {} if model is None else dict(_layers(model, LoraLayer))
    if model is not None and not layers:
        raise ValueError(
            f"expected a model with PEFT's LoRA layers, got a {type(model).__name__} without"
        )
    for kind in _peft_classes():
        if kind not in _replaced:
            _replaced[kind] = kind.forward, _forward_instead_of(kind.forward)
            kind.forward = _replaced[kind][1]
    if model is None:
        _everywhere = True
    for layer in layers.values():
        setattr(layer, _FLAG, _generation)
        _patched.add(layer)
    _forget_compiled()
    found = {
        # Its caller is not ours to know: X-LoRA's does not come back to the class.
        name: "a forward replaced on the instance" if "forward" in vars(layer) else _parts(layer)
        for name, layer in layers.items()
    }
    parts = {name: plain for name, plain in found.items() if isinstance(plain, _Parts)}
    return PatchReport(
        layers={name: None if name in parts else reason for name, reason in found.items()},
        beside={name: plain.beside for name, plain in parts.items() if plain.beside is not None},
        narrowed=[name for name, plain in parts.items() if plain.narrowed],
        everywhere=model is None,
    )


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Give PEFT's forward back: to one model patched by itself, or to every layer.

    Raises:
        RuntimeError: something else has replaced the forward since.
        ValueError: a single model while every layer of PEFT's is patched.
    """
    global _everywhere, _generation
    if model is not None and _everywhere:
        raise ValueError("expected unpatch_peft() after patch_peft(), got a single model")
    for module in list(_patched) if model is None else model.modules():
        vars(module).pop(_FLAG, None)
        _patched.discard(module)
    if model is None:
        _everywhere = False
    _forget_compiled()
    if not _replaced or len(_patched):
        return
    for kind, (_, given) in _replaced.items():
        if kind.forward is not given:
            raise RuntimeError(
                f"expected the forward that patch_peft gave to PEFT's {kind.__name__}, got another:"
                " undo first what replaced it"
            )
    for kind, (original, _) in _replaced.items():
        kind.forward = original
    _replaced.clear()
    _generation += 1


def _peft_classes() -> list[type[nn.Module]]:
    """PEFT's linear LoRA layers that add one product to their base layer's output."""
    from peft.tuners import lora

    classes = [lora.Linear]
    for name in ("Linear8bitLt", "Linear4bit"):  # there if bitsandbytes is
        with contextlib.suppress(AttributeError, ImportError):
            classes.append(getattr(lora, name))
    return classes


def _forget_compiled() -> None:
    """Compiled code has the other forward in it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _layers(model: nn.Module, kind: type):
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name, module


def _forward_instead_of(original: Callable) -> Callable:
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if (_everywhere or self.__dict__.get(_FLAG) == _generation) and not args and not kwargs:
            parts = _parts(self)
            if not isinstance(parts, str) and _input_reason(self, x, parts) is None:
                return _beside(self, x, parts) if parts.beside else _fused(x, parts)
        return original(self, x, *args, **kwargs)

    return forward


@dataclass(slots=True)
class _Parts:
    """What a layer with a plain adapter computes with."""

    name: str
    base: nn.Module
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout: float
    weight: Tensor | None = None  # of a plain base, with its bias
    bias: Tensor | None = None
    beside: str | None = None  # why the base runs its own forward

    @property
    def narrowed(self) -> bool:
        """Whether the adapter's products are taken in less than its own precision."""
        weight = self.base._parameters.get("weight") if self.beside else self.weight
        dtype = getattr(weight, "dtype", None)
        if self.lora_A.is_cpu and dtype in aten.EMULATED:
            return False
        return self.lora_A.dtype == torch.float32 and dtype not in (None, torch.float32)


def _fused(x: Tensor, parts: _Parts) -> Tensor:
    return fused_lora_linear(
        x,
        parts.weight,
        parts.lora_A,
        parts.lora_B,
        parts.bias,
        scaling=parts.scaling,
        dropout_p=parts.dropout,
    )


def _beside(layer: nn.Module, x: Tensor, parts: _Parts) -> Tensor:
    """The base layer's own forward, and the adapter added to what it gives."""
    y, shape = parts.base(x), (*x.shape[:-1], parts.lora_B.shape[0])
    plain = type(y) is Tensor and y.layout == torch.strided and y.dtype in FLOATS
    if plain and y.shape == shape and y.device == x.device:
        return _added(y, x, parts)
    # No output of a linear layer: what PEFT does with it.
    name, x = parts.name, layer._cast_input_dtype(x, parts.lora_A.dtype)
    low_rank = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x)))
    return (y + low_rank * parts.scaling).to(y.dtype)


def _added(y: Tensor, x: Tensor, parts: _Parts) -> Tensor:
    return fused_lora_add(
        y,
        x,
        parts.lora_A,
        parts.lora_B,
        scaling=parts.scaling,
        dropout_p=parts.dropout,
    )


def _parts(layer: nn.Module) -> _Parts | str:
    """The layer's tensors as it now is, or why it runs PEFT's own forward.

    Asked at every call: ``_modules`` is read because ``nn.Module.__getattr__`` costs more.
    """
    if type(layer) not in _replaced and type(layer).__module__ != "peft.tuners.lora.torchao":
        return f"a lora.{type(layer).__name__} layer"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    modules = layer._modules
    all_A = modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in all_A]
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else "no active adapter"
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
        if module._parameters["bias"] is not None:
            return f"a bias in {role}"
    for role, module in (("lora_dropout", drop), ("lora_A", lora_A), ("lora_B", lora_B)):
        if reason := _changed(module):
            return f"{role}: {reason}"
    base = modules["base_layer"]
    A, B = lora_A._parameters["weight"], lora_B._parameters["weight"]
    if A.dtype != B.dtype:
        return "adapters of two dtypes"
    p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
    parts = _Parts(name, base, A, B, layer.scaling[name], p)
    parts.beside = _base_reason(base)
    if parts.beside is None:
        weight = base._parameters["weight"]
        if not _fits(A.dtype, weight.dtype):
            return f"adapters in {A.dtype} on a base in {weight.dtype}"
        parts.weight = weight if type(base) is nn.Linear else weight.t()
        parts.bias = base._parameters["bias"]
    return parts


def _base_reason(base: nn.Module) -> str | None:
    """Why a base layer runs its own forward; None if it is the plain product."""
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"a base layer of class {type(base).__name__}"
    if reason := _changed(base):
        return f"base_layer: {reason}"
    weight = base._parameters["weight"]
    if weight.requires_grad:
        return "a base weight that trains"
    if weight.dtype not in FLOATS:
        return f"a base weight in {weight.dtype}"
    return None


def _fits(adapter: torch.dtype, compute: torch.dtype) -> bool:
    """Whether an adapter may be computed in a dtype: its own, or half of float32."""
    return adapter == compute or (compute in _HALVES and adapter == torch.float32)


def _changed(module: nn.Module) -> str | None:
    """What makes a module of a plain class more than its formula."""
    if "forward" in module.__dict__:
        return "a forward replaced on the instance, as accelerate does"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "a hook"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            if is_shard(parameter):
                return "sharded, unless FSDP2 gathers it for the call"
            return f"a {name} of class {type(parameter).__name__}"
        if parameter is not None and hasattr(parameter, "ds_id"):
            return "partitioned by DeepSpeed's ZeRO-3"
    if type(module) is nn.Linear and "weight" not in module._parameters:
        return "a computed weight"
    return None


def _input_reason(layer: nn.Module, x: Tensor, parts: _Parts) -> str | None:
    """Why this call runs PEFT's own forward; None if it runs fused."""
    lora_A, lora_B, scaling = parts.lora_A, parts.lora_B, parts.scaling
    compiling = torch.compiler.is_compiling()  # where a number may be symbolic
    device = lora_A.device
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.is_nested:
        return "an input that is no plain tensor"
    if x.layout != torch.strided or x.device != device or x.dtype not in FLOATS:
        return "an input of another kind or device"
    autocast = autocasts(x)
    if autocast:
        if torch.float64 in (x.dtype, lora_A.dtype):
            return "float64 under autocast"
        if x.dtype in _HALVES and x.dtype != torch.get_autocast_dtype(device.type):
            return "an input in another half precision than autocast's"
    elif not _fits(lora_A.dtype, x.dtype):
        return "an input of another dtype"
    if x.dtype != lora_A.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return "an input that is not to be cast"
    rank, K = lora_A.shape
    if not x.dim() or x.shape[-1] != K or not rank or lora_B.shape[1] != rank:
        return "shapes that do not fit"
    if lora_B.device != device:
        return "adapters on two devices"
    if parts.beside is None:
        weight = parts.weight
        if weight.device != device or weight.shape != (lora_B.shape[0], K):
            return "a base that does not fit"
        if weight.dtype == torch.float64 if autocast else weight.dtype != x.dtype:
            return "an input of another dtype than the base"
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.requires_grad or scaling.device != device:
            return "a scale that is no constant on the device"
    elif not isinstance(scaling, Real) or not (compiling or math.isfinite(scaling)):
        return "a scale that is no finite number"
    if parts.dropout >= 1:
        return "a dropout of everything"
    if compiling:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if (
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    ):
        return "a hook on every module"
    return None
