"""Small models with this library's adapters on Parameters of no layer."""

from __future__ import annotations

import torch
from expert_nets import FP32, FP64, Holder, experts_of
from torch import nn

from fused_lora import apply_lora, lora_layers


def names_of(kind: str) -> list[str]:
    first = "up_proj" if kind == "NemotronH" else "gate_up_proj"
    return [f"experts.{first}", "experts.down_proj"]


def noisy(model: nn.Module, scale=0.3) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for p in layer.adapter_parameters().values():
                p.copy_(torch.randn(p.shape, dtype=FP32) * scale)
    return model


def own(kind="Qwen3Moe", implementation="eager", dtype=FP64, parameters=None, **options):
    model = Holder(experts_of(kind, implementation, dtype))
    options = {"rank": 3, "alpha": 6.0, "adapter_dtype": dtype} | options
    targets = names_of(kind) if parameters is None else parameters
    apply_lora(model, target_modules=[], target_parameters=targets, **options)
    return noisy(model)


class Table(nn.Module):
    """A module with a Parameter that several of its methods read."""

    def __init__(self, **extra):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("shift", torch.zeros(6))
        for name, value in extra.items():
            setattr(self, name, value)

    def forward(self, x):
        return x @ self.table.t() + self.shift

    def project(self, x):
        return self(x)


def on_table(model: nn.Module, **options) -> nn.Module:
    apply_lora(model, target_modules=[], target_parameters=["table"], **options)
    return noisy(model)
