"""DoRA: the adapted weight's direction, with a magnitude of its own for every output.

    y = g·(x Wᵀ + s·x Aᵀ Bᵀ) + bias      g = m / ‖W + s·B A‖, a norm for each row, held constant

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5 and section 4.3. With
dropout, as in PEFT, ``D`` reaches what DoRA adds to the base output and nothing else:

    y = x Wᵀ + bias + (g - 1)·D(x) Wᵀ + g·s·D(x) Aᵀ Bᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import without_autocast


def gain(magnitude: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float):
    """``g (out,)``, differentiable in ``magnitude (out,)`` alone."""
    with torch.no_grad():
        norm = row_norm(weight, lora_A, lora_B, scaling)
    return magnitude / norm.to(magnitude.dtype)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``‖W + s·B A‖ (out,)`` of ``weight (out, in)``, without a matrix of the weight's size.

    ``‖w + s·b A‖² = ‖w‖² + 2 s·b·(A w) + s²·b (A Aᵀ) b`` for each row ``w`` of W and ``b`` of B.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    squared = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    with without_autocast(weight.device.type):
        crossed = torch.mm(weight, lora_A.to(weight.dtype).t()).to(wide)
        squared += ((2 * scaling * crossed + scaling**2 * (B @ (A @ A.t()))) * B).sum(1)
    return squared.clamp_min_(torch.finfo(wide).tiny).sqrt_()
