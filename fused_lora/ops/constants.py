"""Small constant tensors, created once and cached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .modes import is_traced, is_transformed

_MOST = 256  # limit; none is evicted, since a captured CUDA graph may read it
_made: dict[tuple, Tensor] = {}


def constant(make: Callable[..., Tensor], *args) -> Tensor:
    """``make(*args)``, cached unless a compiler, mode, transform or CUDA graph may own it."""
    if is_traced():
        return make(*args)
    key = make, args
    kept = _made.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = make(*args)
        # A tensor created during the capture of a CUDA graph has no value before a replay.
        captured = kept.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured and not is_transformed() and len(_made) < _MOST:
            _made[key] = kept
    return kept


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-d fp32 tensor, filled on the device: CUDA graphs cannot capture a copy from the host."""
    return torch.full((), value, dtype=torch.float32, device=device)
