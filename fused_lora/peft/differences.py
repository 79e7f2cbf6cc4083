"""Warnings of adapters that PEFT computes or loads otherwise than this library."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..layers.parameter import LoRAParameter
from ..models.warn import warn
from ..models.wrappers import plain_names
from ..ops.validation import listed
from . import format as peft_format

# What PEFT takes for projections of fused experts, by transformers' family of conversions: used if
# PEFT's own conversion is not installed.
_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def warn_of_convolutions(modules: Mapping[str, nn.Module], places: Iterable[str]) -> None:
    """Warn about dilated convolutions: PEFT's ``lora_A`` has their other settings only."""
    dilated = [
        place
        for place in places
        if isinstance(module := modules[place], nn.Conv2d)
        and any(k > 1 and d > 1 for k, d in zip(module.kernel_size, module.dilation, strict=True))
    ]
    if dilated:
        warn(
            f"{listed(dilated)}: the convolution has a dilation, which its adapter has"
            " here and does not have in PEFT up to 0.21: PEFT's output is another, or an error if"
            " the sizes differ; use the adapter in the library that trained it",
        )


def warn_of_tied(config: Mapping, trained: Iterable[nn.Module]) -> None:
    """Warn if more modules share one Parameter than an embedding and its head."""
    users: dict[int, int] = {}
    for module in trained:
        for parameter in module.parameters():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    if config.get("ensure_weight_tying") and max(users.values(), default=0) > 2:
        warn(
            "PEFT up to 0.21 cannot load ensure_weight_tying for more modules than an embedding and"
            f" its head ({', '.join(config['modules_to_save'])}): delete that key from"
            " adapter_config.json for PEFT, which then loads the same values untied"
        )


def warn_of_renamed(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Warn about adapters that PEFT would load into other layers, or not at all.

    For models whose experts transformers 5 has fused, PEFT converts adapters of the separate
    experts: it takes a target named like an expert's projection for a part of the fused one, also
    where a dense layer or a shared expert has that name.

    Args:
        model: a transformers model; others are not converted.
        config, tensors: the contents of the two files.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    conversions = sys.modules.get("transformers.conversion_mapping")
    families = getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {}) | {"mixtral": "mixtral"}
    mapping = getattr(conversions, "get_checkpoint_conversion_mapping", None)
    if kind is None or mapping is None or (kind not in families and mapping(kind) is None):
        return
    try:
        lost, why = _lost(model, config, tensors), ""
    except ValueError as error:  # PEFT refuses the file
        lost, why = _places(tensors), f" ({error})"
    except Exception:  # no PEFT, or its conversion is called otherwise: it must not prevent a save
        names = _EXPERTS.get(families.get(kind), ())
        lost, why = [p for p in _places(tensors) if p.rpartition(".")[2] in names], ""
    if lost:
        warn(
            f"PEFT with transformers 5 does not load the adapters of {listed(lost)}: it"
            f" takes their names for those of the fused experts of a {kind} model{why}; load the"
            " files with fused_lora.load_adapter, or leave these layers out with exclude_modules",
        )


def _lost(model: nn.Module, config: Mapping, tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers whose adapters PEFT's conversion drops or moves.

    Raises:
        ImportError: PEFT is not installed, or converts nothing.
        ValueError: PEFT refuses the file.
    """
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = LoraConfig(**config)
        conversion.convert_peft_config_for_transformers(converted, model=model, conversions=None)
        kept = conversion.convert_peft_adapter_state_dict_for_transformers(
            model, converted, dict(tensors)
        )
    targets = {"target_modules": converted.target_modules}
    on_parameters = {p for p, x in plain_names(model) if isinstance(x, LoRAParameter)}
    moved = {peft_format.split_key(key)[0] for key in tensors.keys() - kept.keys()}
    return [
        place
        for place in _places(tensors)
        if place in moved
        or not (place in on_parameters or peft_format.names_target(targets, place))
    ]


def _places(tensors: Mapping[str, Tensor]) -> list[str]:
    split = map(peft_format.split_key, tensors)
    return list(dict.fromkeys(found[0] for found in split if found is not None))
