"""Models whose layers are computed together, the same layers alone, and comparisons."""

from __future__ import annotations

import copy
from functools import partial

import torch
from models import llama, tokens, train_like
from torch import nn

from fused_lora import apply_lora, fuse_projections, patch_peft, unfuse_projections
from fused_lora.layers.base import LoRALayer
from support import relative_rms

rand = partial(torch.randn, dtype=torch.float64)
BATCH = (2, 20)  # 40 rows: enough to be grouped


def assert_same(got: dict, expected: dict, bound=1e-11) -> None:
    """Only rounding differs: products are added up in another order."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert relative_rms(value, expected[name]) <= bound, name


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def adapted(make=llama, kind="ours", dtype=torch.float64, **options) -> nn.Module:
    """A model in training mode with trained adapters, its layers alone.

    In float64, where the order of sums hardly shows.
    """
    torch.manual_seed(0)
    model = make().to(dtype)
    if kind == "ours":
        options = {"rank": 4, "dropout": 0.0} | options
        apply_lora(model, fuse_projections=False, fuse_mlp=False, **options)
    else:
        import peft

        config = peft.LoraConfig(
            r=4, target_modules="all-linear", lora_dropout=options.get("dropout", 0.0)
        )
        model = peft.get_peft_model(model, config)
        patch_peft(model, projections=False, mlp=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def fused(model: nn.Module, **options) -> nn.Module:
    """A copy that computes layers together."""
    model = copy.deepcopy(model)
    if any(isinstance(m, LoRALayer) for m in model.modules()):
        fuse_projections(model, **options)
    else:
        patch_peft(model, **options)
    return model


def step(model, seed=7, ids=None, **inputs) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step, by name."""
    torch.manual_seed(3)
    ids = tokens(*BATCH) if ids is None else ids
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | named


class Net(nn.Module):
    """Projections that are called as the arguments say."""

    def __init__(self, *calls):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))
        self.calls = calls or ("q_proj", "k_proj", "v_proj")

    def forward(self, x, other=None):
        y = 0
        for name in self.calls:
            given = x if other is None or name == "q_proj" else other
            y = y + getattr(self, name)(given)
        return y


class Top(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args):
        return self.net(*args)


GROUP = [("q_proj", "k_proj", "v_proj")]


def small(net=None, **options) -> Top:
    model = Top(Net() if net is None else net)
    apply_lora(model, rank=4, fuse_projections=False, **options)
    train_like(model.train().double())
    fuse_projections(model, GROUP)
    return model


class MLP(nn.Module):
    """A gated MLP; subclasses have other forwards."""

    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.act = nn.SiLU() if act is None else act
        self.limit = 7.0

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def in_block(module=None, **options) -> nn.Sequential:
    model = nn.Sequential(MLP() if module is None else module)
    apply_lora(model, rank=4, **options)
    return train_like(model.train().double())


def alone(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    unfuse_projections(model)
    return model


def gradients(model, *inputs) -> dict:
    model.zero_grad()
    torch.manual_seed(2)
    y = model(*inputs)
    y.square().sum().backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | named


def is_linear(module) -> bool:
    return isinstance(module, nn.Linear)
