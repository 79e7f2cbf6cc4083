"""Run PEFT's LoRA layers on this library's kernels with one line: ``patch_peft(model)``.

The patch replaces the forward of PEFT's linear LoRA classes, and of its adapters on Parameters.
Every call inspects the layer's current state and takes one of four paths:

* plain ``W x + b + s·B A D(x)``: base and adapter run fused;
* only the base is special (quantised, for example): the base runs its own forward, and the fused
  adapter is added to its output;
* adapters on a mixture's experts: each expert's base and adapter run fused on its own tokens;
* anything else: PEFT's own forward runs.

The model's modules, parameters, files and life cycle do not change.

A fused layer differs from PEFT in two ways. Dropout draws its masks from another random stream.
With float32 adapters on a half-precision base, the adapter's products and gradients are computed in
the dtype of ``x`` and are as accurate as that. A CPU uses float32 instead for small products of few
rows, or for all if it has no instructions for the half-precision dtype.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from functools import wraps
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..layers.base import LoRALayer as FusedLoRALayer
from ..layers.config import check_flag
from ..layers.gated_block import GatedBlock, attached, detach
from ..layers.reading import LayerReader
from ..layers.segment_route import check_closed
from ..layers.shared_input import SharedInput
from ..models.arguments import check_model
from ..models.fusion import Kind, fuse, unfuse
from ..models.untrained import expert_notes
from ..ops.functional import fused_lora_add, fused_lora_linear
from ..ops.modes import outside_graphs
from ..ops.operands import Projection
from ..ops.validation import FLOATS
from . import experts
from .eligibility import Parts, input_reason, parts_of
from .report import PatchReport

# Patched PEFT classes, each with its original forward and the replacement.
_replaced: dict[type[nn.Module], tuple[Callable, Callable]] = {}
_replaced_wrapper: dict[type[nn.Module], tuple[Callable, Callable]] = {}  # of a Parameter's adapter
_everywhere = False
# PEFT's method that puts layers into a model, and the replacement, while every layer is patched.
_inject: tuple[Callable, Callable] | None = None
_patched: WeakSet[nn.Module] = WeakSet()  # layers of models patched individually
# The flag in a layer's __dict__ travels with copies and pickles, which `_patched` does not contain.
# It is valid only while it equals `_generation`, which changes when the classes are restored.
_FLAG = "_fused_lora_patch"
_generation = 0
_SHARED_INPUT = "_fused_lora_shared_input"
SEGMENTS = "_fused_lora_segments"  # a layer's way through open blocks of ``adapter_segments``


def patch_peft(
    model: nn.Module | None = None, *, projections: bool = True, mlp: bool = True
) -> PatchReport:
    """Run PEFT's plain LoRA layers fused; all other layers keep PEFT's forward.

    Args:
        model: patch the LoRA layers that it now has. By default every PEFT layer is patched,
            including those of models created later.
        projections, mlp: whether layers of ``model`` that share an input, such as q, k and v, and
            gated MLPs are computed together; see :func:`fused_lora.fuse_projections`. Without a
            model, those of models that PEFT adapts later.

    Returns:
        Which path each layer of ``model`` takes, and why.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        TypeError: ``model`` is not a module, or a flag is no bool.
        ValueError: ``model`` has no LoRA layers of PEFT.
    """
    global _everywhere
    check_flag("projections", projections)
    check_flag("mlp", mlp)
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
    wrapper = experts.wrapper_class()
    for kind in peft_classes():
        _replace(kind, _forward_instead_of, _replaced)
    if wrapper is not None:
        _replace(wrapper, _wrapper_forward_instead_of, _replaced_wrapper)
    if model is None:
        _everywhere = True
        _fuse_later_models(projections, mlp)
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
        if type(layer) is not wrapper
    }
    parts = {name: plain for name, plain in found.items() if isinstance(plain, Parts)}
    reasons = {name: None if name in parts else reason for name, reason in found.items()}
    narrowed = [name for name, plain in parts.items() if plain.narrowed]
    for name, parameter, plain in experts.parameters_of(layers, wrapper):
        name = f"{name}.{parameter}" if name else parameter
        reasons[name] = plain if isinstance(plain, str) else None
        if not isinstance(plain, str) and plain.narrowed(parameter):
            narrowed.append(name)
    fusion = None if model is None else fuse(model, _KIND, projections=projections, mlp=mlp)
    if model is not None:
        experts.attach(model)
    return PatchReport(
        layers=reasons,
        beside={name: plain.beside for name, plain in parts.items() if plain.beside is not None},
        narrowed=narrowed,
        everywhere=model is None,
        fusion=fusion,
        experts={} if model is None else expert_notes(model),
    )


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Restore PEFT's forward, for one model or for all.

    Args:
        model: a model that was patched individually; by default everything is unpatched.

    Raises:
        RuntimeError: other code has replaced the forward since, or a block of
            :func:`fused_lora.adapter_segments` is open.
        TypeError: ``model`` is not a module.
        ValueError: a single ``model``, after ``patch_peft()`` has patched every layer.
    """
    global _everywhere, _generation
    if model is not None:
        check_model(model)
    if model is not None and _everywhere:
        raise ValueError("expected unpatch_peft() after patch_peft(), got a single model")
    check_closed(SEGMENTS, None if model is None else set(model.modules()), "unpatch_peft")
    for module in list(_patched) if model is None else model.modules():
        vars(module).pop(_FLAG, None)
        vars(module).pop(_SHARED_INPUT, None)
        vars(module).pop(SEGMENTS, None)
        _patched.discard(module)
    if model is not None:
        unfuse(model, _KIND)
    else:
        for module in attached(_Block):
            detach(module)
    if model is None:
        _everywhere = False
    _forget_compiled()
    if model is None:
        _fuse_no_later_models()
    if not _replaced or len(_patched):
        return
    both = _replaced | _replaced_wrapper
    for kind, (_, given) in both.items():
        if kind.forward is not given:
            raise RuntimeError(
                f"expected patch_peft's forward on PEFT's {kind.__name__}, got another: undo first"
                " the change that replaced it"
            )
    for kind, (original, _) in both.items():
        kind.forward = original
    _replaced.clear()
    _replaced_wrapper.clear()
    _generation += 1


