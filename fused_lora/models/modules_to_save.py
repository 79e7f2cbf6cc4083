"""Which modules ``modules_to_save`` names, as PEFT matches them, and what is tied to them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.validation import listed
from .warn import warn
from .wrappers import WRAPPED, clean

# PEFT's list: these have no forward, or their owner indexes them.
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_NEAR_NAMES = 6  # suggested when nothing matches
REMOVE_HOOKS = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"


def saved_by(name: str, entries: Iterable[str]) -> bool:
    """Whether ``modules_to_save`` names the module: PEFT compares the ends, dots or not."""
    return any(name.endswith(entry) for entry in entries)


def find_modules(
    modules: Mapping[str, nn.Module], entries: Iterable[str] | None, strict: bool = True
) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` names, by their first name, without parts of others.

    Args:
        modules: every module of the model, by all its names.
        strict: whether each entry must match; PEFT's files also list names that do not.

    Raises:
        TypeError: not a list of names, or a match that cannot be trained whole.
        ValueError: an entry without a match, or a match without values.
    """
    no_list = isinstance(entries, str | bytes | bytearray | dict | nn.Module)
    if no_list or not isinstance(entries, Iterable | None):
        kind = type(entries).__name__
        raise TypeError(
            f"expected modules_to_save to be a list of names, got the {kind} {entries!r}"
        )
    entries = [] if entries is None else list(entries)
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise TypeError(f"expected names of modules as str in modules_to_save, got {entries!r}")
    names = [name for name in modules if name]
    for entry in entries if strict else ():
        matches = [name for name in names if saved_by(name, [entry])]
        if not any(True for name in matches for _ in modules[name].parameters()):
            raise ValueError(_no_match(entry, matches, names))
    found: dict[str, nn.Module] = {}
    inner: set[nn.Module] = set()
    for name in names:
        module = _unwrapped(modules[name])
        if module not in inner and saved_by(name, entries):
            _check_trainable(name, module)
            inner.update(module.modules())
            if next(module.parameters(), None) is not None:
                found[name] = module
    if strict:
        shortest_entries(modules, set(found.values()))
    return found


def shortest_entries(modules: Mapping[str, nn.Module], trained: set[nn.Module]) -> list[str] | None:
    """The shortest ``modules_to_save`` with which PEFT selects exactly ``trained``; or None.

    Raises:
        ValueError: PEFT would select more, as for "2", which also ends its part "2.2".
    """
    trained_names = [clean(name) for name, module in modules.items() if module in trained]
    # What else PEFT would train, or refuse; modules without Parameters do not matter.
    others = [
        clean(name)
        for name, module in modules.items()
        if name and _unwrapped(module) not in trained
        if isinstance(module, CONTAINERS) or next(module.parameters(), None) is not None
    ]
    chosen = set()
    for name in trained_names:
        parts = name.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        free = [ending for ending in endings if not any(saved_by(o, [ending]) for o in others)]
        if not free:
            raise ValueError(
                f"expected names that PEFT's modules_to_save can tell apart, got {name}, which is"
                f" also the end of {next(other for other in others if saved_by(other, [name]))}"
            )
        chosen.add(free[0])
    return sorted(chosen) or None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers such as ``torch.compile``'s."""
    for name in WRAPPED:
        if name in module._modules:
            return _unwrapped(module._modules[name])
    return module


def _no_match(entry: str, matches: list[str], names: list[str]) -> str:
    if matches:
        return (
            f"expected modules_to_save to name modules with parameters, got {entry!r}, which names"
            f" {listed(matches)} without any"
        )
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(entry.rpartition(".")[2], endings, n=_NEAR_NAMES)
    kind, shown = ("similar", near) if near else ("available", endings[-_NEAR_NAMES:])
    return (
        f"expected modules_to_save to match a module, got {entry!r}; {kind} names:"
        f" {', '.join(shown)}"
    )


def _check_trainable(place: str, module: nn.Module) -> None:
    if isinstance(module, CONTAINERS):
        raise TypeError(
            f"expected modules_to_save to name modules with a forward, got {place}, a"
            f" {type(module).__name__}: name its members, such as {place}.0 or {place}.key"
        )
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(
                f"expected modules_to_save without extra state, which no adapter's file holds, got"
                f" {'.'.join(filter(None, (place, name)))}, a {type(part).__name__}"
            )
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter):
            raise TypeError(
                f"expected float Parameters in modules_to_save, got {place}.{name}, a"
                f" {type(parameter).__name__} of {parameter.dtype}: quantised and sharded weights"
                " cannot be copied to train"
            )
        if parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"expected modules with values in modules_to_save, got {place}.{name} without"
                " (on the meta device, or lazy): load the weights first; if accelerate has"
                f" offloaded them, {REMOVE_HOOKS}"
            )


def find_tied(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The other modules that own a Parameter of the modules ``found``, by name."""
    own = {id(parameter) for root in found.values() for parameter in root.parameters()}
    inner = {part for root in found.values() for part in root.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if module not in inner and any(id(p) in own for p in module._parameters.values())
    }


def with_tied(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules ``found`` and those tied to them.

    Raises:
        TypeError, ValueError: a tied module that cannot be trained whole.
        ValueError: no tie, or a tied module that has more Parameters, which PEFT would drop.
    """
    tied = find_tied(model, found)
    if not tied and not share_parameters(found.values()):
        raise ValueError(
            "expected modules_to_save with tied Parameters for ensure_weight_tying=True, got"
            f" {listed(list(found)) or 'none'}, which share none"
        )
    for name, module in tied.items():
        _check_trainable(name, module)
        if len(list(module.parameters())) > 1:
            raise ValueError(
                f"expected tied modules with one Parameter for ensure_weight_tying=True, got {name}"
                " with more, which PEFT would drop"
            )
    return {**found, **tied}


def share_parameters(roots: Iterable[nn.Module]) -> bool:
    """Whether two of the modules have a Parameter in common."""
    owners = Counter(key for root in set(roots) for key in {id(p) for p in root.parameters()})
    return any(count > 1 for count in owners.values())


def warn_of_ties(model: nn.Module, found: Mapping[str, nn.Module], tied: bool) -> None:
    """Warn that copies end a tie, unless ``tied`` keeps it."""
    names = list(find_tied(model, found)) or list(found)
    if names != list(found) or (not tied and share_parameters(found.values())):
        warn(
            f"modules_to_save trains copies of {listed(list(found))}, no longer tied to"
            f" {listed(names)}, as in PEFT: set ensure_weight_tying=True to keep the tie, or the"
            " model's config.tie_word_embeddings to False before saving the whole model",
        )
