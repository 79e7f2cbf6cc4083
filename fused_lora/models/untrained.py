"""Adapters that no gradient has reached: layers, and the single experts of a mixture.

A hook on one Parameter of each adapter records the first gradient and removes itself. Where the
Parameter belongs to the experts of a mixture the hook stays: the gradient of an expert that got no
token is exactly zero, and one bool per expert on the device notes the others. The host never waits
for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from ..distributed.sharding import is_shard
from ..layers.base import LoRALayer
from ..layers.parameter import LoRAParameter
from ..ops.validation import listed
from .arguments import check_model
from .expert_stacks import has_children, is_wrapper, plain_name, unadapted_experts
from .warn import warn

_FACTORS = "lora_A", "lora_B"
_watches = WeakTensorKeyDictionary()  # Parameter to _Watch; outside of copies and pickles


class _Factor(NamedTuple):
    """The Parameter of an adapter whose gradients are watched.

    Attributes:
        experts: the number of experts whose factors it holds; None for a single layer.
        first: whether the expert is the slowest dimension, else it is the fastest.
    """

    parameter: nn.Parameter
    experts: int | None = None
    first: bool = True

    def reached(self, grad: Tensor) -> Tensor | None:
        """``(E,)``, whether each expert has a gradient; None for a shard or without values."""
        if type(grad) is not Tensor or grad.is_meta or not grad.numel():
            return None
        shape, dim = ((self.experts, -1), 1) if self.first else ((-1, self.experts), 0)
        grad = grad.detach().reshape(shape)
        # Without a temporary of the gradient's size; NaN counts as a gradient.
        return torch.logical_or(grad.amax(dim), grad.amin(dim))


class _Watch:
    """What arrived at a factor.

    Attributes:
        arrived: whether any gradient did.
        seen: the experts that got one; None before the first, and if unknown (shards).
        handle: of the hook; None when it is gone.
    """

    __slots__ = ("arrived", "handle", "seen")

    def __init__(self):
        self.arrived, self.seen, self.handle = False, None, None

    def note(self, factor: _Factor, grad: Tensor | None) -> None:
        self.arrived = True
        reached = None if factor.experts is None or grad is None else factor.reached(grad)
        if reached is None:
            self.seen = None
            self.close()
        elif self.seen is None:
            self.seen = reached
        else:
            self.seen = self.seen.to(reached.device).logical_or_(reached)
        if reached is not None and reached.is_cpu and bool(self.seen.all()):
            self.close()

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def missing(self, factor: _Factor) -> list[int] | None:
        """The experts without a gradient, an empty list for a layer; None if nothing is missing."""
        if not self.arrived:
            return list(range(factor.experts or 0))
        if self.seen is None:
            return None
        missing = [expert for expert, seen in enumerate(self.seen.tolist()) if not seen]
        if not missing:
            self.close()
        return missing or None


def watch_gradients(model: nn.Module) -> None:
    """Note from now on which adapters of ``model``, active or not, get gradients."""
    for _, factor in _factors(model, active=False):
        parameter = factor.parameter
        plain = type(parameter) is nn.Parameter or is_shard(parameter)
        if plain and not parameter.is_inference() and parameter not in _watches:
            _watch(factor)


def _watch(factor: _Factor) -> None:
    parameter, watch = factor.parameter, _Watch()
    experts, first = factor.experts, factor.first

    def at_gradient(parameter: nn.Parameter) -> None:
        if is_dynamo_compiling():  # compiled autograd traces hooks, and cannot remove them
            return
        with torch.no_grad():
            watch.note(_Factor(parameter, experts, first), parameter.grad)

    # A frozen Parameter takes no hook; PEFT freezes those of inactive adapters.
    trains = parameter.requires_grad
    parameter.requires_grad_(True)
    watch.handle = parameter.register_post_accumulate_grad_hook(at_gradient)
    parameter.requires_grad_(trains)
    _watches[parameter] = watch


def untrained_adapters(model: nn.Module) -> dict[str, list[int]]:
    """The active adapters that got no gradient since they were attached, down to single experts.

    Call it after some backward passes. Gradients are recorded from :func:`fused_lora.apply_lora` or
    :func:`fused_lora.load_adapter` on, of PEFT's models from :func:`fused_lora.patch_peft` on. A
    gradient counts however it is accumulated, checkpointed or reset
    afterwards; an expert has one if any token reached it in training.

    An expert's gradient is read on the device at every backward pass, which adds four small
    operations per Parameter of experts, until all of its experts have one: on a CPU by itself, on a
    GPU when this function is called. Only this function waits for the device.

    Limits: each process counts its own tokens. Of sharded experts only is known whether any got
    a gradient. Compiled autograd runs no such hooks. An adapter whose Parameters were copied, or
    replaced as by FSDP, is watched from the first call of this function on, which warns of it; of
    earlier gradients only what ``.grad`` still holds is known.

    Returns:
        By the name of a layer, an empty list: the adapter got no gradient. By the name of experts'
        Parameter, as in ``PatchReport.layers``, the indices of the experts without one. Adapters
        that are trained, or of which nothing is known, are absent.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no adapters.
    """
    check_model(model)
    factors = list(_factors(model))
    if not factors:
        raise ValueError(
            f"expected a model with adapters, got a {type(model).__name__} without: apply_lora,"
            " load_adapter or PEFT adds them"
        )
    unknown = {name for name, factor in factors if factor.parameter not in _watches}
    watch_gradients(model)
    found = {}
    for name, factor in factors:
        watch, grad = _watches.get(factor.parameter), factor.parameter.grad
        if name in unknown:
            if watch is None or grad is None:
                continue
            watch.note(factor, grad)
        if (missing := watch.missing(factor)) is not None:
            found[name] = missing
    if unknown:
        names = listed([name for name in dict(factors) if name in unknown])
        warn(
            f"the gradients of {names} are noted only from now on: a copy, Parameters replaced"
            " since, or a model of PEFT before patch_peft(model)"
        )
    return found


def expert_notes(model: nn.Module) -> dict[str, str]:
    """What a report says of a model's experts: those without adapter, those without gradient."""
    notes = {}
    if (left := unadapted_experts(model)) is not None:
        notes[listed(left.names)] = f"no adapter; target_parameters={left.targets} adapts them"
    for name, factor in _factors(model):
        watch = _watches.get(factor.parameter)
        if watch is None or not watch.arrived or (missing := watch.missing(factor)) is None:
            continue
        experts = listed([str(expert) for expert in missing])
        notes[name] = f"{len(missing)} of {factor.experts} experts got no gradient yet ({experts})"
    return notes


