"""PEFT's LoRA layers on this library's kernels, by one line: ``patch_peft(model)``.

The forward of PEFT's ``lora.Linear`` is replaced once, on the class. At every call the layer is
looked at as it then is: what is plain ``W x + b + s·B A D(x)`` runs fused, everything else runs
PEFT's own forward. Nothing of the model changes: not its modules, parameters, files or life cycle.

Differences to PEFT where a layer is fused: another stream of random numbers decides which entries
dropout drops; and where float32 adapters sit on a half-precision base, the adapter's products are
taken in the dtype of ``x``, so that gradients are as accurate as that dtype.
"""

from __future__ import annotations

import html
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from .functional import fused_lora_linear
from .sharding import is_shard
from .targets import is_conv1d
from .validation import FLOATS

_HALVES = (torch.float16, torch.bfloat16)

_linear: type[nn.Module] | None = None  # PEFT's class, while its forward is replaced
_original: Callable | None = None  # that forward
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
    global _everywhere, _linear, _original
    from peft.tuners.lora import Linear, LoraLayer

    layers = {} if model is None else dict(_layers(model, LoraLayer))
    if model is not None and not layers:
        raise ValueError(
            f"expected a model with PEFT's LoRA layers, got a {type(model).__name__} without"
        )
    if _original is None:
        _linear, _original = Linear, Linear.forward
        Linear.forward = _forward
    if model is None:
        _everywhere = True
    for layer in layers.values():
        setattr(layer, _FLAG, _generation)
        _patched.add(layer)
    _forget_compiled()
    parts = {name: _plain_parts(layer) for name, layer in layers.items()}
    narrowed = [
        name
        for name, plain in parts.items()
        if isinstance(plain, _Parts) and plain.lora_A.dtype != plain.weight.dtype
    ]
    reasons = {name: plain if isinstance(plain, str) else None for name, plain in parts.items()}
    return PatchReport(reasons, narrowed, model is None)


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Give PEFT's forward back: to one model patched by itself, or to every layer.

    Raises:
        RuntimeError: something else has replaced the forward since.
        ValueError: a single model while every layer of PEFT's is patched.
    """
    global _everywhere, _generation, _original
    if model is not None and _everywhere:
        raise ValueError("expected unpatch_peft() after patch_peft(), got a single model")
    for module in list(_patched) if model is None else model.modules():
        vars(module).pop(_FLAG, None)
        _patched.discard(module)
    if model is None:
        _everywhere = False
    _forget_compiled()
    if _original is None or len(_patched):
        return
    if _linear.forward is not _forward:
        raise RuntimeError(
            "expected the forward that patch_peft gave to PEFT's Linear, got another: undo first"
            " what replaced it"
        )
    _linear.forward = _original
    _original = None
    _generation += 1


def _forget_compiled() -> None:
    """Compiled code has the other forward in it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _layers(model: nn.Module, kind: type):
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name, module


def _forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    if (_everywhere or self.__dict__.get(_FLAG) == _generation) and not args and not kwargs:
        parts = _plain_parts(self)
        if not isinstance(parts, str) and _input_reason(self, x, parts) is None:
            return _fused(x, parts)
    return _original(self, x, *args, **kwargs)


