"""DoRA: each row of the adapted weight keeps its direction; its norm becomes a trained magnitude.

    y = g·(x Wᵀ + s·x Aᵀ Bᵀ) + bias      g = m / ‖W + s·B A‖, one norm per row, constant in backward

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5 and section 4.3. With
dropout, as in PEFT, ``D`` applies only to what DoRA adds to the base output:

    y = x Wᵀ + bias + (g - 1)·D(x) Wᵀ + g·s·D(x) Aᵀ Bᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.modes import without_autocast

_BLOCK = 1 << 22  # elements of W + s·B A held at once: 16 MB in float32


def gain(
    magnitude: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
):
    """``g (out,)``, differentiable in ``magnitude (out,)`` only."""
    with torch.no_grad():
        norm = row_norm(weight, lora_A, lora_B, scaling)
    return magnitude / norm.to(magnitude.dtype)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``‖W + s·B A‖ (out,)`` for ``weight (out, in)``, computed in float32 or float64.

    Computing blocks of rows bounds the memory. ``‖w‖² + 2 s·b·(A w) + s²·b (A Aᵀ) b`` would need no
    ``W + s·B A`` at all, but cancels where the adapter nearly undoes a row ``w``.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    with without_autocast(weight):
        norms = [
            torch.linalg.vector_norm(torch.addmm(w.to(wide), scaling * b, A), dim=1)
            for w, b in zip(weight.split(rows), B.split(rows), strict=True)
        ]
    # A zero row must not divide by zero.
    return torch.cat(norms).clamp_min_(torch.finfo(wide).tiny)
