"""Who looks at a call: exporters, compilers and dispatch modes, or transforms."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_exporting() -> bool:
    """Whether ``torch.export`` traces. Under Dynamo, PyTorch's own answer was always yes in 2.9."""
    return torch.compiler._is_exporting_flag


def is_traced() -> bool:
    """Whether a compiler or a dispatch mode is given each operator.

    Such modes may keep what an operator returns, as selective checkpointing does, or count it.
    """
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation needs every operator's own rule."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
