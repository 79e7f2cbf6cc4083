"""Adapters on Parameters in PEFT's files: which Parameter a key means, and files of older versions.

A key names a Parameter by the depth of its layer: of the Parameters of one module that
``target_parameters`` selects, the last one has the module's name, and each further one
``.base_layer`` more. So what a key means depends on the configuration and on the model.

PEFT before 0.19.1 exchanged the roles of ``lora_A`` and ``lora_B`` for stacks ``(E, out, in)``.
Such files are converted without rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping

from torch import Tensor, nn

from ..layers.base import LoRALayer
from ..layers.experts import matrices, stacks
from ..layers.parameter import LoRAParameter, ParameterTarget
from ..layers.wrapping import BASE
from ..models.parameter_targets import nested
from ..models.targets import pattern_name
from ..ops.validation import listed
from .format import endings, shortest_endings

_SWAPPED_BEFORE = (0, 19, 1)

Modules = MutableMapping[str, nn.Module | ParameterTarget]


def target_parameters(
    layers: Mapping[str, LoRALayer], modules: Mapping[str, nn.Module]
) -> list[str]:
    """The shortest name endings that select exactly the adapted Parameters.

    Args:
        layers: the adapted layers, by the names of the unadapted model.
        modules: every module, by those names.

    Raises:
        ValueError: there are none, since one name is the end of another.
    """
    chosen = [pattern_name(p, x) for p, x in layers.items() if isinstance(x, LoRAParameter)]
    found = shortest_endings(chosen, [full for _, full, *_ in _parameters(modules)])
    if found is None:
        raise ValueError(
            f"expected Parameters that PEFT's format can name, got {listed(chosen)}: one's"
            " name is the end of another Parameter's"
        )
    return found


def resolve(config: Mapping, modules: Modules) -> set[str]:
    """Put the targets of ``target_parameters`` into ``modules``, by the names of their layers.

    Layers of an adapted model stay as they are.

    Returns:
        The names of these layers.

    Raises:
        ValueError: an adapted model's layer of that name has another Parameter.
    """
    wanted = set(config.get("target_parameters") or ())
    chosen: dict[str, tuple[nn.Module, list[str]]] = {}
    for place, full, holder, name in _parameters(modules):
        if not wanted.isdisjoint(endings(full)):
            chosen.setdefault(place, (holder, []))[1].append(name)
    found: dict[str, ParameterTarget] = {}
    for place, (holder, names) in chosen.items():
        found |= nested(place, holder, names)
    for place, target in found.items():
        enter(modules, place, target)
    return set(found)


def enter(modules: Modules, place: str, target: ParameterTarget) -> None:
    """Put a target into ``modules``; a layer of an adapted model stays, and must be on it.

    Raises:
        ValueError: the layer is on another Parameter.
    """
    own = modules.get(place)
    if not isinstance(own, LoRAParameter):
        modules[place] = target
    elif own.parameter_name != target.name:
        raise ValueError(
            f"expected an adapter of {pattern_name(place, own)}, got one of {target.name}: the"
            " model's adapters are on other Parameters"
        )


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Of every Parameter: its module's first name, its full name, its module and its own name."""
    seen = set()
    for place, module in modules.items():
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, LoRAParameter):
            outer = place.removesuffix(f".{BASE}")
            if outer != place and isinstance(modules.get(outer), LoRAParameter):
                continue
            module = module.holder
        for name in module._parameters:
            yield place, f"{place}.{name}" if place else name, module, name


def swaps_roles(
    config: Mapping, ours: bool, target: ParameterTarget | LoRAParameter, shapes: Mapping
) -> bool:
    """Whether ``lora_A`` and ``lora_B`` are those of PEFT before 0.19.1: of ``W_eᵀ``.

    Args:
        ours: whether this library wrote the file.
        shapes: of both tensors in the file.

    Raises:
        ValueError: the file does not say which: square experts, and no ``peft_version``.
    """
    weight = LoRAParameter.weight_like(target)
    if weight.dim() != 3 or ours or getattr(target.holder, "is_transposed", False):
        return False
    _, N, K = weight.shape
    if N != K:
        return (shapes["lora_A"][-1:], shapes["lora_B"][:1]) == ((N,), (K,))
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version is None:
        raise ValueError(
            f"expected peft_version, got none: PEFT before 0.19.1 exchanged lora_A and lora_B of"
            f" experts ({N}, {K}), and nothing else in the files shows it"
        )
    return tuple(map(int, version.groups())) < _SWAPPED_BEFORE


def with_roles(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """An adapter of ``W_eᵀ`` as one of ``W_e``: ``(B_e A_e)ᵀ = A_eᵀ B_eᵀ``, without rounding."""
    A, B = stacks(tensors["lora_A"], tensors["lora_B"], experts)
    return dict(zip(("lora_A", "lora_B"), matrices(B.mT, A.mT), strict=True))
