"""PEFT's adapter format: tensor names and ``adapter_config.json``, as in PEFT 0.17 to 0.21.

No setting is ignored that could change what an adapter computes. A key of ``adapter_config.json``
with a truthy value is one of these:

* read, or without meaning for a trained adapter (``_READ``, ``_IGNORED``);
* a setting of PEFT's training that leaves the adapter's outputs alone (``_TRAINING``): a warning;
* a setting that changes the outputs (``_CHANGING``): an error;
* unknown, from a newer PEFT: an error, except where the installed PEFT has this value as the
  default of a plain LoRA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from ..layers.base import LoRALayer
from ..layers.config import Adapter, AdapterConfig
from ..layers.embedding import LoRAEmbedding
from ..layers.linear import FusedLoRAConv1D
from ..layers.parameter import LoRAParameter
from ..models.targets import compile_pattern, pattern_name, pattern_value
from ..models.warn import warn
from ..models.wrappers import WRAPPED

PREFIX = "base_model.model."
# The adapter's name is in the key if the tensors are a raw ``state_dict()`` of PEFT's model. Older
# PEFT versions end the magnitudes' key in ".weight".
_KEY = re.compile(
    r"(?P<place>.+)\.(?:"
    r"lora_(?P<factor>[AB])(?:\.(?P<name>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedded>[AB])(?:\.(?P<embedding_name>[^.]+))?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.(?!weight$)(?P<dora_name>[^.]+))?(?:\.weight)?)"
)
# Data-parallel wrappers add "module" at the beginning, the others a part anywhere.
_WRAPPERS = rf"(?:(?:{'|'.join(WRAPPED)})\.)*"
_BEFORE = re.compile(rf"(?:module\.)*{_WRAPPERS}base_model\.{_WRAPPERS}model\.")
_BUFFERS = re.compile(r".+\.lora_velora_embed(\.[^.]+)?")  # VeLoRA's, for its backward pass
# Keys that do not change what a loaded adapter computes: about the base model, which layers are
# targets (the tensors' names say so), how the adapter was initialised.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
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
    "ensure_weight_tying",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_dora",
    "use_rslora",
}
# Settings of training in PEFT that leave the adapter's outputs alone.
_TRAINING = {
    "megatron_config": "Megatron's parallel layers",
    "velora_config": "VeLoRA's compressed activations",
}
# Settings that change the outputs, each with what it does.
_CHANGING = {
    "alora_invocation_tokens": "the adapter acts after certain tokens only (aLoRA)",
    "arrow_config": "a router mixes several adapters",
    "kasa_config": "a diagonal between the factors, and another base weight (KaSA)",
    "layer_replication": "the model has more layers than its base",
    "lora_bias": "lora_B has a bias",
    "monteclora_config": "the adapter's weights are sampled (MonteCLoRA)",
    "trainable_token_indices": "rows of the embedding are trained",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "use_qalora": "the adapter's input is pooled (QALoRA)",
}
# Those of variants that PEFT takes for set, with their defaults, if they are empty.
_VARIANTS = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora"}
# Initialisations that leave the base weights unchanged. The others change them, and the files hold
# no base weights. Of those only PiSSA is supported: loading computes its base weights again.
_BASE_KEPT = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# PEFT's EMBEDDING_LAYER_NAMES: with ensure_weight_tying, what is tied to one of these stays tied.
_EMBEDDINGS = ("embed_tokens", "lm_head")
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


def split_key(key: str) -> tuple[str, str, str | None] | None:
    """What one of PEFT's keys names: the layer, the parameter and perhaps the adapter's name.

    None for keys of other tensors.
    """
    match = _KEY.fullmatch(without_prefix(key) or "")
    if match is None:
        return None
    found = match.groupdict()
    factor = found["factor"] or found["embedded"]
    name = found["name"] or found["embedding_name"] or found["dora_name"]
    return found["place"], f"lora_{factor}" if factor else found["magnitude"], name


def without_prefix(key: str) -> str | None:
    """A key without PEFT's prefix, which wrappers' names may interrupt; None if it has none."""
    match = _BEFORE.match(key)
    return None if match is None else key[match.end() :]


def is_training_buffer(key: str) -> bool:
    """Whether a tensor serves PEFT's backward pass alone."""
    return _BUFFERS.fullmatch(key) is not None


