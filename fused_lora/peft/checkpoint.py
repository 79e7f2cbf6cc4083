"""Save and load adapters in PEFT's format.

An adapter is two files, ``adapter_model.safetensors`` and ``adapter_config.json``; nothing is
unpickled. Saving replaces each file atomically. The tensors carry a digest of their configuration,
so that loading detects a crash between the two replacements. Loading checks everything before it
changes the model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
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
from ..models.adapt import adapt, check_contains_layers
from ..models.named_adapters import (
    adapter_names,
    check_name,
    check_new_name,
    check_sharing,
    check_unmerged,
)
from ..models.parameters import lora_layers
from ..ops.validation import check_dtype, check_impl, listed
from . import format as peft_format
from .files import CONFIG, WEIGHTS, AdapterTensors, layer_config, read_config, write_adapter

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Write an adapter of ``model`` in PEFT's format; loaded in PEFT it gives the same outputs.

    The configuration describes the layers' current ranks, scales and dropouts. Each file is written
    under a temporary name, flushed to disk and renamed into place; a process killed meanwhile may
    leave a hidden ``.tmp`` file.

    If ``fully_shard`` has sharded the model, call this in every process: tensors are gathered one
    at a time, the first process of the device mesh writes, and the others wait for it. Under
    ``DistributedDataParallel`` call it in one process.

    Args:
        directory: created if it does not exist; an adapter already in it is replaced.
        name: the adapter to save; the active one by default.

    Raises:
        OSError: the files cannot be written; existing files remain intact.
        RuntimeError: a parametrization computes part of the adapter, FSDP1 has flattened it, or
            another process could not write.
        ValueError: no adapters, no adapter of that name, settings that PEFT's format cannot
            express, or tensors on the meta device.
    """
    model = _unwrapped(model)
    check_contains_layers(model)
    layers = {_clean(place): layer for place, layer in lora_layers(model).items()}
    known = adapter_names(model)
    name = known[0] if name is None else name
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    mesh = mesh_of(layers.values())
    adapters = {
        place: layer.stash_adapter() if name == known[0] else layer.inactive_adapters[name]
        for place, layer in layers.items()
    }
    if len({adapter.config.dropout for adapter in adapters.values()}) > 1:
        warnings.warn(
            "fused_lora: the layers have different dropouts; PEFT's format holds only one, so the"
            " most common is saved",
            stacklevel=2,
        )
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None)
    modules = _modules(model)
    _warn_of_places(modules, layers)
    names = [place for place in modules if place]
    base_model = str(base_model) if base_model else None
    config = peft_format.make_config(layers, adapters, names, base_model)
    tensors, error = {}, None
    for place, adapter in adapters.items():
        for parameter, tensor in adapter.tensors.items():
            # A collective: every process takes part for every tensor, even after an error.
            whole = _whole(place, tensor)
            if is_first(mesh) and error is None:
                key = peft_format.tensor_key(place, layers[place], parameter)
                try:
                    tensors[key] = whole.contiguous().cpu()
                except Exception as caught:
                    if mesh is None:
                        raise
                    error = caught
    on_first(mesh, lambda: write_adapter(Path(directory), tensors, config), error)


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
        FileNotFoundError: a file is missing.
        RuntimeError: a merged layer.
        TypeError: ``name`` is not a str.
        ValueError: a sharded model, damaged or mismatched files, a setting that fused_lora does not
            support, or an adapter of another model. Errors in the files name the file and the key.
    """
    check_name(name)
    check_impl(impl)
    check_dtype("adapter_dtype", adapter_dtype)
    wrapped, model = model, _unwrapped(model)
    check_contains_layers(model)
    check_whole(model, "load an adapter")
    folder = Path(directory)
    config = read_config(folder)
    modules = _modules(model)
    with AdapterTensors(folder / WEIGHTS) as file:
        file.check_digest(config)
        places = file.places(modules)
        plan = {
            place: (layer_config(folder, config, place), parameters)
            for place, parameters in places.items()
        }
        for place, (its_config, parameters) in plan.items():
            file.check_shapes(place, modules[place], its_config, parameters)
        loaded = {
            place: Adapter(its_config, its_config.scaling, file.tensors(parameters))
            for place, (its_config, parameters) in plan.items()
        }
    if not file.ours:
        _warn_of_places(modules, loaded)
    if any(isinstance(module, LoRALayer) for module in modules.values()):
        _into_adapted(model, loaded, name, folder)
    else:
        check_replaceable(wrapped, "adapt")
        configs = {place: adapter.config for place, adapter in loaded.items()}
        found = {place: modules[place] for place in loaded}
        adapt(model, found, configs, impl, adapter_dtype)
        for place, layer in _by_alias(model, loaded).items():
            layer.activate_adapter(loaded[place])
            layer.adapter_name = name
    return list(loaded)


def _into_adapted(model, loaded: Mapping[str, Adapter], name: str, folder: Path) -> None:
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
        for place, layer in layers.items():
            layer.inactive_adapters[name] = _placed(loaded[place], layer)
        return
    check_unmerged(layers)
    for place, layer in layers.items():
        old = layer.stash_adapter() if name == known[0] else layer.inactive_adapters[name]
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
            layer.inactive_adapters[name] = _placed(loaded[place], layer)


def _by_alias(model: nn.Module, loaded: Mapping[str, Adapter]) -> dict[str, LoRALayer]:
    modules = _modules(model)
    return {place: modules[place] for place in loaded}


def _placed(adapter: Adapter, layer: LoRALayer) -> Adapter:
    like = layer.lora_A
    tensors = {n: t.to(like.device, like.dtype) for n, t in adapter.tensors.items()}
    return Adapter(adapter.config, adapter.scaling, tensors)


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


def _clean(place: str) -> str:
    """A module's name without the parts that wrappers inside the model add."""
    return ".".join(part for part in place.split(".") if part not in _WRAPPED)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each of its names, ignoring wrappers inside the model."""
    return {_clean(p): m for p, m in model.named_modules(remove_duplicate=False)}


def _warn_of_places(modules: Mapping[str, nn.Module], places: Iterable[str]) -> None:
    """Warn about shared modules: PEFT adapts such a module under its first name only."""
    names: dict[nn.Module, list[str]] = {}
    for place, module in modules.items():
        names.setdefault(module, []).append(place)
    for place in places:
        if len(names[modules[place]]) > 1:
            warnings.warn(
                f"fused_lora: one module has the names {listed(names[modules[place]])}; here its"
                " adapter acts under all of them, in PEFT only under the first",
                stacklevel=3,
            )
