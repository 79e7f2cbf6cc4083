"""DoRA: the adapted weight's direction, with a magnitude of its own for every output.

    y = g·(x Wᵀ + s·x Aᵀ Bᵀ) + bias      g = m / ‖W + s·B A‖, a norm for each row, held constant

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5 and section 4.3. With
dropout, as in PEFT, ``D`` reaches what DoRA adds to the base output and nothing else:

    y = x Wᵀ + bias + (g - 1)·D(x) Wᵀ + g·s·D(x) Aᵀ Bᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.modes import without_autocast

_BLOCK = 1 << 22  # numbers: 16 MB in float32


def gain(
    magnitude: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
):
    """``g (out,)``, differentiable in ``magnitude (out,)`` alone."""
    with torch.no_grad():
        norm = row_norm(weight, lora_A, lora_B, scaling)
    return magnitude / norm.to(magnitude.dtype)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + s·B A‖ (out,)`` of ``weight (out, in)``, some rows at a time, at least in float32.

    Not by ``‖w‖² + 2 s·b·(A w) + s²·b (A Aᵀ) b``, which cancels where an adapter undoes a row.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    with without_autocast(weight):
        norms = [
            torch.linalg.vector_norm(torch.addmm(w.to(wide), scaling * b, A), dim=1)
            for w, b in zip(weight.split(rows), B.split(rows), strict=True)
        ]
    return torch.cat(norms).clamp_min_(torch.finfo(wide).tiny)
