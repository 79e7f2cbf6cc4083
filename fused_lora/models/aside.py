"""The tensors that a module in ``modules_to_save`` keeps aside: originals, and inactive copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..distributed import sharding

ASIDE = "_lora_aside"  # in the __dict__ of every module that owns copied tensors


@dataclass
class Aside:
    """What a module keeps aside of its own Parameters and buffers, by name.

    Attributes:
        root: whether this is the module that ``modules_to_save`` names, not a part of it.
        base: the originals; while ``disabled``, they are in the module and the copies are here.
        inactive: the copies of the inactive adapters.
    """

    root: bool
    base: dict[str, Tensor]
    inactive: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    disabled: bool = False


class MovesAside:
    """An instance's ``_apply`` that also moves the tensors kept aside: ``.to()`` calls it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, fn, recurse: bool = True) -> nn.Module:
        aside = self.module.__dict__[ASIDE]
        with torch.no_grad():
            moved = {name: fn(tensor.data) for name, tensor in aside.base.items()}
            if any(new.is_meta and not aside.base[name].is_meta for name, new in moved.items()):
                raise RuntimeError(
                    "expected a device with memory for a module in modules_to_save, got meta, where"
                    " its original weights would be lost: unload_lora first"
                )
            type(self.module)._apply(self.module, fn, recurse)
            for name, new in moved.items():
                tensor = aside.base[name]
                tensor.data = new
                if tensor.grad is not None:
                    tensor.grad.data = fn(tensor.grad.data)
            for adapter, tensors in aside.inactive.items():
                aside.inactive[adapter] = {name: fn(tensor) for name, tensor in tensors.items()}
        return self.module


def owners_of(model: nn.Module) -> list[nn.Module]:
    """The modules that keep tensors aside."""
    return [module for module in model.modules() if ASIDE in module.__dict__]


def trained_tensors(owner: nn.Module) -> dict[str, Tensor]:
    """The active adapter's tensors, by name."""
    aside = owner.__dict__[ASIDE]
    if aside.disabled:
        return aside.base
    return {name: table_of(owner, name)[name] for name in aside.base}


def originals_of(owner: nn.Module) -> dict[str, Tensor]:
    """The tensors that the active adapter's replaced, by name."""
    aside = owner.__dict__[ASIDE]
    if not aside.disabled:
        return aside.base
    return {name: table_of(owner, name)[name] for name in aside.base}


def swap(owner: nn.Module) -> None:
    """Exchange the tensors in the module with those aside."""
    aside = owner.__dict__[ASIDE]
    for name, other in aside.base.items():
        aside.base[name] = table_of(owner, name)[name]
        setattr(owner, name, other)  # not into the table: an LSTM also lists its weights
    aside.disabled = not aside.disabled


def table_of(owner: nn.Module, name: str) -> dict[str, Tensor | None]:
    """The module's dict of Parameters or of buffers that has the name.

    Raises:
        RuntimeError: neither has it.
    """
    for table in (owner._parameters, owner._buffers):
        if table.get(name) is not None:
            return table
    raise RuntimeError(
        f"expected {name} of a {type(owner).__name__} in modules_to_save to be a Parameter or a"
        " buffer, got one that a parametrization or a wrapper computes: remove it first"
    )


def write(current: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors of the same names, in place; their gradients are dropped."""
    for name, value in values.items():
        current[name].copy_(sharding.like(value, current[name]))
        current[name].grad = None  # of the previous values


def copy_of(tensor: Tensor) -> Tensor:
    """A copy that autograd does not connect with the original."""
    return tensor.detach().clone()


def present(table: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The entries that are not None."""
    return {name: tensor for name, tensor in table.items() if tensor is not None}
