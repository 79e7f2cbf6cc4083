"""Models with many adapters, one batch that mixes them, and a run of each adapter alone."""

from functools import partial

import peft
import torch
from torch import nn

from fused_lora import (
    adapter_losses,
    adapter_parameters,
    adapter_segments,
    add_adapter,
    apply_lora,
    disable_lora,
    patch_peft,
    set_adapter,
)
from support import relative_rms

K, N = 24, 16
NAMES = ["default", "c", "c", None, "b", "default"]  # "d" is absent


def net(dropout=0.0, dtype=torch.float64, **options) -> nn.Module:
    """Two linears with four adapters, of other ranks, scales and dropouts, as after training."""
    model = nn.Sequential(nn.Linear(K, 20), nn.Tanh(), nn.Linear(20, N)).to(dtype)
    apply_lora(model, target_modules=["0", "2"], rank=4, dropout=dropout, **options)
    add_adapter(model, "b", rank=2, alpha=5)
    add_adapter(model, "c", rank=6, alpha=3, dropout=2 * dropout)
    add_adapter(model, "d", rank=1)
    return noisy(model)


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameters in adapter_parameters(model).values():
            for p in parameters:
                p.copy_(torch.randn(p.shape) * 0.3)
    return model


def peft_net(make=None, targets=("0", "2"), dropout=0.0, dtype=torch.float64) -> nn.Module:
    """As :func:`net`, of PEFT."""
    base = make() if make else nn.Sequential(nn.Linear(K, 20), nn.Tanh(), nn.Linear(20, N))
    config = partial(peft.LoraConfig, target_modules=list(targets), lora_dropout=dropout)
    model = peft.get_peft_model(base.to(dtype), config(r=4, lora_alpha=8))
    for name, rank, alpha in (("b", 2, 5), ("c", 6, 3), ("d", 1, 8)):
        model.add_adapter(name, config(r=rank, lora_alpha=alpha))
    patch_peft(model)
    return noisy(model)


def samples(names=NAMES, rows=5, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(len(names), rows, K, dtype=dtype)


def clear(model: nn.Module) -> None:
    for parameters in adapter_parameters(model).values():
        for p in parameters:
            p.grad = None


def gradients(model: nn.Module) -> dict:
    return {
        f"{name} {i}": None if p.grad is None else p.grad.clone()
        for name, parameters in adapter_parameters(model).items()
        for i, p in enumerate(parameters)
    }


def together(model, x, names, call=lambda model, x: model(x), **options) -> dict:
    """Outputs, losses and gradients of one batch."""
    clear(model)
    x = x.clone().requires_grad_(x.is_floating_point())
    with adapter_segments(model, names, **options):
        y = call(model, x)
        losses = adapter_losses(y.square().mean(-1), names)
        sum(losses.values()).backward()
    return {"y": y.detach(), "dx": x.grad, **losses, **gradients(model)}


def apart(model, x, names, call=lambda model, x: model(x)) -> dict:
    """The same of one run for each adapter."""
    clear(model)
    x = x.clone().requires_grad_(x.is_floating_point())
    parts, losses, where = [], {}, []
    for name in dict.fromkeys(names):
        own = [i for i, n in enumerate(names) if n == name]
        where += own
        if name is None:
            parts.append(without_adapters(model, call, x[own]).detach())
            continue
        model.set_adapter(name) if of_peft(model) else set_adapter(model, name)
        y = call(model, x[own])
        losses[name] = y.square().mean(-1).mean()
        losses[name].backward()
        parts.append(y.detach())
    order = torch.tensor(where).argsort()
    return {"y": torch.cat(parts)[order], "dx": x.grad, **losses, **gradients(model)}


def without_adapters(model, call, x):
    with without(model):
        return call(model, x)


def without(model):
    return model.disable_adapter() if of_peft(model) else disable_lora(model)


def of_peft(model) -> bool:
    return isinstance(model, peft.PeftModel)


def assert_equal(got: dict, expected: dict, bound=1e-13) -> None:
    assert set(got) >= set(expected)
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert got[name].shape == value.shape, name
            error = relative_rms(got[name].detach(), value.detach())
            assert error <= bound, (name, error)
