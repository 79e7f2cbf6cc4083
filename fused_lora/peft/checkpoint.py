"""Save and load adapters in PEFT's format.

An adapter is two files, ``adapter_model.safetensors`` and ``adapter_config.json``; nothing is
unpickled. Saving replaces each file atomically. The tensors carry a digest of their configuration,
so that loading detects a crash between the two replacements. Loading checks everything before it
changes the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..distributed.sharding import (
    check_replaceable,
    check_whole,
    is_first,
    is_shard,
    mesh_of,
    on_first,
)
from ..layers.base import LoRALayer
from ..layers.config import Adapter
from ..layers.parameter import LoRAParameter, ParameterTarget
from ..models.adapt import adapt, check_contains_layers
from ..models.arguments import check_model, check_without_peft, described
from ..models.bypass import bypassed, warn_of_readers
from ..models.check import warn_of_idle, watch_first_backward
from ..models.expert_stacks import stated, warn_of_experts
from ..models.fusion import fuse_new_layers
from ..models.modules_to_save import share_parameters, shortest_entries
from ..models.named_adapters import (
    adapter_names,
    check_name,
    check_new_name,
    check_sharing,
    check_unmerged,
)
from ..models.parameter_targets import read_elsewhere
from ..models.parameters import lora_layers
from ..models.record import remember
from ..models.targets import pattern_name
from ..models.trained_modules import (
    add_copies,
    check_copies,
    check_plain,
    copy_tensors,
    load_state,
    module_state,
    train_copies,
    trained_modules,
)
from ..models.warn import warn
from ..models.wrappers import plain_names
from ..ops.validation import check_dtype, check_impl, listed
from . import format as peft_format
from .base_model import describe
from .differences import warn_of_convolutions, warn_of_renamed, warn_of_tied
from .files import CONFIG, WEIGHTS, AdapterTensors, layer_config, read_config, write_adapter
from .parameters import resolve, swaps_roles, target_parameters, with_roles
from .saved_modules import (
    check_shared,
    check_untied,
    find_saved,
    read_states,
    saved_keys,
    warn_of_unsaved,
)
from .separate_experts import joined

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Write an adapter of ``model`` in PEFT's format; loaded in PEFT it gives the same outputs.

    A warning names the layers for which that does not hold: dilated convolutions, modules in two
    places, and layers whose names PEFT takes for those of fused experts (DeepSeek-V3 and others).

    The configuration describes the layers' current ranks, scales and dropouts, and the base model
    as ``AutoPeftModelForCausalLM`` and its kin need it. Each file is written under a temporary
    name, flushed to disk and renamed into place; a process killed meanwhile may leave a hidden
    ``.tmp`` file.

    If ``fully_shard`` has sharded the model, call this in every process: tensors are gathered one
    at a time, the first process of the device mesh writes, and the others wait for it. Under
    ``DistributedDataParallel`` call it in one process.

    Args:
        directory: created if it does not exist; an adapter already in it is replaced.
        name: the adapter to save; the active one by default.

    Raises:
        OSError: the files cannot be written; existing files remain intact.
        RuntimeError: a parametrization computes part of the adapter, FSDP1 has flattened it, a
            module in ``modules_to_save`` was quantised, or another process could not write.
        TypeError: an argument of the wrong type.
        ValueError: no adapters, PEFT's adapters, no adapter of that name, settings that PEFT's
            format cannot express, or tensors on the meta device.
    """
    check_model(model)
    folder = _folder(directory)
    model = _unwrapped(model)
    check_contains_layers(model)
    first = {module: place for place, module in plain_names(model)}
    layers = {first[layer]: layer for layer in lora_layers(model).values()}
    _check_fit(layers)
    known = adapter_names(model)
    if name is not None:
        check_name(name)
    name = known[0] if name is None else name
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    if name == known[0]:
        check_plain(model, "save them")
    warn_of_idle(model, "saving")
    trained = set(trained_modules(model).values())
    mesh = mesh_of([*layers.values(), *(part for root in trained for part in root.modules())])
    adapters = {
        place: layer.stash_adapter() if name == known[0] else layer.inactive_adapters[name]
        for place, layer in layers.items()
    }
    if len({adapter.config.dropout for adapter in adapters.values()}) > 1:
        warn(
            "the layers have different dropouts; PEFT's format holds only one, so the"
            " most common is saved",
        )
    modules = _modules(model)
    _warn_of_places(modules, layers)
    warn_of_convolutions(modules, layers)
    names = [place for place in modules if place]
    saved = {place: module for place, module in modules.items() if module in trained}
    entries = shortest_entries(modules, trained)
    check_untied(model)
    tied = share_parameters(trained)
    base_model = describe(model, modules, saved)
    parameters = target_parameters(layers, modules)
    config = peft_format.make_config(layers, adapters, names, base_model, entries, tied, parameters)
    warn_of_unsaved(model)
    warn_of_tied(config, trained)
    parts = {
        peft_format.tensor_key(place, layers[place], parameter): tensor
        for place, adapter in adapters.items()
        for parameter, tensor in adapter.tensors.items()
    }
    for place, module in saved.items():
        state = module_state(module, None if name == known[0] else name)
        parts |= {f"{peft_format.PREFIX}{place}.{n}": t for n, t in state.items()}
    tensors, seen, error = {}, set(), None
    for key, tensor in parts.items():
        # A collective: every process takes part for every tensor, even after an error.
        whole = _whole(key, tensor)
        if is_first(mesh) and error is None:
            try:
                whole = whole.contiguous().cpu()
                # safetensors refuses shared memory: a module of two names, or tied parts.
                tensors[key] = whole.clone() if whole.data_ptr() in seen else whole
                seen.add(whole.data_ptr())
            except Exception as caught:
                if mesh is None:
                    raise
                error = caught

    def write() -> None:
        warn_of_renamed(model, config, tensors)
        write_adapter(folder, tensors, config)

    on_first(mesh, write, error)