@dataclass(slots=True)
class _Parts:
    """What a plain layer computes with."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout: float


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


def _plain_parts(layer: nn.Module) -> _Parts | str:
    """The layer's tensors as it now is, or why it runs PEFT's own forward.

    Asked at every call: ``_modules`` is read because ``nn.Module.__getattr__`` costs more.
    """
    if type(layer) is not _linear:
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
    base, lora_A = modules["base_layer"], all_A[name]
    lora_B = modules["lora_B"]._modules[name]
    drop = modules["lora_dropout"]._modules[name]
    transposed = type(base) is not nn.Linear
    if transposed and not is_conv1d(base):
        return f"a base layer of class {type(base).__name__}"
    if type(drop) is not nn.Dropout and type(drop) is not nn.Identity:
        return f"a dropout of class {type(drop).__name__}"
    for role, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear:
            return f"a {role} of class {type(module).__name__}"
        if module._parameters["bias"] is not None:
            return f"a bias in {role}"
    for role, module in (
        ("base_layer", base),
        ("lora_dropout", drop),
        ("lora_A", lora_A),
        ("lora_B", lora_B),
    ):
        if reason := _changed(module):
            return f"{role}: {reason}"
    weight = base._parameters["weight"]
    A, B = (module._parameters["weight"] for module in (lora_A, lora_B))
    if weight.requires_grad:
        return "a base weight that trains"
    if reason := _dtype_reason(weight.dtype, A.dtype, B.dtype):
        return reason
    return _Parts(
        weight.t() if transposed else weight,
        base._parameters["bias"],
        A,
        B,
        layer.scaling[name],
        drop.p if type(drop) is nn.Dropout and drop.training else 0.0,
    )


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


def _dtype_reason(weight: torch.dtype, lora_A: torch.dtype, lora_B: torch.dtype) -> str | None:
    if weight not in FLOATS:
        return f"a base weight in {weight}"
    if lora_B != lora_A:
        return "adapters of two dtypes"
    if lora_A != weight and not (weight in _HALVES and lora_A == torch.float32):
        return f"adapters in {lora_A} on a base in {weight}"
    return None


def _input_reason(layer: nn.Module, x: Tensor, parts: _Parts) -> str | None:
    """Why this call runs PEFT's own forward; None if it runs fused."""
    weight, scaling = parts.weight, parts.scaling
    device, dtype = weight.device, weight.dtype
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.is_nested:
        return "an input that is no plain tensor"
    if x.layout != torch.strided or x.device != device:
        return "an input of another kind or device"
    autocast = torch.is_autocast_enabled(device.type)
    if x.dtype != dtype and not (autocast and x.dtype in FLOATS):
        return "an input of another dtype"
    if autocast and torch.float64 in (x.dtype, dtype):
        return "float64 under autocast"
    if x.dtype != parts.lora_A.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return "an input that is not to be cast"
    (N, K), (rank, in_features) = weight.shape, parts.lora_A.shape
    if not x.dim() or x.shape[-1] != K or in_features != K or parts.lora_B.shape != (N, rank):
        return "shapes that do not fit"
    if not rank or parts.lora_A.device != device or parts.lora_B.device != device:
        return "adapters that do not fit"
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.requires_grad or scaling.device != device:
            return "a scale that is no constant on the device"
    elif not isinstance(scaling, Real) or not math.isfinite(scaling):
        return "a scale that is no finite number"
    if parts.dropout >= 1:
        return "a dropout of everything"
    if torch.compiler.is_compiling():
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


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_peft` does to each layer; prints its summary first.

    Attributes:
        layers: name to the reason why the layer keeps PEFT's forward, None if it runs fused; as the
            model was when patched. Every call decides anew.
        narrowed: fused layers whose float32 adapters are computed in the half precision of their
            base, with gradients as accurate as that.
        everywhere: whether PEFT's layers in all models are patched.
    """

    layers: dict[str, str | None]
    narrowed: list[str]
    everywhere: bool = False

    @property
    def summary(self) -> str:
        """One line."""
        if self.everywhere:
            return "PEFT's LoRA layers run fused where they are plain, in every model"
        kept = Counter(reason for reason in self.layers.values() if reason is not None)
        fused = len(self.layers) - kept.total()
        line = f"{fused} of {len(self.layers)} LoRA layers fused"
        if kept:
            why = ", ".join(f"{reason} ({n})" for reason, n in kept.most_common())
            line += f"; {kept.total()} keep PEFT's forward: {why}"
        if self.narrowed:
            line += (
                f"; {len(self.narrowed)} with float32 adapters on a half-precision base compute in"
                " that precision, as accurate as it is"
            )
        return line

    def __str__(self) -> str:
        lines = [f"  {name}: {reason or 'fused'}" for name, reason in self.layers.items()]
        return "\n".join([self.summary, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(reason or 'fused')}</td></tr>"
            for name, reason in self.layers.items()
        )
        return f"<p>{html.escape(self.summary)}</p><table>{rows}</table>"
