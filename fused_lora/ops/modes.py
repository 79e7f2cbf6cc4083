"""Whether a call is exported, compiled, intercepted by a dispatch mode, or transformed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor, compiler, jit
from torch._C import (
    _are_functorch_transforms_active,
    _get_dispatch_mode,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)

_RECORDING = (
    _TorchDispatchModeKey.FAKE,
    _TorchDispatchModeKey.PROXY,
    _TorchDispatchModeKey.FUNCTIONAL,
)


def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is recording.

    ``torch.compiler.is_exporting()`` always returned True under Dynamo in PyTorch 2.9; this reads
    the flag instead.
    """
    return compiler._is_exporting_flag or jit.is_tracing()


def outside_graphs(function: Callable) -> Callable:
    """Run a function eagerly within compiled code, which breaks its graph there.

    ``torch.compiler.disable`` does so too, but imports Dynamo and Triton at once.
    """
    disabled = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args, **kwargs):
        return (disabled if is_dynamo_compiling() else function)(*args, **kwargs)

    return call


def is_traced() -> bool:
    """Whether a compiler or a dispatch mode intercepts operators and may keep their results.

    Selective checkpointing keeps them. A FLOP counter does not, and is ignored here: it counts only
    PyTorch's own operators, which eager mode runs.
    """
    if is_compiling():
        return True
    if _get_current_dispatch_mode() is None:
        return False
    kinds = (type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
    return any(kind != "_FlopCounterMode" for kind in kinds)


def is_recorded() -> bool:
    """Whether a graph is recorded, by a compiler or by a dispatch mode of one.

    Other dispatch modes see operators run: they count them or keep their results.
    """
    return is_compiling() or any(_get_dispatch_mode(key) is not None for key in _RECORDING)


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is active.

    The layer then runs as plain operators: its autograd Function has no rules for transforms.
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a derivative with respect to ``tensor`` may be computed.

    A transform hides ``requires_grad`` of an outer level: within one the result is True.
    """
    return (tensor.requires_grad and torch.is_grad_enabled()) or is_transformed()


def is_observed() -> bool:
    """Whether any of the above may hold, or autocast is on. False: eager mode on a CPU or GPU.

    One combined check: with cold caches, each name lookup costs host time.
    """
    return (
        is_dynamo_compiling()  # first: Dynamo evaluates it to True and skips the rest
        or compiler._is_compiling_flag
        or _is_any_autocast_enabled()
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_eager() -> bool:
    """Whether operators run at once and unobserved; unlike :func:`is_observed`, also in autocast.

    Saved tensors and in-place changes are then this package's own business.
    """
    return not (
        is_dynamo_compiling()
        or compiler._is_compiling_flag
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


# Device types without autocast. Computed at import, since Dynamo cannot trace
# ``is_autocast_available`` in PyTorch 2.11; a tuple is a constant to it.
_WITHOUT_AUTOCAST = tuple(
    kind for kind in ("meta", "lazy", "vulkan") if not torch.amp.is_autocast_available(kind)
)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for operators on ``tensor``."""
    # One flag covers all devices but a few, such as MPS; a check per device costs six times more.
    if (tensor.is_cpu or tensor.is_cuda) and not _is_any_autocast_enabled():
        return False
    device = tensor.device.type
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off for operators on ``tensor``."""
    if not autocasts(tensor):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
