"""Initial values of a new adapter. All but PiSSA give ``B A = 0`` and leave the base weight as is.

default     A Kaiming-uniform with a = √5, B = 0          (Hu et al., 2021; PEFT)
gaussian    A normal with σ = 1/rank, B = 0               (PEFT)
orthogonal  random rows of A and columns of B, mixed with two halves of one orthogonal matrix, so
            that B A = 0 though neither is zero; the rank must be even      (PEFT)
pissa       s·B A is the principal part of the weight, and the layer's new weight is the residual
            (Meng et al., "PiSSA", 2024). The new weight is not tied to others; a model's
            ``tie_weights()`` would overwrite it
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.modes import without_autocast

_ORTHOGONAL_SCALE = 0.1  # as in PEFT


def fill(init: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Initialise ``lora_A (rank, in, ...)`` and ``lora_B (out, rank, ...)``; any but "pissa"."""
    if init == "orthogonal":
        _orthogonal(lora_A, lora_B)
        return
    if init == "gaussian":
        nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


@torch.no_grad()
def _orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    rank, half = lora_A.shape[0], lora_A.shape[0] // 2
    like = {"device": lora_A.device, "dtype": torch.float32}
    mixer = torch.linalg.qr(torch.randn(rank, rank, **like)).Q
    ways_in = torch.randn(half, lora_A.shape[1], **like)
    ways_out = torch.randn(lora_B.shape[0], half, **like)
    # B A contains mixer[1::2] @ mixer[0::2].t(), which is zero: rows of an orthogonal matrix.
    lora_A.copy_(mixer[0::2].t() @ ways_in * _ORTHOGONAL_SCALE)
    lora_B.copy_(ways_out @ mixer[1::2] * _ORTHOGONAL_SCALE)


@torch.no_grad()
def principal(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Split ``weight (out, in)``: write the principal part to the adapter, return the residual.

    With ``U Σ Vᵀ`` the ``rank`` largest singular triples, ``B = U √(Σ/s)`` and ``A = √(Σ/s) Vᵀ``.
    Computed and returned in float32 (float64 for a float64 weight).
    """
    rank = lora_A.shape[0]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
    root = (sigma[:rank] / scaling).sqrt()
    B, A = U[:, :rank] * root, root.unsqueeze(1) * Vh[:rank]
    lora_A.copy_(A)
    lora_B.copy_(B)
    with without_autocast(weight):
        return wide - scaling * (B @ A)