def make_config(
    layers: Mapping[str, LoRALayer],
    adapters: Mapping[str, Adapter],
    module_names: Iterable[str],
    base_model: Mapping,
    modules_to_save: list[str] | None = None,
    tied: bool = False,
    parameters: list[str] | None = None,
) -> dict:
    """The contents of ``adapter_config.json`` for the ``adapters`` of ``layers``.

    Args:
        module_names: every module of the model, so that ``target_modules`` names no others.
        base_model: the keys that describe the base model, from :func:`.base_model.describe`.
        modules_to_save: as :func:`.modules_to_save.shortest_entries` returns it.
        tied: whether those modules share Parameters.
        parameters: as :func:`.parameters.target_parameters` returns it.

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
    names = {name: pattern_name(name, layers[name]) for name in adapters}
    ranks = {names[name]: config.rank for name, config in configs.items()}
    alphas = {names[name]: _alpha(adapter, use_rslora) for name, adapter in adapters.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    dropout, _ = _common({name: config.dropout for name, config in configs.items()})
    tie = {"ensure_weight_tying": True} if tied and _names_embedding(modules_to_save) else {}
    return tie | {
        **base_model,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, FusedLoRAConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True if first.init == "default" else first.init,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(
            [n for n, x in layers.items() if not isinstance(x, LoRAParameter)], module_names
        ),
        "target_parameters": parameters or None,
        "use_dora": first.use_dora,
        "use_rslora": use_rslora,
    }


def _alpha(adapter: Adapter, use_rslora: bool) -> float:
    """The alpha that yields the adapter's scale, which users may have changed since."""
    config = adapter.config
    if config.use_rslora == use_rslora and config.scaling == adapter.scaling:
        alpha = config.alpha
    else:
        divisor = math.sqrt(config.rank) if use_rslora else config.rank
        alpha = adapter.scaling * divisor
        # The product is rounded: its quotient may be another, and a neighbour's the right one.
        near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
        alpha = next((number for number in near if number / divisor == adapter.scaling), alpha)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the others keyed by patterns that match one name each."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(n)}": value for n, value in values.items() if value != common}


def _target_modules(adapted: list[str], module_names: Iterable[str]) -> list[str] | str:
    """The shortest name endings that select exactly the adapted modules; else a regex."""
    found = shortest_endings(adapted, module_names)
    return "|".join(re.escape(name) for name in adapted) if found is None else found


def shortest_endings(wanted: Iterable[str], names: Iterable[str]) -> list[str] | None:
    """The shortest name endings that select exactly ``wanted`` of ``names``.

    None if there are none, as for "0" next to an unwanted "1.0".
    """
    wanted = list(wanted)
    others = set(names).difference(wanted)
    taken = {ending for name in others for ending in endings(name)}
    found = {next((e for e in endings(name) if e not in taken), None) for name in wanted}
    return None if None in found else sorted(found)


def _names_embedding(entries: Iterable[str]) -> bool:
    return any(entry.rpartition(".")[2] in _EMBEDDINGS for entry in entries)


def endings(name: str) -> list[str]:
    """A name and its ends after a dot, the shortest first."""
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
    for key in ("modules_to_save", "target_parameters"):
        if names := config.get(key):
            meaning[key] = sorted(names)
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
    _check_keys(config)
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
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(n, str) and n for n in parameters):
        raise ValueError(f"expected target_parameters as a list of names, got {parameters!r}")
    if parameters and config.get("target_modules") is None:
        config["target_modules"] = []
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        raise ValueError(f"expected target_modules as names or a pattern, got {targets!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ValueError(f"expected modules_to_save as a list of names or null, got {saved!r}")
    if config.get("ensure_weight_tying") and not _names_embedding(saved):
        if isinstance(targets, str) or _names_embedding(targets):
            raise ValueError(
                f"ensure_weight_tying = True is not supported for target_modules = {targets!r}:"
                " adapters of tied layers cannot be shared"
            )
        config["ensure_weight_tying"] = False  # as in PEFT, which then ties nothing
    return config


def _check_keys(config: Mapping) -> None:
    for key, value in config.items():
        unset = value is None if key in _VARIANTS else not value
        if unset or key in _IGNORED or key in _READ or _is_default(key, value):
            continue
        if key in _TRAINING:
            warn(
                f"{key} is not used ({_TRAINING[key]}): it matters in PEFT's training"
                " only, the adapter's outputs are the same",
            )
            continue
        why = _CHANGING.get(key, "unknown here, it may change what the adapter computes")
        raise ValueError(
            f"{key} = {value!r} is not supported by fused_lora ({why}): load the adapter in PEFT,"
            " where patch_peft(model) runs the layers fused that it can"
            + ("" if key in _CHANGING else "; if the key changes nothing, delete it from the file")
        )


def _is_default(key: str, value) -> bool:
    """Whether a key unknown here has the value of a plain LoRA in the installed PEFT."""
    if key in _TRAINING or key in _CHANGING:
        return False
    try:
        from peft import LoraConfig
    except ImportError:
        return False
    field = {field.name: field for field in dataclasses.fields(LoraConfig)}.get(key)
    return field is not None and value == field.default


def _check_numbers(config: Mapping) -> None:
    def check(key: str, value, kind) -> None:
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "an integer" if kind is Integral else "a number"
            whole = isinstance(value, float) and value.is_integer()
            raise ValueError(
                f"expected {key} to be {what}, got {value!r} ({type(value).__name__})"
                + (f": PEFT refuses it too; write {int(value)}" if whole else "")
            )
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


def layer_config(config: Mapping, names: Iterable[str]) -> AdapterConfig:
    """The configuration of a layer according to a checked ``adapter_config.json``.

    Args:
        names: the layer's; for patterns an earlier one counts first.

    Raises:
        ValueError: a value out of range.
    """
    return AdapterConfig(
        pattern_value(config.get("rank_pattern"), names, config.get("r", 8)),
        pattern_value(config.get("alpha_pattern"), names, config.get("lora_alpha", 8)),
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
    return any(ending in targets for ending in endings(name))
