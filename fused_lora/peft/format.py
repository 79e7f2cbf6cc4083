"""PEFT's adapter format: tensor names and ``adapter_config.json``, as in PEFT 0.21.

Settings that this library does not support raise an error; they are never ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from ..layers.base import LoRALayer
from ..layers.config import Adapter, AdapterConfig
from ..layers.embedding import LoRAEmbedding
from ..layers.linear import FusedLoRAConv1D
from ..models.targets import compile_pattern, pattern_value

PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",  # in older PEFT versions
}
# Keys that do not change what a loaded adapter computes. Any other truthy key is an error.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
# Initialisations that leave the base weights unchanged. The others change them, and the files hold
# no base weights. Of those only PiSSA is supported: loading computes its base weights again.
_BASE_KEPT = (True, False, None, "gaussian", "orthogonal", "eva")
# Limits on patterns: backtracking on a hostile regex can take exponential time.
_MOST_CHOICES = 4  # groups and repeats in one pattern
_MOST_CHARACTERS = 500
_MOST_PATTERNS = 10_000


def tensor_key(name: str, layer: LoRALayer, parameter: str) -> str:
    """PEFT's key of a parameter of the layer ``name``."""
    if parameter == "lora_magnitude_vector":
        return f"{PREFIX}{name}.{parameter}"
    if isinstance(layer, LoRAEmbedding):
        return f"{PREFIX}{name}.{parameter.replace('lora_', 'lora_embedding_')}"
    return f"{PREFIX}{name}.{parameter}.weight"


def split_key(key: str) -> tuple[str, str] | None:
    """The layer's name and the parameter that one of PEFT's keys names; None for other keys."""
    if key.startswith(PREFIX):
        for suffix, parameter in _SUFFIXES.items():
            if key.endswith(f".{suffix}"):
                return key[len(PREFIX) : -len(suffix) - 1], parameter
    return None


def make_config(
    layers: Mapping[str, LoRALayer],
    adapters: Mapping[str, Adapter],
    module_names: Iterable[str],
    base_model: str | None,
) -> dict:
    """The contents of ``adapter_config.json`` for the ``adapters`` of ``layers``.

    Args:
        module_names: every module of the model, so that ``target_modules`` names no others.
        base_model: the name or path of the base model, if known.

    Raises:
        ValueError: PEFT's format cannot express the adapters' differences.
    """
    configs = {name: adapter.config for name, adapter in adapters.items()}
    for field in ("use_dora", "init"):
        if len({getattr(config, field) for config in configs.values()}) > 1:
            raise ValueError(
                f"expected one {field} for all layers, as PEFT's format has, got several"
            )
    first = next(iter(configs.values()))
    use_rslora = all(config.use_rslora for config in configs.values())
    ranks = {name: config.rank for name, config in configs.items()}
    alphas = {name: _alpha(adapter, use_rslora) for name, adapter in adapters.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    dropout, _ = _common({name: config.dropout for name, config in configs.items()})
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, FusedLoRAConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True if first.init == "default" else first.init,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(list(layers), module_names),
        "task_type": None,
        "use_dora": first.use_dora,
        "use_rslora": use_rslora,
    }


def _alpha(adapter: Adapter, use_rslora: bool) -> float:
    """The alpha that yields the adapter's scale, which users may have changed since."""
    config = adapter.config
    if config.use_rslora == use_rslora and config.scaling == adapter.scaling:
        alpha = config.alpha
    else:
        alpha = adapter.scaling * (config.rank**0.5 if use_rslora else config.rank)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the others keyed by patterns that match one name each."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(n)}": value for n, value in values.items() if value != common}


