"""What a model remembers of its adapted layers, so that layers which vanished can be named.

An adapted layer is an ``nn.Linear``, so code that replaces linears replaces it too, and likewise a
head that trains whole. ``remember`` gives the layers and the modules in ``modules_to_save``, and
every module that contains one, a record that they share: the names of all of them. It is a plain
attribute, which copies and pickles keep and ``state_dict`` omits. A layer counts as present
wherever in the model it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ..layers.base import LoRALayer
from ..layers.replacing import class_name
from .trained_modules import is_trained
from .wrappers import WRAPPED

# Of a layer: its name and the record. Of a module that contains layers: its own name, and that.
_KEY = "_adapted"
_HELD = (*WRAPPED, "module")  # children by which a wrapper holds the module that it wraps


class Gone(NamedTuple):
    """What became of a layer or of a module in ``modules_to_save``.

    Attributes:
        now: "replaced by a Float8Linear", "removed".
        whole: whether it was in ``modules_to_save``.
    """

    now: str
    whole: bool

    @property
    def problem(self) -> str:
        what = ("its trained copy", "module") if self.whole else ("its adapter", "layer")
        return f"{what[0]} is gone: the {what[1]} was {self.now}"


def remember(model: nn.Module) -> None:
    """Record which layers of ``model`` are adapted, and which modules train whole."""
    forget(model)
    record = {
        name: is_trained(module) for name, module in model.named_modules() if _is_kept(module)
    }
    for name in record:
        module, path = model, ""
        module.__dict__[_KEY] = path, record
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            module = module._modules[part]
            module.__dict__[_KEY] = path, record


def forget(model: nn.Module) -> None:
    """Forget the layers of ``model``, here and in the modules that contain ``model``."""
    for module in model.modules():
        if _KEY in module.__dict__:
            own, record = module.__dict__.pop(_KEY)
            for name in [name for name in record if _within(name, own)]:
                del record[name]


def _is_kept(module: nn.Module) -> bool:
    return isinstance(module, LoRALayer) or is_trained(module)


def gone_layers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Gone]:
    """The layers that were adapted, or trained whole, and are not in a model any more, by name.

    Args:
        modules: the model's ``named_modules()``.
    """
    present: set[tuple[int, str]] = set()
    owners: list[tuple[str, nn.Module, str, dict]] = []
    for place, module in modules:
        entry = module.__dict__.get(_KEY)
        if entry is None:
            continue
        own, record = entry
        if _is_kept(module):
            present.add((id(record), own))
        # The outermost modules of a record cover those in them.
        elif not (owners and owners[-1][3] is record and _within(place, owners[-1][0])):
            owners.append((place, module, own, record))
    return {
        name: state
        for owner in owners
        if len(present) < len(owner[3]) or len(owners) > 1
        for name, state in _gone_of(*owner, present)
    }


def _gone_of(
    place: str, module: nn.Module, own: str, record: dict, present: set[tuple[int, str]]
) -> Iterator[tuple[str, Gone]]:
    for name, whole in record.items():
        if not _within(name, own) or (id(record), name) in present:
            continue
        relative = name[len(own) + 1 :] if own else name
        now = _module_at(module, relative)
        if now is not None and _is_kept(now):
            if now.__dict__.get(_KEY, (None, None))[1] is not record:
                continue  # a copy of an adapted layer took its place
            now = None  # another layer moved here
        state = "removed" if now is None else f"replaced by {_article(class_name(type(now)))}"
        yield f"{place}.{relative}" if place else relative, Gone(state, whole)


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _module_at(module: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, wrappers ignored, or None."""
    for part in name.split("."):
        while part not in module._modules:
            inner = [module._modules[key] for key in _HELD if key in module._modules]
            if not inner:
                return None
            module = inner[0]
        module = module._modules[part]
        if module is None:
            return None
    return module


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOUaeio" or noun.startswith("nn.") else f"a {noun}"