def _fuse_later_models(projections: bool, mlp: bool) -> None:
    """Fuse and watch every model that PEFT gives LoRA layers from now on."""
    global _inject
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    _fuse_no_later_models()
    original = BaseTuner.inject_adapter

    @wraps(original)
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs):
        config = self.peft_config[adapter_name]
        targets = getattr(config, "target_modules", None)  # PEFT replaces "all-linear" by names
        result = original(self, model, adapter_name, *args, **kwargs)
        if isinstance(self, LoraModel):
            fuse(model, _KIND, projections=projections, mlp=mlp)
            experts.attach(model, config, targets)
        return result

    _inject = original, inject_adapter
    BaseTuner.inject_adapter = inject_adapter


def _fuse_no_later_models() -> None:
    """Undo :func:`_fuse_later_models`, unless other code has replaced the method since."""
    global _inject
    if _inject is None:
        return
    from peft.tuners.tuners_utils import BaseTuner

    original, given = _inject
    if BaseTuner.inject_adapter is given:
        BaseTuner.inject_adapter = original
    _inject = None


def peft_classes() -> list[type[nn.Module]]:
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
        segments = self.__dict__.get(SEGMENTS)
        if segments is not None:
            y = segments.output(self, x, bool(args or kwargs))
            if y is not None:
                return y
        if _is_patched(self) and not args and not kwargs:
            shared = self.__dict__.get(_SHARED_INPUT)
            if shared is not None:
                y = shared.output(self, x)
                if y is not None:
                    return y
            parts = parts_of(self, _replaced)
            if not isinstance(parts, str) and input_reason(self, x, parts) is None:
                return _beside(self, x, parts) if parts.beside else _fused(x, parts)
        return original(self, x, *args, **kwargs)

    return forward


def is_patched(layer: nn.Module) -> bool:
    """Whether the layer runs the patch's forward."""
    forward = type(layer).forward
    return any(forward is given for _, given in _replaced.values()) and _is_patched(layer)


def named_parts(layer: nn.Module, name: str) -> Parts | str:
    """As :func:`.eligibility.parts_of`, of one of the layer's adapters."""
    return parts_of(layer, _replaced, name)


def _wrapper_forward_instead_of(original: Callable) -> Callable:
    """The forward of PEFT's adapters on Parameters."""

    @outside_graphs  # the number of an expert's tokens is data
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if _is_patched(self) and len(args) == 2 and not kwargs:
            parts = experts.parts_of(self)
            if not isinstance(parts, str) and experts.call_reason(parts, x, *args) is None:
                return experts.fused(parts, x, *args)
        return original(self, x, *args, **kwargs)

    return forward


def _replace(kind: type[nn.Module], make: Callable, replaced: dict) -> None:
    if kind not in replaced:
        replaced[kind] = kind.forward, make(kind.forward)
        kind.forward = replaced[kind][1]


def _is_patched(layer: nn.Module) -> bool:
    return _everywhere or layer.__dict__.get(_FLAG) == _generation


def _read(layer: nn.Module, x: Tensor | None) -> Projection | str:
    """The operands of one of PEFT's layers, or why PEFT's forward or the base's own runs."""
    cls = type(layer)
    if cls not in _replaced or cls.forward is not _replaced[cls][1]:
        return f"a {cls.__name__} with a forward of its own"
    if not _is_patched(layer):
        return "not patched"
    segments = layer.__dict__.get(SEGMENTS)
    if segments is not None and segments.is_open(layer):
        return "adapter_segments"
    parts = parts_of(layer, _replaced)
    if isinstance(parts, str):
        return parts
    if parts.beside is not None:
        return parts.beside
    if x is not None and (reason := input_reason(layer, x, parts)):
        return reason
    return Projection(
        parts.weight, parts.lora_A, parts.lora_B, parts.bias, parts.scaling, parts.dropout
    )


class _PeftReader(LayerReader):
    """Reads PEFT's layers; not in pickles, which must not need this library."""

    def read(self, layer: nn.Module, x: Tensor | None) -> Projection | str:
        return _read(layer, x)

    def impl(self, layer: nn.Module) -> str:
        return "auto"

    def note_call(self, layer: nn.Module) -> None:
        pass

    def __reduce__(self):
        return type(None), ()


class _SharedInput(_PeftReader, SharedInput):
    """The place of one of PEFT's layers."""


class _Block(_PeftReader, GatedBlock):
    """A gated MLP of PEFT's layers; in copies, unlike in pickles."""

    def __deepcopy__(self, memo):
        new = object.__new__(type(self))
        memo[id(self)] = new
        vars(new).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return new


_KIND = Kind(lambda module: type(module) in _replaced, _SHARED_INPUT, _SharedInput, _Block)


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
