"""Fused LoRA layers: ``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ`` in Triton, with a pure-PyTorch path.

>>> import torch
>>> from fused_lora import FusedLoRALinear
>>> layer = FusedLoRALinear.from_linear(torch.nn.Linear(64, 32), rank=4)
>>> layer(torch.randn(8, 64)).shape
torch.Size([8, 32])
"""

from .dispatch import Decision, explain
from .functional import fused_lora_linear
from .linear import FusedLoRALinear

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "FusedLoRALinear",
    "explain",
    "fused_lora_linear",
]
