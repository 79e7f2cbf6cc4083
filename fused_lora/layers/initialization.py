"""How a new adapter starts. All but PiSSA leave ``B A = 0`` and the base weight alone.

default     A Kaiming-uniform with a = √5, B = 0          (Hu et al., 2021; PEFT)
gaussian    A normal with σ = 1/rank, B = 0               (PEFT)
orthogonal  rows of A and columns of B mixed by two halves of one orthogonal matrix: B A = 0 with
            neither zero; an even rank                     (PEFT)
pissa       s·B A is the principal part of the weight, which keeps the rest
            (Meng et al., "PiSSA", 2024). The layer gets a weight of its own: a model's
            ``tie_weights()`` would replace it
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.modes import without_autocast

_ORTHOGONAL_SCALE = 0.1  # PEFT's


def fill(init: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Fill ``lora_A (rank, in, ...)`` and ``lora_B (out, rank, ...)``, any way but PiSSA's."""
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
    lora_A.copy_(mixer[0::2].t() @ ways_in * _ORTHOGONAL_SCALE)
    lora_B.copy_(ways_out @ mixer[1::2] * _ORTHOGONAL_SCALE)


@torch.no_grad()
def principal(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Split ``weight (out, in)``: its principal part into the adapter, the rest is returned.

    With ``U Σ Vᵀ`` the ``rank`` largest singular triples, ``B = U √(Σ/s)`` and ``A = √(Σ/s) Vᵀ``.
    Computed in float32 (float64 for float64), as the returned residual is.
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
