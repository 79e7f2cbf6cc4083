"""Who looks at a call: exporters, compilers and dispatch modes, or transforms."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces. Under Dynamo, PyTorch's own answer was always yes in 2.9."""
    return torch.compiler._is_exporting_flag


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
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