def _target_modules(adapted: list[str], module_names: Iterable[str]) -> list[str] | str:
    """The shortest name endings that select exactly the adapted modules; else a regex."""
    chosen, wanted = set(), set(adapted)
    others = [name for name in module_names if name not in wanted]
    taken = {ending for name in others for ending in _endings(name)}
    for name in adapted:
        ending = next((ending for ending in _endings(name) if ending not in taken), None)
        if ending is None:  # as for "0" next to an unadapted "1.0"
            return "|".join(re.escape(name) for name in adapted)
        chosen.add(ending)
    return sorted(chosen)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def digest(config: Mapping) -> str:
    """SHA-256 of the settings that determine what the tensors mean; other keys may change."""
    targets = config.get("target_modules")
    meaning = {
        "alpha_pattern": {k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": config.get("init_lora_weights", True),
        "lora_alpha": float(config.get("lora_alpha", 8)),
        "r": config.get("r", 8),
        "rank_pattern": config.get("rank_pattern") or {},
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "use_dora": config.get("use_dora", False),
        "use_rslora": config.get("use_rslora", False),
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def parse_config(text: str) -> dict:
    """Parse ``adapter_config.json``; check that this library computes such a LoRA as PEFT does.

    Raises:
        ValueError: it does not, or the text is damaged; names the key.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got something else: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, got a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"expected peft_type 'LORA', got {config.get('peft_type')!r}")
    for key, value in config.items():
        if value and key not in _IGNORED and key not in _READ:
            raise ValueError(f"{key} = {value!r} is not supported by fused_lora")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"expected bias 'none', got {config['bias']!r}: trained biases are not supported"
        )
    init = config.get("init_lora_weights", True)
    if init != "pissa" and init not in _BASE_KEPT:
        raise ValueError(
            f"init_lora_weights = {init!r} changes the base weights; save it from PEFT with"
            " path_initial_model_for_weight_conversion, which converts it to a plain LoRA"
        )
    _check_numbers(config)
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        raise ValueError(f"expected target_modules as names or a pattern, got {targets!r}")
    return config


def _check_numbers(config: Mapping) -> None:
    def check(key: str, value, kind) -> None:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"expected {key} to be a number, got {value!r}")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"expected {key} to be a finite number, got NaN or one too large")

    check("r", config.get("r", 8), Integral)
    check("lora_alpha", config.get("lora_alpha", 8), Real)
    check("lora_dropout", config.get("lora_dropout", 0.0), Real)
    for key, kind in (("rank_pattern", Integral), ("alpha_pattern", Real)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"expected {key} to be an object, got {pattern!r}")
        if len(pattern) > _MOST_PATTERNS:
            raise ValueError(f"expected at most {_MOST_PATTERNS} patterns in {key}")
        for name, value in pattern.items():
            check(f"{key}[{name!r}]", value, kind)
            _check_pattern(key, name)
    for key in ("use_dora", "use_rslora"):
        if config.get(key, False) not in (True, False, None):
            raise ValueError(f"expected {key} to be true or false, got {config[key]!r}")


def _check_pattern(key: str, pattern: str) -> None:
    """Check that a pattern is valid and cheap to match: short, few groups, no repeated group."""
    choices = len(re.findall(r"[*+{?(]", pattern.replace("(?:", "(")))
    if choices > _MOST_CHOICES or len(pattern) > _MOST_CHARACTERS or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"expected patterns in {key} of at most {_MOST_CHARACTERS} characters and"
            f" {_MOST_CHOICES} groups and repeats, no group repeated, got {pattern[:80]!r}"
        )
    try:
        compile_pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def layer_config(config: Mapping, name: str) -> AdapterConfig:
    """The configuration of the layer ``name`` according to a checked ``adapter_config.json``.

    Raises:
        ValueError: a value out of range.
    """
    return AdapterConfig(
        pattern_value(config.get("rank_pattern"), name, config.get("r", 8)),
        pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)),
        config.get("lora_dropout", 0.0),
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        "pissa" if config.get("init_lora_weights") == "pissa" else "default",
    )


def names_target(config: Mapping, name: str) -> bool:
    """Whether a list of targets names the layer ``name``; a regex is not checked."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        return True
    return any(ending in targets for ending in _endings(name))
