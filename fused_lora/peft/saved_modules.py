"""``modules_to_save`` in PEFT's files: which modules they hold, and which Parameters they lack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.base import LoRALayer
from ..models.modules_to_save import find_modules, find_tied, saved_by, with_tied
from ..models.parameters import unsaved_parameters
from ..models.record import gone_layers
from ..models.trained_modules import module_state, named_parts, own_tensors, trained_modules
from ..models.warn import warn
from ..models.wrappers import clean
from ..ops.validation import listed
from . import format as peft_format
from .files import CONFIG, AdapterTensors


def find_saved(
    model: nn.Module, modules: Mapping[str, nn.Module], config: Mapping, folder: Path
) -> dict[str, nn.Module]:
    """The modules that an adapter's files hold whole, by each of their names in the files.

    Args:
        modules: the modules of ``model`` by all their names, without those of wrappers.

    Raises:
        ValueError: one cannot be trained whole, or an adapted model trains others.
    """
    entries = config.get("modules_to_save")
    try:
        found = find_modules(modules, entries, strict=False)
        if config.get("ensure_weight_tying"):
            found = with_tied(model, found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if any(isinstance(module, LoRALayer) for module in modules.values()):
        trained = trained_modules(model)
        if set(found.values()) != set(trained.values()):
            raise ValueError(
                f"{folder / CONFIG}: expected modules_to_save to select the modules that train"
                f" whole in the model, {listed(list(trained)) or 'none'}, got {entries!r}, which"
                f" selects {listed(list(found)) or 'none'}"
            )
    places = dict(found)
    for module in found.values():
        names = [name for name, other in modules.items() if other is module]
        places |= {name: module for name in names if saved_by(name, entries)}
        partly = [name for name in names if not saved_by(name, entries)]
        if 0 < len(partly) < len(names):
            warn(
                f"one module has the names {listed(names)}; here its trained values act"
                f" under all of them, in PEFT not under {listed(partly)}",
            )
    return places


def saved_keys(file: AdapterTensors, places: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Key to place and tensor name, for the tensors of ``modules_to_save``.

    Raises:
        ValueError: two keys of one tensor.
    """
    split: dict[str, tuple[str, str]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key in file.all_keys():
        found = _split_saved(peft_format.without_prefix(key) or "", places)
        if found is None:
            continue
        if (other := keys.setdefault(found, key)) != key:
            raise ValueError(
                f"{file.path}: expected one {found[1]} for {found[0]}, got two: {other} and {key}"
            )
        split[key] = found
    return split


def _split_saved(name: str, places: Iterable[str]) -> tuple[str, str] | None:
    """The place and the tensor that a key names, with as little of it stripped as possible.

    A "module." may be a wrapper's, or a child that the model has: its name comes first.
    """
    name = clean(name)
    while True:
        if inside := [place for place in places if name.startswith(f"{place}.")]:
            place = max(inside, key=len)
            return place, name.removeprefix(f"{place}.")
        if not name.startswith("module."):
            return None
        name = name.removeprefix("module.")


def read_states(
    file: AdapterTensors, saved: Mapping[str, nn.Module], keys: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, Tensor]]:
    """The states of the modules in ``modules_to_save``, by place.

    Raises:
        ValueError: a state that does not fit its module.
    """
    states = {}
    for place, module in saved.items():
        own_keys = {name: key for key, (where, name) in keys.items() if where == place}
        states[place] = _read_state(file, place, module, own_keys)
        adapted = module in trained_modules(module).values()
        if not adapted and (changed := _changed_originals(file, module, own_keys)):
            warn(
                f"{file.path} also has originals of {place}, with another"
                f" {listed(changed)} than the model's, which is used while adapters are disabled",
            )
    return states


def _read_state(
    file: AdapterTensors, place: str, module: nn.Module, keys: Mapping[str, str]
) -> dict[str, Tensor]:
    state = {}
    expected = module_state(module)
    for name in {**expected, **keys}:
        if name.startswith(("modules_to_save.", "original_module.")):
            continue  # PEFT's wrapper, if asked to save embeddings
        key = keys.get(name, f"{peft_format.PREFIX}{place}.{name}")
        if name not in keys:
            raise ValueError(
                f"{file.path}: expected {key}, since {CONFIG} has {place} in modules_to_save, got"
                " none"
            )
        if name not in expected:
            raise ValueError(
                f"{file.path}: expected no {key}: the model's {place}, a {type(module).__name__},"
                " has no such tensor"
            )
        shape = tuple(expected[name].shape)
        if file.shape(key) != shape:
            raise ValueError(
                f"{file.path}: expected {key} of shape {shape}, as in the model, got"
                f" {file.shape(key)}"
            )
        state[name] = file.tensor(key, expected[name].dtype)
    return state


def _changed_originals(
    file: AdapterTensors, module: nn.Module, keys: Mapping[str, str]
) -> list[str]:
    """The tensors whose originals PEFT saved, and whose values are not the module's."""
    changed = []
    for name, own in module_state(module).items():
        key = keys.get(f"original_module.{name}")
        if key is not None and file.shape(key) == tuple(own.shape):
            saved, own = file.tensor(key, own.dtype), own.cpu()
            # PEFT saved its base's dtype, which may differ: compare in the narrower of the two.
            narrow = min(own.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
            if not torch.equal(saved.to(narrow), own.to(narrow)):
                changed.append(name)
    return changed


def check_untied(model: nn.Module) -> None:
    """Check that no other module has got a Parameter that trains whole.

    Raises:
        ValueError: one has, for example by ``tie_weights()``: it would not be saved there.
    """
    trained = trained_modules(model)
    if tied := find_tied(model, trained):
        raise ValueError(
            f"expected modules_to_save with Parameters of their own ({listed(list(trained))}), got"
            f" {listed(list(tied))} tied to them since, as tie_weights() does: set"
            " ensure_weight_tying=True in apply_lora, or untie them"
        )


def check_shared(
    saved: Mapping[str, nn.Module],
    states: Mapping[str, Mapping[str, Tensor]],
    tied: bool,
    path: Path,
) -> None:
    """Check that each Parameter gets one value, however many names it has.

    Args:
        tied: whether modules that share a Parameter share its copy.

    Raises:
        ValueError: a file of separate modules for a model that keeps them tied.
    """
    values: dict[object, tuple[str, Tensor]] = {}
    for place, module in saved.items():
        for part, owner in named_parts(module):
            for name, own in own_tensors(owner).items():
                name = f"{part}.{name}" if part else name
                key = id(own) if tied else (module, name)
                value = states[place][name]
                other, first = values.setdefault(key, (f"{place}.{name}", value))
                if first is not value and not torch.equal(first, value):
                    raise ValueError(
                        f"{path}: expected equal values for {other} and {place}.{name}, which the"
                        " model has tied, got two different ones: PEFT trained them separately"
                    )


def warn_of_unsaved(model: nn.Module) -> None:
    """Warn of Parameters that train but that no adapter's file holds.

    Those of a module that replaced one in ``modules_to_save`` are told of by ``lora_layers``.
    """
    gone = gone_layers(model.named_modules())
    replaced = tuple(f"{name}." for name, state in gone.items() if state.whole)
    unsaved = [name for name in unsaved_parameters(model) if not name.startswith(replaced)]
    if unsaved:
        warn(
            f"{listed(unsaved)} require grad, but the adapter's file does not hold"
            " them: name their modules in apply_lora(..., modules_to_save=[...]), or save them"
            " yourself",
        )
