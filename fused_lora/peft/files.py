"""The two files of an adapter in PEFT's format: atomic writes, and reads that trust nothing.

Nothing is unpickled. Every error names the file and, where there is one, the key.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..layers.base import LoRALayer
from ..layers.config import AdapterConfig
from ..models.targets import layer_class
from ..ops.validation import listed
from . import format as peft_format

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_DIGEST = "fused_lora_config_sha256"  # in the safetensors metadata
_DTYPES = ("F16", "BF16", "F32", "F64")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write both files; the tensors' metadata holds a digest of the configuration."""
    metadata = {"format": "pt", _DIGEST: peft_format.digest(config)}
    files = {
        WEIGHTS: safetensors.torch.save(tensors, metadata),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace_file(folder / name, content)


def _replace_file(path: Path, content: bytes) -> None:
    """Replace ``path`` atomically: a crash leaves the complete old file or the complete new one."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # unique per save
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename is durable once its directory is flushed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_config(folder: Path) -> dict:
    """The checked configuration in ``folder``, which must contain both files."""
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


def layer_config(folder: Path, config: Mapping, place: str) -> AdapterConfig:
    """The configuration of the layer ``place``, which must be among the targets."""
    if not peft_format.names_target(config, place):
        raise ValueError(
            f"{folder / WEIGHTS}: expected adapters for {CONFIG}'s target_modules only, got one for"
            f" {place}: the two files do not belong together"
        )
    try:
        return peft_format.layer_config(config, place)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {place}: {error}") from error


class AdapterTensors:
    """An ``adapter_model.safetensors``, open within a ``with`` statement.

    ``ours`` is set by :meth:`check_digest`: whether this library wrote the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> AdapterTensors:
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
        """Check that ``config`` is the one saved with the tensors; PEFT's files have no digest."""
        saved = (self._file.metadata() or {}).get(_DIGEST)
        self.ours = saved is not None
        if saved is not None and saved != peft_format.digest(config):
            raise ValueError(
                f"{self.path}: expected the {CONFIG} it was saved with, got another: a save was"
                " interrupted between the two files, or one was edited or copied; save again"
            )

    def places(self, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
        """Layer name to parameter name to key.

        Raises:
            ValueError: a key that belongs to no adapter, or a layer that cannot have this adapter.
        """
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
                    f"{self.path}: expected one adapter for the module {other}, got a second one"
                    f" under its other name {place}"
                )
        return places

    def _is_base_weight(self, key: str, modules: Mapping[str, nn.Module]) -> bool:
        """Whether ``key`` is the weight of the model's input or output embedding.

        PEFT saves these two with adapters of embeddings. They are not loaded, only compared.

        Raises:
            ValueError: the model's own weight is another.
        """
        place, _, last = key.removeprefix(peft_format.PREFIX).rpartition(".")
        place = place.removesuffix(".base_layer")
        if last != "weight" or not isinstance(modules.get(place), nn.Embedding | nn.Linear):
            return False
        module = modules[place]
        weight = module.base_weight if isinstance(module, LoRALayer) else module.weight
        if weight is None or tuple(weight.shape) != tuple(self._shape(key)):
            same = False
        else:
            # PEFT saved its base's dtype, which may differ: compare in the narrower of the two.
            own, saved = weight.detach().cpu(), self._tensor(key)
            narrow = min(own.dtype, saved.dtype, key=lambda dtype: torch.finfo(dtype).bits)
            same = torch.equal(saved.to(narrow), own.to(narrow))
        if not same:
            raise ValueError(
                f"{self.path}: expected {key} to be the model's own weight, got another: the"
                " adapter's base model was resized or trained and is not this model"
            )
        return True

    def check_shapes(
        self, place: str, module: nn.Module, config: AdapterConfig, parameters: Mapping[str, str]
    ) -> None:
        """Check that the layer ``place`` can have the adapter, and the shapes of its tensors."""
        cls = type(module) if isinstance(module, LoRALayer) else layer_class(module)
        if module.weight.is_meta:
            raise ValueError(
                f"{self.path}: expected a model with values, got {place} on the meta device"
            )
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
                    f"{self.path}: expected no {key}, since {CONFIG} does not set use_dora"
                )
            shape = tuple(self._shape(key))
            if shape != expected[parameter]:
                raise ValueError(
                    f"{self.path}: expected {key} of shape {expected[parameter]} according to"
                    f" {CONFIG} and the model, got {shape}"
                )

    def _shape(self, key: str) -> list[int]:
        return self._file.get_slice(key).get_shape()

    def tensors(self, parameters: Mapping[str, str]) -> dict[str, Tensor]:
        return {name: self._tensor(key) for name, key in parameters.items()}

    def _tensor(self, key: str) -> Tensor:
        dtype = self._file.get_slice(key).get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{self.path}: expected {key} in a float dtype, got {dtype}")
        return self._file.get_tensor(key)
