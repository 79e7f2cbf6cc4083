"""The activations of a gated MLP, ``h = act(gate) · up``, and their derivatives."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

FORWARD = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_BACKWARD = {
    "silu": _aten.silu_backward.grad_input,
    "gelu": _aten.gelu_backward.grad_input,
    "gelu_tanh": partial(_aten.gelu_backward.grad_input, approximate="tanh"),
    "relu": partial(_aten.threshold_backward.grad_input, threshold=0),
}


def derivative(factor: Tensor, x: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """``factor · act'(x)``; ``out`` may be either of them."""
    out = torch.empty_like(x) if out is None else out
    return _BACKWARD[activation](factor, x, grad_input=out)
