"""Run PEFT's LoRA layers on this library's kernels with one line: ``patch_peft(model)``.

The patch replaces the forward of PEFT's linear LoRA classes. Every call inspects the layer's
current state and takes one of three paths:

* plain ``W x + b + s·B A D(x)``: base and adapter run fused;
* only the base is special (quantised, for example): the base runs its own forward, and the fused
  adapter is added to its output;
* anything else: PEFT's own forward runs.

The model's modules, parameters, files and life cycle do not change.

A fused layer differs from PEFT in two ways. Dropout draws its masks from another random stream.
With float32 adapters on a half-precision base, the adapter's products and gradients are computed in
the dtype of ``x`` and are as accurate as that. A CPU uses float32 instead for small products of few
rows, or for all if it has no instructions for the half-precision dtype.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..layers.base import LoRALayer as FusedLoRALayer
from ..models.arguments import check_model
from ..ops.functional import fused_lora_add, fused_lora_linear
from ..ops.validation import FLOATS
from .eligibility import Parts, input_reason, parts_of
from .report import PatchReport

# Patched PEFT classes, each with its original forward and the replacement.
_replaced: dict[type[nn.Module], tuple[Callable, Callable]] = {}
_everywhere = False
_patched: WeakSet[nn.Module] = WeakSet()  # layers of models patched individually
# The flag in a layer's __dict__ travels with copies and pickles, which `_patched` does not contain.
# It is valid only while it equals `_generation`, which changes when the classes are restored.
_FLAG = "_fused_lora_patch"
_generation = 0


def patch_peft(model: nn.Module | None = None) -> PatchReport:
    """Run PEFT's plain LoRA layers fused; all other layers keep PEFT's forward.

    Args:
        model: patch the LoRA layers that it now has. By default every PEFT layer is patched,
            including those of models created later.

    Returns:
        Which path each layer of ``model`` takes, and why.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no LoRA layers of PEFT.
    """
    global _everywhere
    if model is not None:
        check_model(model)
    from peft.tuners.lora import LoraLayer

    layers = {} if model is None else dict(_layers(model, LoraLayer))
    if model is not None and not layers:
        own = any(isinstance(module, FusedLoRALayer) for module in model.modules())
        raise ValueError(
            f"expected a model with PEFT's LoRA layers, got a {type(model).__name__} without"
            + (": its layers are fused_lora's own and need no patch" if own else "")
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
    # An instance-level forward may bypass the class's (X-LoRA's does): report it as unpatched.
    found = {
        name: "a forward replaced on the instance"
        if "forward" in vars(layer)
        else parts_of(layer, _replaced)
        for name, layer in layers.items()
    }
    parts = {name: plain for name, plain in found.items() if isinstance(plain, Parts)}
    return PatchReport(
        layers={name: None if name in parts else reason for name, reason in found.items()},
        beside={name: plain.beside for name, plain in parts.items() if plain.beside is not None},
        narrowed=[name for name, plain in parts.items() if plain.narrowed],
        everywhere=model is None,
    )


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Restore PEFT's forward, for one model or for all.

    Args:
        model: a model that was patched individually; by default everything is unpatched.

    Raises:
        RuntimeError: other code has replaced the forward since.
        TypeError: ``model`` is not a module.
        ValueError: a single ``model``, after ``patch_peft()`` has patched every layer.
    """
    global _everywhere, _generation
    if model is not None:
        check_model(model)
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
                f"expected patch_peft's forward on PEFT's {kind.__name__}, got another: undo first"
                " the change that replaced it"
            )
    for kind, (original, _) in _replaced.items():
        kind.forward = original
    _replaced.clear()
    _generation += 1


def _peft_classes() -> list[type[nn.Module]]:
    """PEFT's linear LoRA layers that add one product to their base layer's output."""
    from peft.tuners import lora

    classes = [lora.Linear]
    for name in ("Linear8bitLt", "Linear4bit"):  # these need bitsandbytes
        with contextlib.suppress(AttributeError, ImportError):
            classes.append(getattr(lora, name))
    return classes


def _forget_compiled() -> None:
    """Discard compiled code, which contains the previous forward."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _layers(model: nn.Module, kind: type):
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name, module


def _forward_instead_of(original: Callable) -> Callable:
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if (_everywhere or self.__dict__.get(_FLAG) == _generation) and not args and not kwargs:
            parts = parts_of(self, _replaced)
            if not isinstance(parts, str) and input_reason(self, x, parts) is None:
                return _beside(self, x, parts) if parts.beside else _fused(x, parts)
        return original(self, x, *args, **kwargs)

    return forward


def _fused(x: Tensor, parts: Parts) -> Tensor:
    return fused_lora_linear(
        x,
        parts.weight,
        parts.lora_A,
        parts.lora_B,
        parts.bias,
        scaling=parts.scaling,
        dropout_p=parts.dropout,
    )


def _beside(layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
    """The base layer's own forward plus the adapter."""
    y, shape = parts.base(x), (*x.shape[:-1], parts.lora_B.shape[0])
    plain = type(y) is Tensor and y.layout == torch.strided and y.dtype in FLOATS
    if plain and y.shape == shape and y.device == x.device:
        return _added(y, x, parts)
    # Not the output of a linear layer: compute as PEFT does.
    name, x = parts.name, layer._cast_input_dtype(x, parts.lora_A.dtype)
    low_rank = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x)))
    return (y + low_rank * parts.scaling).to(y.dtype)


def _added(y: Tensor, x: Tensor, parts: Parts) -> Tensor:
    return fused_lora_add(
        y,
        x,
        parts.lora_A,
        parts.lora_B,
        scaling=parts.scaling,
        dropout_p=parts.dropout,
    )
