"""The names of a model's modules without what wrappers and adapters add to them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..layers.beside import LoRABeside

# The child by which torch.compile's, checkpointing's and FSDP1's wrappers hold what they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_BASE = "base_layer"  # the child of a LoRABeside


def clean(place: str) -> str:
    """A module's name without the parts that wrappers inside the model add."""
    return ".".join(part for part in place.split(".") if part not in WRAPPED)


def plain_names(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` by the names of the unadapted model, without those of wrappers.

    The layer within a :class:`LoRABeside` is left out; its parts are not.
    """
    found: dict[str, tuple[str, nn.Module]] = {}  # a module comes after the one that contains it
    for place, module in model.named_modules(remove_duplicate=remove_duplicate):
        owner, _, part = place.rpartition(".")
        name, parent = found.get(owner, ("", None)) if place else ("", None)
        inner = part == _BASE and isinstance(parent, LoRABeside)
        if place and not inner and part not in WRAPPED:
            name = f"{name}.{part}" if name else part
        found[place] = name, module
        if not inner:
            yield name, module
