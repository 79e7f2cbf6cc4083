"""Small constant tensors, made once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_made: dict[tuple, Tensor] = {}


def constant(
    make: Callable[[torch.dtype, torch.device], Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``make(dtype, device)``, kept unless a compiler, a mode or a transform owns what it makes."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return make(dtype, device)
    key = make, dtype, device
    kept = _made.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = make(dtype, device)
        if torch._C._functorch.peek_interpreter_stack() is None:
            _made[key] = kept
    return kept
