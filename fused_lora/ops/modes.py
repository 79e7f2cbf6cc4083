"""Who looks at a call: exporters, compilers and dispatch modes, or transforms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, compiler, jit
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)


def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records.

    Of the first, PyTorch's own answer was always yes under Dynamo in 2.9.
    """
    return compiler._is_exporting_flag or jit.is_tracing()


def is_traced() -> bool:
    """Whether a compiler or a dispatch mode is given each operator, and may keep what it returns.

    Selective checkpointing does; a FLOP counter does not, and knows PyTorch's operators only.
    """
    if is_compiling():
        return True
    if _get_current_dispatch_mode() is None:
        return False
    kinds = (type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
    return any(kind != "_FlopCounterMode" for kind in kinds)


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation needs every operator's own rule."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_observed() -> bool:
    """Whether any of the above may be so, or autocast is on: False is eager mode on a CPU or GPU.

    One question, since every name that is looked up costs host time where the products before have
    emptied the caches.
    """
    return (
        is_dynamo_compiling()  # first: a compiler takes it for True and does not look further
        or compiler._is_compiling_flag
        or _is_any_autocast_enabled()
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


# Kinds of device without autocast. The tuple is a constant for compilers: Dynamo cannot trace
# ``is_autocast_available`` in PyTorch 2.11.
_WITHOUT_AUTOCAST = tuple(
    kind for kind in ("meta", "lazy", "vulkan") if not torch.amp.is_autocast_available(kind)
)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for operators on ``tensor``."""
    # One question for all devices but some, MPS among them; to ask for one costs six times more.
    if (tensor.is_cpu or tensor.is_cuda) and not _is_any_autocast_enabled():
        return False
    device = tensor.device.type
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off for operators on ``tensor``."""
    if not autocasts(tensor):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
