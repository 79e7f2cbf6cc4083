"""Adapters on disk, in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

Nothing is unpickled. Each file is replaced as a whole, and the tensors carry a digest of the
configuration they were saved with, so that a crash between the two is found when loading. Loading
checks everything before it changes anything.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import peft_format
from .adapters import adapter_names, check_name, check_new_name, check_sharing, check_unmerged
from .config import AdapterConfig
from .layer import Adapter, LoRALayer
from .model import adapt, lora_layers
from .sharding import check_whole, is_shard
from .targets import layer_class
from .validation import FLOATS, listed

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_DIGEST = "fused_lora_config_sha256"  # in the safetensors metadata


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Write an adapter of ``model`` in PEFT's format, which PEFT loads with the same outputs.

    The configuration is made from what the layers are now: ranks, scales, dropouts. Each file is
    written aside, flushed to the disk and put in place as a whole.

    Args:
        directory: made if it does not exist; an adapter in it is replaced.
        name: of the adapter; by default the active one.

    Raises:
        OSError: the files cannot be written; those that were there are still whole.
        ValueError: no adapters, no adapter of that name, settings that PEFT cannot hold, or tensors
            that are sharded or on the meta device.
    """
    model = _unwrapped(model)
    layers = lora_layers(model)
    known = adapter_names(model)
    name = known[0] if name is None else name
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    adapters = {
        place: layer.stash_adapter() if name == known[0] else layer.inactive_adapters[name]
        for place, layer in layers.items()
    }
    if len({adapter.config.dropout for adapter in adapters.values()}) > 1:
        warnings.warn(
            "fused_lora: the layers have different dropouts; PEFT's format holds one, and the"
            " commonest is saved",
            stacklevel=2,
        )
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    names = [place for place, _ in model.named_modules(remove_duplicate=False) if place]
    config = peft_format.make_config(layers, adapters, names, base_model)
    tensors = {
        peft_format.tensor_key(place, layers[place], parameter): _whole(place, tensor)
        for place, adapter in adapters.items()
        for parameter, tensor in adapter.tensors.items()
    }
    metadata = {"format": "pt", _DIGEST: peft_format.digest(config)}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace_file(folder / WEIGHTS, safetensors.torch.save(tensors, metadata))
    _replace_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _whole(place: str, tensor: Tensor) -> Tensor:
    if is_shard(tensor) or tensor.is_meta:
        raise ValueError(f"expected whole tensors to save, got a sharded or meta one at {place}")
    return tensor.contiguous().cpu()


