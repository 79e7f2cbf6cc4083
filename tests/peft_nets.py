"""Small models with PEFT's adapters, and their results, for the tests of the patch."""

from __future__ import annotations

import peft
import torch
from torch import nn

from support import relative_rms


def net(dtype=torch.float32, **config) -> nn.Module:
    """Two adapted linears with random adapters, as after training."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(24, 16), "act": nn.Tanh(), "second": nn.Linear(16, 8)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | config
    cast = options.pop("autocast_adapter_dtype", True)
    model = peft.get_peft_model(
        model.to(dtype), peft.LoraConfig(**options), autocast_adapter_dtype=cast
    )
    return noisy(model)


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
    return model


def first(model: nn.Module) -> nn.Module:
    return model.base_model.model.first


def second_adapter(model: nn.Module) -> nn.Module:
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["first", "second"]))
    noisy(model)
    model.base_model.set_adapter(["default", "other"])
    return model


def plain_call(module, x):
    return module(x)


def results(model: nn.Module, call, x: torch.Tensor, hooks: bool = True) -> dict:
    """Output, every gradient and the hooks that fired, or the error of one call."""
    fired, handles = [], []
    layer = first(model)
    if hooks:
        handles.append(layer.register_forward_hook(lambda *_: fired.append("forward")))
        handles.append(layer.register_full_backward_hook(lambda *_: fired.append("backward")))
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    try:
        y = call(model, x)
        y.float().square().sum().backward()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        for handle in handles:
            handle.remove()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, "fired": fired}


def assert_same(got: dict, expected: dict, exact: dict | None, unit: float) -> None:
    """Tensors agree to rounding, everything else is equal.

    With ``exact``, float64 results, the error of a tensor is at most twice PEFT's plus one unit
    round-off: in half precision PEFT itself rounds.
    """
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert got[name] == value, name
            continue
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        if exact is None:
            assert relative_rms(got[name], value) <= 8 * unit, name
        else:
            theirs = relative_rms(value, exact[name])
            assert relative_rms(got[name], exact[name]) <= 2 * theirs + unit, name
