"""The two files of an adapter in PEFT's format: atomic writes, and reads that trust nothing.

Nothing is unpickled. Every error names the file and, where there is one, the key.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import secrets
from collections.abc import Collection, Container, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..layers.base import LoRALayer
from ..layers.config import AdapterConfig
from ..layers.offload import has_values, onloaded
from ..layers.parameter import ParameterTarget
from ..layers.wrapping import BASE, WrappingLayer
from ..models.targets import layer_class
from ..models.warn import warn
from ..models.wrappers import clean
from ..ops.validation import FLOATS, listed, multiplies_itself
from . import format as peft_format

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_DIGEST = "fused_lora_config_sha256"  # in the safetensors metadata
_RENAMED = {"block_sparse_moe": "mlp"}  # modules of transformers 4, and their names in 5
_DROPOUT = "fused_lora_dropout"  # in that metadata, where PEFT's configuration cannot hold it
_DTYPES = ("F16", "BF16", "F32", "F64")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write both files; the tensors' metadata holds a digest of the configuration.

    It also holds a dropout of adapters on Parameters: PEFT refuses a configuration with one.
    """
    metadata = {"format": "pt", _DIGEST: peft_format.digest(config)}
    if config["target_parameters"] and config["lora_dropout"]:
        metadata[_DROPOUT] = repr(config["lora_dropout"])
        config = {**config, "lora_dropout": 0.0}
        warn(
            "saved lora_dropout 0 in adapter_config.json, since PEFT refuses dropout with"
            " target_parameters; load_adapter restores the adapter's own"
        )
    files = {
        WEIGHTS: safetensors.torch.save(tensors, metadata),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    if folder.is_file():
        raise FileExistsError(f"expected a directory, got the file {folder}")
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
            if folder.is_file():
                hint = f"; {folder} is a file: pass its directory"
            elif not folder.exists():
                hint = "; an adapter on the Hub must be downloaded first: snapshot_download does"
            raise FileNotFoundError(f"expected {needed}, got no such file{hint}")
    try:
        return peft_format.parse_config(path.read_text(encoding="utf-8"))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def layer_config(
    folder: Path, config: Mapping, place: str, saved_as: str, parameter: str | None = None
) -> AdapterConfig:
    """The configuration of the layer ``place``, which must be among the targets.

    Args:
        saved_as: its name in the file. What wrappers add to it is in the configuration's names
            too if the model was wrapped before PEFT adapted it, and not if it was afterwards.
        parameter: the full name of the Parameter that ``target_parameters`` names, if one.
    """
    names = list(dict.fromkeys((place, clean(saved_as), saved_as)))
    if parameter is not None:
        names = [parameter]
    elif not any(peft_format.names_target(config, name) for name in names):
        raise ValueError(
            f"{folder / WEIGHTS}: expected adapters for {CONFIG}'s target_modules only, got one for"
            f" {place}: the two files do not belong together"
        )
    try:
        return peft_format.layer_config(config, names)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {place}: {error}") from error


class AdapterTensors:
    """An ``adapter_model.safetensors``, open within a ``with`` statement.

    ``ours`` is set by :meth:`check_digest`: whether this library wrote the file. ``saved_as`` is
    set by :meth:`places`: each layer's name in the file, which a wrapper may have changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.saved_as: dict[str, str] = {}

    def __enter__(self) -> AdapterTensors:
        self.path.open("rb").close()  # safetensors reports a file without permission as missing
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

    def all_keys(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._shape(key))

    def tensor(self, key: str, like: torch.dtype) -> Tensor:
        """A tensor that can be written into one of dtype ``like``: any float, or the same dtype.

        Raises:
            ValueError: another dtype.
        """
        if like.is_floating_point:
            return self._tensor(key)
        tensor = self._file.get_tensor(key)
        if tensor.dtype != like:
            raise ValueError(f"{self.path}: expected {key} of dtype {like}, got {tensor.dtype}")
        return tensor

    def check_digest(self, config: Mapping) -> None:
        """Check that ``config`` is the one saved with the tensors; PEFT's files have no digest."""
        mapping = config.get("auto_mapping")
        kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        self._base = config.get("base_model_name_or_path") or (kind and f"a {kind}")
        saved = (self._file.metadata() or {}).get(_DIGEST)
        self.ours = saved is not None
        if saved is not None and saved != peft_format.digest(config):
            raise ValueError(
                f"{self.path}: expected the {CONFIG} it was saved with, got another: a save was"
                " interrupted between the two files, or one was edited or copied; save again"
            )

    def dropout(self) -> float | None:
        """The dropout that this library saved beside the configuration, if it did.

        Raises:
            ValueError: not a probability below 1.
        """
        saved = (self._file.metadata() or {}).get(_DROPOUT)
        if saved is None:
            return None
        try:
            value = float(saved)
        except ValueError:
            value = math.nan
        if not 0 <= value < 1:
            raise ValueError(
                f"{self.path}: expected {_DROPOUT} in [0, 1) in its metadata, got {saved!r}"
            )
        return value

    def places(
        self, modules: Mapping[str, nn.Module], saved: Collection[str] = ()
    ) -> dict[str, dict[str, str]]:
        """Layer name to parameter name to key.

        Args:
            saved: keys that are read elsewhere, such as those of ``modules_to_save``.

        Raises:
            ValueError: a key that belongs to no adapter, or a layer that cannot have this adapter.
        """
        places: dict[str, dict[str, str]] = {}
        unknown, names = [], set()
        keys = [key for key in self.all_keys() if key not in saved]
        for key in keys:
            split = peft_format.split_key(key)
            if split is not None:
                saved_as, parameter, name = split
                place = in_model(saved_as, modules)
                if parameter in places.setdefault(place, {}):
                    raise ValueError(
                        f"{self.path}: expected one {parameter} for {place}, got two: {key} and"
                        f" {places[place][parameter]}"
                    )
                places[place][parameter] = key
                self.saved_as[place] = saved_as
                names |= {name} - {None}
            elif not self._is_base_tensor(key, modules) and not peft_format.is_training_buffer(key):
                unknown.append(key)
        if len(names) > 1:
            raise ValueError(
                f"{self.path}: expected the tensors of one adapter, got those of"
                f" {listed(sorted(names))}: save one adapter per directory"
            )
        if unknown:
            raise ValueError(
                f"{self.path}: expected tensors of adapters only, got {listed(unknown)}"
            )
        if not places and not saved:
            raise ValueError(f"{self.path}: expected tensors of adapters, got none")
        seen: dict[nn.Module, str] = {}
        absent = [place for place in places if place not in modules]
        if absent:
            raise ValueError(f"{self.path}: {self._absent(absent, len(places), modules)}")
        for place in places:
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

    def _absent(self, absent: list[str], of: int, modules: Mapping[str, nn.Module]) -> str:
        """The error of layers that the model does not have."""
        message = f"expected a module {absent[0]} in the model, got none"
        if len(absent) > 1:
            message += f", as of {len(absent)} of the adapter's {of} layers"
        near = difflib.get_close_matches(absent[0], [name for name in modules if name], n=3)
        if near:
            message += f"; similar: {', '.join(near)}"
        elif has := [name for name, module in modules.items() if name and layer_class(module)]:
            message += f"; the model's layers have names such as {has[0]}"
        return message + (f"; the adapter was made for {self._base}" if self._base else "")

    def _is_base_tensor(self, key: str, modules: Mapping[str, nn.Module]) -> bool:
        """Whether ``key`` is a tensor of the base model.

        PEFT saves those of the input and output embeddings beside an adapter, with
        ``save_embedding_layers`` or if they are adapted. They are not loaded, only compared.

        Raises:
            ValueError: the model's own tensor is another.
        """
        place, _, last = (peft_format.without_prefix(key) or "").rpartition(".")
        name = in_model(clean(place).removesuffix(".base_layer"), modules)
        module = modules.get(f"{name}.base_layer", modules.get(name))
        while isinstance(module, WrappingLayer):
            module = module._modules[BASE]
        if module is None or last not in {**module._parameters, **module._buffers}:
            return False
        with onloaded(module):
            own = getattr(module, last)
            if isinstance(module, LoRALayer) and last == "weight":
                own = module.base_weight
            if own is not None and (own.dtype not in FLOATS or multiplies_itself(own)):
                return True  # quantised: its values cannot be compared
            if own is None or tuple(own.shape) != self.shape(key):
                same = False
            else:
                # PEFT saved its base's dtype, which may differ: compare in the narrower of the two.
                own, saved = own.detach().cpu(), self._tensor(key)
                narrow = min(own.dtype, saved.dtype, key=lambda dtype: torch.finfo(dtype).bits)
                same = torch.equal(saved.to(narrow), own.to(narrow))
        if not same:
            raise ValueError(
                f"{self.path}: expected {key} to be the model's own {last}, got another: the"
                " adapter's base model was resized or trained and is not this model"
            )
        return True

    def check_shapes(
        self,
        place: str,
        module: nn.Module | ParameterTarget,
        config: AdapterConfig,
        parameters: Mapping[str, str],
        swapped: bool = False,
    ) -> None:
        """Check that the layer ``place`` can have the adapter, and the shapes of its tensors.

        Args:
            swapped: whether the tensors have each other's roles, see :mod:`.parameters`.
        """
        cls = type(module) if isinstance(module, LoRALayer) else layer_class(module)
        wraps = issubclass(cls, WrappingLayer)
        if cls.weight_like(module).is_meta if wraps else not has_values(module, "weight"):
            raise ValueError(
                f"{self.path}: expected a model with values, got {place} on the meta device:"
                " load its weights first"
            )
        try:
            if not isinstance(module, LoRALayer):
                cls.check_plain(module)
            weight = cls.weight_like(module)
            cls.check_config(weight, config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {place}: {error}") from error
        expected = cls.adapter_shapes(weight.mT if swapped else weight, config)
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


def in_model(place: str, modules: Container[str]) -> str:
    """A layer's name in the model, without what wrappers added to it when it was saved.

    Also if the model's modules had other names in transformers 4.
    """
    place = clean(place)
    while place.startswith("module.") and place not in modules:
        place = place.removeprefix("module.")
    parts = place.split(".")
    for old, new in _RENAMED.items():
        if old in parts and ".".join(parts[: parts.index(old) + 1]) not in modules:
            place = ".".join(new if part == old else part for part in parts)
    return place