def _factors(model: nn.Module, active: bool = True) -> Iterator[tuple[str, _Factor]]:
    """The Parameter to watch of each adapter, by the name of the layer or of experts' Parameter."""
    for place, layer in model.named_modules():
        name = plain_name(place)
        if isinstance(layer, LoRALayer):
            A, B = (layer._parameters.get(key) for key in _FACTORS)
            experts = None
            if isinstance(layer, LoRAParameter):
                name = f"{name}.{layer.parameter_name}"
                experts = layer.num_matrices if layer.num_matrices > 1 else None
            factor = _trained(A, B)
            if factor is not None:
                yield name, _Factor(factor, experts, factor is A)
        elif has_children(layer, *_FACTORS) and hasattr(layer, "active_adapters"):
            yield from _peft_factors(name, layer, active)


def _peft_factors(name: str, layer: nn.Module, active: bool) -> Iterator[tuple[str, _Factor]]:
    known = [*layer._modules["lora_A"], *layer._modules.get("lora_embedding_A", ())]
    experts = None
    if is_wrapper(layer):
        name = f"{name}.{layer.parameter_name}"
        experts = layer.num_experts if layer.num_experts > 1 else None
    for adapter in known:
        if active and adapter not in layer.active_adapters:
            continue
        if adapter in layer._modules["lora_A"]:
            A, B = (getattr(layer._modules[key][adapter], "weight", None) for key in _FACTORS)
        else:
            A, B = (layer._modules[f"lora_embedding_{key}"][adapter] for key in "AB")
        factor = _trained(A, B)
        if factor is not None:
            yield name, _Factor(factor, experts, factor is A)


def _trained(A: Tensor | None, B: Tensor | None) -> nn.Parameter | None:
    """The factor to watch: ``B``, since new adapters have ``B = 0`` and so no gradient of ``A``."""
    if B is None or (A is not None and A.requires_grad and not B.requires_grad):
        return A
    return B
