"""Small constant tensors, made once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .modes import is_traced, is_transformed

_MOST = 256  # never more, and none is let go: captured CUDA graphs may read it
_made: dict[tuple, Tensor] = {}


def constant(make: Callable[..., Tensor], *args) -> Tensor:
    """``make(*args)``, kept unless a compiler, a mode, a transform or a CUDA graph owns it."""
    if is_traced():
        return make(*args)
    key = make, args
    kept = _made.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = make(*args)
        # What is made while a CUDA graph is captured has no value before the replay.
        captured = kept.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured and not is_transformed() and len(_made) < _MOST:
            _made[key] = kept
    return kept


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-d fp32 tensor; filled on the device, which a CUDA graph may capture."""
    return torch.full((), value, dtype=torch.float32, device=device)
