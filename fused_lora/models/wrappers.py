"""The names of a model's modules without what wrappers and adapters add to them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..layers.parameter import LoRAParameter
from ..layers.wrapping import BASE, WrappingLayer

# The child by which torch.compile's, checkpointing's and FSDP1's wrappers hold what they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def clean(place: str) -> str:
    """A module's name without the parts that wrappers inside the model add."""
    return ".".join(part for part in place.split(".") if part not in WRAPPED)


def plain_names(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` by the names of the unadapted model, without those of wrappers.

    The module within a :class:`.wrapping.WrappingLayer` is left out; its parts are not. Of nested
    layers, those of several Parameters of one module, each has its own name, as in PEFT.
    """
    # The name of each module's parts, and the module, which comes after the one that contains it.
    found: dict[str, tuple[str, nn.Module]] = {}
    for place, module in model.named_modules(remove_duplicate=remove_duplicate):
        owner, _, part = place.rpartition(".")
        name, parent = found.get(owner, ("", None)) if place else ("", None)
        inner = part == BASE and isinstance(parent, WrappingLayer)
        if place and not inner and part not in WRAPPED:
            name = f"{name}.{part}" if name else part
        found[place] = name, module
        if isinstance(module, LoRAParameter) and inner:
            yield _nested(place, found), module
        elif not inner:
            yield name, module


def _nested(place: str, found: dict[str, tuple[str, nn.Module]]) -> str:
    """The name of a layer within others of the same module's Parameters."""
    name, owner = found[place][0], place.rpartition(".")[0]
    while owner in found and isinstance(found[owner][1], LoRAParameter):
        name, owner = f"{name}.{BASE}", owner.rpartition(".")[0]
    return name
