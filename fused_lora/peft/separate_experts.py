"""Adapters of experts in files of transformers 4, where each projection was an ``nn.Linear``.

The adapters of a projection become one of the stack that transformers 5 has, without rounding:

    gate_up_proj   A_e = [A_gate; A_up]     B_e = [[B_gate, 0], [0, B_up]]
    down_proj      A_e, B_e of the expert's linear layer

The router, which now holds its weight itself, keeps its adapter's shapes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layers.base import LoRALayer
from ..layers.config import Adapter, AdapterConfig
from ..layers.experts import matrices, weight_of
from ..layers.parameter import LoRAParameter, ParameterTarget
from ..layers.parameter_forward import unfused_reason
from ..models.parameter_targets import nested
from ..models.targets import layer_class
from ..ops.validation import listed
from . import format as peft_format
from .files import AdapterTensors, in_model
from .parameters import Modules, enter

# Name of a projection: its stack, and which half of it.
_PROJECTIONS = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
}  # fmt: skip
_EXPERT = re.compile(rf"(.+\.experts)\.(0|[1-9]\d{{0,5}})\.({'|'.join(_PROJECTIONS)})")


def joined(
    file: AdapterTensors,
    modules: Modules,
    config_of: Callable[[str, str], AdapterConfig],
    saved: Collection[str] = (),
) -> tuple[dict[str, Adapter], set[str]]:
    """The adapters of stacks that a file has for linear layers; targets are added to ``modules``.

    Args:
        config_of: the configuration of a layer, by its names in the model and in the file.
        saved: keys of other tensors.

    Returns:
        The adapters by the names of their layers, and the keys that they are made of.

    Raises:
        ValueError: some experts lack an adapter, adapters differ in rank or scale, or their shapes
            are not the model's.
    """
    stacks: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    keys = set()
    for key in file.all_keys():
        split = None if key in saved else peft_format.split_key(key)
        if split is None:
            continue
        place = in_model(split[0], modules)
        match = _EXPERT.fullmatch(place)
        if match is None:
            _take_router(place, modules)
            continue
        stack = in_model(match[1], modules)
        if place not in modules and _holder(stack, modules) is not None:
            stacks[stack][match[3]][int(match[2])][split[1]] = key, place, split[0]
            keys.add(key)
    found = {}
    for stack, projections in stacks.items():
        holder = _holder(stack, modules)
        wanted = {_PROJECTIONS[name][0] for name in projections}
        names = [name for name in holder._parameters if name in wanted]
        for place, target in nested(stack, holder, names).items():
            parts = {n: e for n, e in projections.items() if _PROJECTIONS[n][0] == target.name}
            try:
                found[place] = _of_stack(file, target, parts, config_of)
                enter(modules, place, target)
            except ValueError as error:
                raise ValueError(f"{file.path}: {stack}: {error}") from error
    return found, keys


def _holder(stack: str, modules: Modules) -> nn.Module | None:
    """The stack of experts of that name, gate rows before up's; None for anything else."""
    module = modules.get(stack)
    if isinstance(module, LoRAParameter):
        module = module.holder
    if not isinstance(module, nn.Module) or unfused_reason(module, frozen=False) is not None:
        return None
    return module if getattr(module, "is_concatenated", False) else None


def _take_router(place: str, modules: Modules) -> None:
    """Target the weight of a module that was a linear layer and now holds it itself."""
    module = modules.get(place)
    if not isinstance(module, nn.Module) or isinstance(module, LoRALayer) or layer_class(module):
        return
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 2 and not module._modules:
        modules[place] = ParameterTarget(module, "weight")


def _of_stack(file, target: ParameterTarget, parts: Mapping, config_of) -> Adapter:
    """The adapter of one stack, of those of one or two linear layers per expert."""
    E, N, K = weight_of(target.holder, target.name).shape
    halves = 2 if target.name == "gate_up_proj" else 1
    rows = N // halves
    made = []
    for projection, each in sorted(parts.items(), key=lambda part: _PROJECTIONS[part[0]]):
        if absent := sorted(set(range(E)) - each.keys()):
            raise ValueError(
                f"expected an adapter of {projection} for each of {E} experts, got none for"
                f" {listed([str(number) for number in absent])}"
            )
        if extra := sorted(each.keys() - set(range(E))):
            raise ValueError(f"expected {E} experts, got {projection} of expert {extra[0]}")
        made.append(
            (_PROJECTIONS[projection][1], *_of_projection(file, each, E, rows, K, config_of))
        )
    configs = {config for _, config, _, _ in made}
    if len(configs) > 1:
        raise ValueError("expected gate and up to have one rank and scale, got several")
    (config,) = configs
    A, rank = torch.cat([A for _, _, A, _ in made], dim=1), config.rank * len(made)
    B = A.new_zeros((E, N, rank))
    for i, (half, _, _, part) in enumerate(made):
        B[:, half * rows : (half + 1) * rows, i * config.rank : (i + 1) * config.rank] = part
    alpha = config.scaling * math.sqrt(rank) if config.use_rslora else config.alpha * len(made)
    config = replace(config, rank=rank, alpha=alpha)
    tensors = dict(zip(("lora_A", "lora_B"), matrices(A, B), strict=True))
    return Adapter(config, config.scaling, tensors)


def _of_projection(
    file, each: Mapping, E: int, N: int, K: int, config_of
) -> tuple[AdapterConfig, Tensor, Tensor]:
    """One projection's configuration, ``(E, rank, in)`` and ``(E, out, rank)``."""
    configs = {config_of(*next(iter(parts.values()))[1:]) for parts in each.values()}
    if len(configs) > 1:
        raise ValueError("expected one rank and scale of all experts, got several")
    (config,) = configs
    shapes = {"lora_A": (config.rank, K), "lora_B": (N, config.rank)}
    for parts in each.values():
        for parameter, shape in shapes.items():
            if parameter not in parts:
                raise ValueError(f"expected {parameter} beside {next(iter(parts.values()))[0]}")
            key = parts[parameter][0]
            if file.shape(key) != shape:
                raise ValueError(f"expected {key} of shape {shape}, got {file.shape(key)}")
        if strange := parts.keys() - shapes.keys():
            raise ValueError(
                f"expected no {sorted(strange)[0]} of an expert: DoRA of experts is not supported"
            )
    A, B = (
        torch.stack([file.tensor(each[e][parameter][0], torch.float32) for e in range(E)])
        for parameter in shapes
    )
    return config, A, B