def _folder(directory: str | os.PathLike) -> Path:
    if not isinstance(directory, str | os.PathLike) or isinstance(os.fspath(directory), bytes):
        raise TypeError(f"expected a directory as a str or a Path, got {described(directory)}")
    if directory == "":
        raise ValueError("expected a directory, got ''")
    return Path(directory)


def _check_fit(layers: Mapping[str, LoRALayer]) -> None:
    for place, layer in layers.items():
        try:
            layer.check_fit()
        except RuntimeError as error:
            raise RuntimeError(f"{place}: {error}") from error


def _whole(place: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"expected tensors with values, got one on the meta device at {place}")
    return tensor.full_tensor() if is_shard(tensor) else tensor


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    *,
    impl: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> list[str]:
    """Read an adapter in PEFT's format into ``model``. An error leaves the model unchanged.

    A model without adapters is adapted according to the files, and the adapter becomes active. An
    adapted model must have adapters on exactly the layers that the files name. There, a new
    ``name`` adds an inactive adapter (see :func:`fused_lora.set_adapter`). An existing ``name``
    must have the files' ranks; its values are overwritten in place, so optimizers stay valid.

    Args:
        name: of the adapter in the model.
        impl, adapter_dtype: as for :func:`fused_lora.apply_lora`; used only if the model has no
            adapters yet.

    Returns:
        The names of the layers that got the adapter.

    Raises:
        OSError: a file is missing or cannot be read.
        RuntimeError: a merged layer.
        TypeError: an argument of the wrong type.
        ValueError: a sharded model, one with PEFT's adapters, damaged or mismatched files, a
            setting that fused_lora does not support, or an adapter of another model. Errors in the
            files name the file and the key.
    """
    check_model(model)
    folder = _folder(directory)
    check_name(name)
    check_impl(impl)
    check_dtype("adapter_dtype", adapter_dtype)
    wrapped, model = model, _unwrapped(model)
    check_contains_layers(model)
    check_without_peft(model)
    check_whole(model, "load an adapter")
    config = read_config(folder)
    modules = _modules(model)
    saved = find_saved(model, modules, config, folder)
    try:
        parameters = resolve(config, modules)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    with AdapterTensors(folder / WEIGHTS) as file:
        file.check_digest(config)
        if (dropout := file.dropout()) is not None:
            config["lora_dropout"] = dropout
        keys = saved_keys(file, saved)
        states = read_states(file, saved, keys)
        separate, joined_keys = joined(file, modules, partial(layer_config, folder, config), keys)
        tied = bool(config.get("ensure_weight_tying"))
        adapted = any(isinstance(module, LoRALayer) for module in modules.values())
        check_shared(saved, states, tied or adapted, folder / WEIGHTS)
        places = file.places(modules, {*keys, *joined_keys})
        if absent := sorted(parameters - places.keys()):
            raise ValueError(
                f"{folder / WEIGHTS}: expected an adapter of each Parameter of target_parameters,"
                f" got none for {listed(absent)}"
            )
        loaded = separate | {
            place: _read(file, folder, config, place, modules[place], keys, place in parameters)
            for place, keys in places.items()
        }
    if not file.ours:
        _warn_of_places(modules, loaded)
    warn_of_convolutions(modules, loaded)
    if adapted:
        _into_adapted(model, loaded, name, folder, {saved[p]: s for p, s in states.items()})
    else:
        check_replaceable(wrapped, "adapt")
        configs = {place: adapter.config for place, adapter in loaded.items()}
        found = {place: modules[place] for place in loaded}
        copies = copy_tensors(model, saved, tied)
        targets = {p: t for p, t in found.items() if isinstance(t, ParameterTarget)}
        warn_of_readers(found, bypassed(model) | read_elsewhere(model, targets))
        adapt(model, found, configs, impl, adapter_dtype)
        train_copies(saved, copies)
        fuse_new_layers(model)
        remember(model)
        watch_first_backward(model)
        for place, state in states.items():
            load_state(saved[place], state)
        for place, layer in _by_alias(model, loaded).items():
            layer.activate_adapter(loaded[place])
            layer.adapter_name = name
        warn_of_experts(model, *stated(config), resolved=True)
    return list(loaded)


