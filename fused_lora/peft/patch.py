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
import sys
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..ops.functional import fused_lora_add, fused_lora_linear
from ..ops.validation import FLOATS
from .eligibility import Parts, input_reason, parts_of
from .report import PatchReport

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
    """The base layer's own forward, and the adapter added to what it gives."""
    y, shape = parts.base(x), (*x.shape[:-1], parts.lora_B.shape[0])
    plain = type(y) is Tensor and y.layout == torch.strided and y.dtype in FLOATS
    if plain and y.shape == shape and y.device == x.device:
        return _added(y, x, parts)
    # No output of a linear layer: what PEFT does with it.
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