def _replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: at every moment there is the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    *,
    impl: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> list[str]:
    """Read an adapter in PEFT's format into ``model``. On an error the model is as it was.

    A model without adapters is adapted as the files say, and the adapter is active. In an adapted
    model, whose layers must be those of the files, a new name is added aside (see
    :func:`fused_lora.set_adapter`), and a known one gets the new values in place, which keeps
    optimizers valid; its ranks must be those of the files.

    Args:
        impl, adapter_dtype: as for :func:`fused_lora.apply_lora`, for a model without adapters.

    Returns:
        The names of the layers.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: a merged layer.
        TypeError: a name that is no str.
        ValueError: damaged or mismatched files, something that fused_lora does not compute, or an
            adapter of another model; names the file and the key. A sharded model.
    """
    check_name(name)
    model = _unwrapped(model)
    check_whole(model, "load an adapter")
    folder = Path(directory)
    config = _read_config(folder)
    modules = dict(model.named_modules(remove_duplicate=False))
    with _Tensors(folder / WEIGHTS) as file:
        file.check_digest(config)
        places = file.places(modules)
        plan = {
            place: (_layer_config(folder, config, place), parameters)
            for place, parameters in places.items()
        }
        for place, (layer_config, parameters) in plan.items():
            file.check_shapes(place, modules[place], layer_config, parameters)
        loaded = {
            place: Adapter(layer_config, layer_config.scaling, file.tensors(parameters))
            for place, (layer_config, parameters) in plan.items()
        }
    if any(isinstance(module, LoRALayer) for module in modules.values()):
        _into_adapted(model, loaded, name, folder)
    else:
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
            f"{folder / WEIGHTS}: expected adapters of adapted layers only, got one of"
            f" {listed(plain)}, which the model's other adapters leave out"
        )
    absent = [place for place, x in lora_layers(model).items() if x not in set(layers.values())]
    if absent:
        raise ValueError(
            f"{folder / WEIGHTS}: expected an adapter of every adapted layer, got none for"
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
                f"{folder / CONFIG}: expected init_lora_weights as the model's at {place}: PiSSA's"
                " base weight is its own; load into a model without adapters"
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
    modules = dict(model.named_modules(remove_duplicate=False))
    return {place: modules[place] for place in loaded}


def _placed(adapter: Adapter, layer: LoRALayer) -> Adapter:
    like = layer.lora_A
    tensors = {n: t.to(like.device, like.dtype) for n, t in adapter.tensors.items()}
    return Adapter(adapter.config, adapter.scaling, tensors)


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    for needed in (path, folder / WEIGHTS):
        if not needed.is_file():
            pickled = folder / "adapter_model.bin"
            hint = f"; {pickled.name} is a pickle, which is not read" if pickled.exists() else ""
            raise FileNotFoundError(f"expected {needed}, got no such file{hint}")
    try:
        return peft_format.parse_config(path.read_text(encoding="utf-8"))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def _layer_config(folder: Path, config: Mapping, place: str) -> AdapterConfig:
    if not peft_format.names_target(config, place):
        raise ValueError(
            f"{folder / WEIGHTS}: expected adapters of {CONFIG}'s target_modules, got one of"
            f" {place}: the two files do not belong together"
        )
    try:
        return peft_format.layer_config(config, place)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {place}: {error}") from error


class _Tensors:
    """An open ``adapter_model.safetensors``."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> _Tensors:
        try:
            self._file = safetensors.safe_open(self.path, framework="pt", device="cpu")
            self._file.__enter__()
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}: expected a safetensors file, got a damaged one: {error}"
            ) from error
        return self

    def __exit__(self, *raised) -> None:
        self._file.__exit__(*raised)

    def check_digest(self, config: Mapping) -> None:
        saved = (self._file.metadata() or {}).get(_DIGEST)
        if saved is not None and saved != peft_format.digest(config):
            raise ValueError(
                f"{self.path}: expected the {CONFIG} it was saved with, got another: a save was"
                " cut off between the two files, or one was edited or copied; save again"
            )

    def places(self, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
        """Layer name to parameter to key, every key accounted for."""
        places: dict[str, dict[str, str]] = {}
        unknown = []
        keys = self._file.keys()
        for key in keys:
            split = peft_format.split_key(key)
            if split is not None:
                place, parameter = split
                if parameter in places.setdefault(place, {}):
                    raise ValueError(f"{self.path}: expected one {parameter} for {place}, got two")
                places[place][parameter] = key
            elif not self._is_base_weight(key, modules):
                unknown.append(key)
        if unknown:
            raise ValueError(
                f"{self.path}: expected tensors of adapters only, got {listed(unknown)}"
            )
        if not places:
            raise ValueError(f"{self.path}: expected tensors of adapters, got none")
        seen: dict[nn.Module, str] = {}
        for place in places:
            if place not in modules:
                raise ValueError(f"{self.path}: expected a module {place} in the model, got none")
            module = modules[place]
            if not isinstance(module, LoRALayer) and layer_class(module) is None:
                raise ValueError(
                    f"{self.path}: expected {place} to be a layer that can be adapted, got a"
                    f" {type(module).__name__}"
                )
            other = seen.setdefault(module, place)
            if other != place:
                raise ValueError(
                    f"{self.path}: expected one adapter for the module {other}, got a second under"
                    f" {place}"
                )
        return places

    def _is_base_weight(self, key: str, modules: Mapping[str, nn.Module]) -> bool:
        """Whether it is an embedding's own weight, which PEFT saves too, and the model's."""
        place, _, last = key.removeprefix(peft_format.PREFIX).rpartition(".")
        place = place.removesuffix(".base_layer")
        if last != "weight" or not isinstance(modules.get(place), nn.Embedding | nn.Linear):
            return False
        module = modules[place]
        weight = module.base_weight if isinstance(module, LoRALayer) else module.weight
        if weight is None or tuple(weight.shape) != tuple(self._shape(key)):
            same = False
        else:
            same = torch.equal(self._file.get_tensor(key).to(weight.device, weight.dtype), weight)
        if not same:
            raise ValueError(
                f"{self.path}: expected {key} to be the model's own weight, got another: the base"
                " model was resized or trained, and is not this one"
            )
        return True

    def check_shapes(
        self, place: str, module: nn.Module, config: AdapterConfig, parameters: Mapping[str, str]
    ) -> None:
        cls = type(module) if isinstance(module, LoRALayer) else layer_class(module)
        try:
            if not isinstance(module, LoRALayer):
                cls.check_plain(module)
            cls.check_config(module.weight, config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {place}: {error}") from error
        expected = cls.adapter_shapes(module.weight, config)
        for parameter in {**expected, **parameters}:
            key = parameters.get(parameter)
            if key is None:
                raise ValueError(f"{self.path}: expected {parameter} of {place}, got none")
            if parameter not in expected:
                raise ValueError(
                    f"{self.path}: expected no {key}, which use_dora in {CONFIG} would announce"
                )
            shape = tuple(self._shape(key))
            if shape != expected[parameter]:
                raise ValueError(
                    f"{self.path}: expected {key} of shape {expected[parameter]}, as {CONFIG} and"
                    f" the model say, got {shape}"
                )

    def _shape(self, key: str) -> list[int]:
        return self._file.get_slice(key).get_shape()

    def tensors(self, parameters: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = {name: self._file.get_tensor(key) for name, key in parameters.items()}
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{self.path}: expected {parameters[name]} in a float dtype, got {tensor.dtype}"
                )
        return tensors


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s and data-parallel wrappers, whose names are PEFT's."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model