def _read(
    file: AdapterTensors,
    folder: Path,
    config: Mapping,
    place: str,
    module: nn.Module | ParameterTarget,
    keys: Mapping[str, str],
    is_parameter: bool,
) -> Adapter:
    """The adapter of one layer, checked.

    Args:
        keys: by parameter name.
        is_parameter: whether ``target_parameters`` names it.
    """
    name = pattern_name(place, module) if is_parameter else None
    its_config = layer_config(folder, config, place, file.saved_as[place], name)
    swapped = False
    if is_parameter and keys.keys() >= {"lora_A", "lora_B"}:
        shapes = {parameter: file.shape(key) for parameter, key in keys.items()}
        try:
            swapped = swaps_roles(config, file.ours, module, shapes)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {place}: {error}") from error
    file.check_shapes(place, module, its_config, keys, swapped)
    tensors = file.tensors(keys)
    if swapped:
        tensors = with_roles(tensors, len(LoRAParameter.weight_like(module)))
    return Adapter(its_config, its_config.scaling, tensors)


def _into_adapted(
    model,
    loaded: Mapping[str, Adapter],
    name: str,
    folder: Path,
    states: Mapping[nn.Module, Mapping[str, Tensor]],
) -> None:
    layers = _by_alias(model, loaded)
    plain = [place for place, layer in layers.items() if not isinstance(layer, LoRALayer)]
    if plain:
        raise ValueError(
            f"{folder / WEIGHTS}: expected adapters for adapted layers only, got adapters for"
            f" {listed(plain)}, where the model has none"
        )
    absent = [place for place, x in lora_layers(model).items() if x not in set(layers.values())]
    if absent:
        raise ValueError(
            f"{folder / WEIGHTS}: expected an adapter for every adapted layer, got none for"
            f" {listed(absent)}"
        )
    known = adapter_names(model)
    if name not in known:
        check_new_name(layers, name)
        for place, layer in layers.items():
            check_sharing(place, layer, loaded[place].config)
        check_copies(model, "load another adapter")
        for place, layer in layers.items():
            layer.inactive_adapters[name] = _placed(loaded[place], layer)
        add_copies(model, name)
        for module, state in states.items():
            load_state(module, state, name)
        return
    check_unmerged(layers)
    check_copies(model, "load an adapter", "" if name == known[0] else name)
    for place, layer in layers.items():
        old = layer.inactive_adapters.get(name) or layer.active_adapter()
        if (old.config.init == "pissa") != (loaded[place].config.init == "pissa"):
            raise ValueError(
                f"{folder / CONFIG}: expected the same init_lora_weights as the model's at {place}:"
                " PiSSA changes the base weight; load into a model without adapters"
            )
        for parameter in {**old.tensors, **loaded[place].tensors}:
            had, got = (
                None if (t := a.tensors.get(parameter)) is None else tuple(t.shape)
                for a in (old, loaded[place])
            )
            if had != got:
                raise ValueError(
                    f"{folder / WEIGHTS}: expected {parameter} of {place} in the shape that adapter"
                    f" {name!r} has, {had}, got {got}; load it under another name"
                )
    for place, layer in layers.items():
        if name == known[0]:
            layer.activate_adapter(loaded[place])
        else:
            _overwrite(layer.inactive_adapters, name, _placed(loaded[place], layer))
    for module, state in states.items():
        load_state(module, state, None if name == known[0] else name)


def _by_alias(model: nn.Module, loaded: Mapping[str, Adapter]) -> dict[str, LoRALayer]:
    modules = _modules(model)
    return {place: modules[place] for place in loaded}


def _placed(adapter: Adapter, layer: LoRALayer) -> Adapter:
    like = layer.adapter_device(), layer.lora_A.dtype
    tensors = {n: t.to(*like) for n, t in adapter.tensors.items()}
    return Adapter(adapter.config, adapter.scaling, tensors)


@torch.no_grad()
def _overwrite(adapters: dict[str, Adapter], name: str, new: Adapter) -> None:
    """Replace an inactive adapter; the values of its Parameters in place."""
    for parameter, tensor in adapters[name].tensors.items():
        if isinstance(tensor, nn.Parameter):
            new.tensors[parameter] = tensor.copy_(new.tensors[parameter])
    adapters[name] = new


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s and data-parallel wrappers.

    PEFT's keys use the module names of that inner model.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each of its names, as the unadapted model has them."""
    return dict(plain_names(model, remove_duplicate=False))


def _warn_of_places(modules: Mapping[str, nn.Module], places: Iterable[str]) -> None:
    """Warn about shared modules: PEFT adapts such a module under its first name only."""
    names: dict[nn.Module, list[str]] = {}
    for place, module in modules.items():
        names.setdefault(module, []).append(place)
    for place in places:
        if len(names[modules[place]]) > 1:
            warn(
                f"one module has the names {listed(names[modules[place]])}; here its"
                " adapter acts under all of them, in PEFT only under the first",
            )
