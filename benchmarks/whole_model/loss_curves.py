"""Check that every provider learns the same: loss curves against PEFT's in a wider dtype.

The reference is the curve of PEFT with the same weights, adapters and batches in float32 (in
float64 for a float32 run). A curve's error is its largest distance to the reference over all steps.
It may be at most

    2 · error of PEFT's own curve + (u / √tokens + ε) · loss

PEFT's own error is what rounding in this dtype costs after it has propagated through training. The
second term covers a single forward: each token's loss has a relative error of about the dtype's
unit round-off u, and the loss is the mean over the tokens, whose errors are independent. Both
curves' losses are then rounded to float32, whose spacing is ε.

Only the first loss of ``peft-bf16`` is checked: its optimizer rounds every update to bfloat16,
which makes it a different training run, not a different way to compute the same one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from layer.problem import WrongResultError
from whole_model.trainers import Setting, Trainer

STEPS = 20
WIDER = {"bfloat16": "float32", "float32": "float64"}


@dataclass(frozen=True)
class Check:
    """Loss curves of one model without dropout, and their errors against the wider dtype's."""

    model: str
    dtype: str
    losses: dict[str, list[float]]
    wider: list[float]
    tolerance: float

    @property
    def errors(self) -> dict[str, float]:
        """Each provider's largest distance over the steps that are checked."""
        return {
            name: _distance(curve[: _compared(name)], self.wider)
            for name, curve in self.losses.items()
        }


def check(base: nn.Module, setting: Setting, names: Iterable[str]) -> Check:
    """Train 20 steps with each of ``names``, which must include "peft".

    Raises:
        WrongResultError: a curve's error exceeds what rounding explains.
    """
    setting = replace(setting, dropout=0.0)
    wide = copy.deepcopy(base).to(getattr(torch, WIDER[setting.dtype]))
    wider = _curve(wide, "peft", setting)
    del wide
    losses = {name: _curve(copy.deepcopy(base), name, setting) for name in names}
    roundoff = torch.finfo(getattr(torch, setting.dtype)).eps / 2
    spacing = torch.finfo(torch.float32).eps
    forward = (roundoff / math.sqrt(setting.tokens) + spacing) * max(wider)
    tolerance = 2 * _distance(losses["peft"], wider) + forward
    found = Check(setting.model, setting.dtype, losses, wider, tolerance)
    for name, error in found.errors.items():
        if not error <= tolerance:
            raise WrongResultError(
                f"{setting.model}, {setting.dtype}: expected {name}'s losses within"
                f" {tolerance:.1e} of PEFT's in {WIDER[setting.dtype]}, got {error:.1e}"
            )
    return found


def _curve(model: nn.Module, provider: str, setting: Setting) -> list[float]:
    trainer = Trainer(model, provider, setting)
    return [trainer.step().item() for _ in range(STEPS)]


def _compared(name: str) -> int:
    return 1 if name == "peft-bf16" else STEPS


def _distance(curve: list[float], wider: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(curve, wider, strict=False))
