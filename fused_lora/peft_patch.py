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
from .targets import is_conv1d
from .validation import FLOATS

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
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
    reasons = {name: _reason(layer) for name, layer in layers.items()}
    narrowed = [name for name, why in reasons.items() if why is None and _narrows(layers[name])]
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
    flagged = _everywhere or getattr(self, _FLAG, None) == _generation
    plain = flagged and not args and not kwargs and _reason(self) is None
    if plain and _input_reason(self, x) is None:
        return _fused(self, x)
    return _original(self, x, *args, **kwargs)


def _active(layer: nn.Module) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _fused(layer: nn.Module, x: Tensor) -> Tensor:
    (name,) = _active(layer)
    base, drop = layer.base_layer, layer.lora_dropout[name]
    return fused_lora_linear(
        x,
        base.weight.t() if is_conv1d(base) else base.weight,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        base.bias,
        scaling=layer.scaling[name],
        dropout_p=getattr(drop, "p", 0.0),
        training=drop.training,
    )


def _narrows(layer: nn.Module) -> bool:
    """Whether float32 adapters are computed in the half precision of their base."""
    (name,) = _active(layer)
    return layer.base_layer.weight.dtype != layer.lora_A[name].weight.dtype


def _reason(layer: nn.Module) -> str | None:
    """Why this layer, as it now is, runs PEFT's own forward; None if it runs fused."""
    if type(layer) is not _linear:
        return f"a lora.{type(layer).__name__} layer"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    names = _active(layer)
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else "no active adapter"
    (name,) = names
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        return f"the variant {variant.removesuffix('LinearVariant') or variant}"
    base = layer.base_layer
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"a base layer of class {type(base).__name__}"
    drop = layer.lora_dropout[name]
    if type(drop) not in (nn.Dropout, nn.Identity):
        return f"a dropout of class {type(drop).__name__}"
    thin = {"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]}
    for role, module in thin.items():
        if type(module) is not nn.Linear:
            return f"a {role} of class {type(module).__name__}"
        if module.bias is not None:
            return f"a bias in {role}"
    for role, module in {"base_layer": base, "lora_dropout": drop, **thin}.items():
        if "forward" in module.__dict__:
            return f"a {role} whose forward was replaced, as accelerate does"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"a hook on {role}"
        for kind, parameter in module._parameters.items():
            if parameter is not None and type(parameter) is not nn.Parameter:
                return f"a {kind} of class {type(parameter).__name__} in {role}"
            if hasattr(parameter, "ds_id"):
                return "a parameter that DeepSpeed's ZeRO-3 partitions"
        if not isinstance(module, nn.Dropout | nn.Identity) and "weight" not in module._parameters:
            return f"a computed weight in {role}"
    if base.weight.requires_grad:
        return "a base weight that trains"
    return _dtype_reason(base.weight, *(module.weight for module in thin.values()))


def _dtype_reason(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    if weight.dtype not in FLOATS:
        return f"a base weight in {weight.dtype}"
    adapter = lora_A.dtype
    if lora_B.dtype != adapter:
        return "adapters of two dtypes"
    wider = weight.dtype in _HALVES and adapter == torch.float32
    if adapter != weight.dtype and not wider:
        return f"adapters in {adapter} on a base in {weight.dtype}"
    return None


def _input_reason(layer: nn.Module, x: Tensor) -> str | None:
    """Why this call runs PEFT's own forward; None if it runs fused."""
    (name,) = _active(layer)
    base, drop, scaling = layer.base_layer, layer.lora_dropout[name], layer.scaling[name]
    lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
    device = base.weight.device
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.layout != torch.strided:
        return "an input that is no plain tensor"
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(
        x.device.type
    )
    if x.dtype != base.weight.dtype and not (autocast and x.dtype in FLOATS):
        return "an input of another dtype"
    if autocast and torch.float64 in (x.dtype, base.weight.dtype):
        return "float64 under autocast"
    if not getattr(layer, "cast_input_dtype_enabled", True) and x.dtype != lora_A.dtype:
        return "an input that is not to be cast"
    matrix = base.weight.shape[::-1] if is_conv1d(base) else base.weight.shape
    fits = x.dim() > 0 and x.shape[-1] == matrix[1] == lora_A.shape[1]
    if not fits or lora_B.shape != (matrix[0], lora_A.shape[0]) or not len(lora_A):
        return "shapes that do not fit"
    if any(tensor.device != device for tensor in (x, lora_A, lora_B)):
        return "tensors on several devices"
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.requires_grad or scaling.device != device:
            return "a scale that is no constant on the device"
    elif not isinstance(scaling, Real) or not math.isfinite(scaling):
        return "a scale that is no finite number"
    if drop.training and getattr(drop, "p", 0.0) >= 1:
        return "a dropout of everything"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if any(getattr(global_hooks, f"_global{hooks}", None) for hooks in _HOOKS):
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
