"""Which modules of a model get an adapter, and which class adapts each."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn

from ..layers.base import LoRALayer
from ..layers.config import AdapterConfig
from ..layers.conv import LoRAConv2d
from ..layers.embedding import LoRAEmbedding
from ..layers.linear import FusedLoRAConv1D, FusedLoRALinear

ALL_LINEAR = "all-linear"
_NEAR_NAMES = 6  # suggested when nothing matched
_CLASSES = {nn.Linear: FusedLoRALinear, nn.Embedding: LoRAEmbedding, nn.Conv2d: LoRAConv2d}


def layer_class(module: nn.Module) -> type[LoRALayer] | None:
    """The class that adapts ``module``, or None."""
    return FusedLoRAConv1D if is_conv1d(module) else _CLASSES.get(type(module))


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``; works without transformers installed."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def find_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None,
    include_head: bool,
) -> dict[str, nn.Module]:
    """The modules to adapt, by their first name; see :func:`fused_lora.apply_lora`.

    Raises:
        TypeError: a target of a class that cannot be adapted.
        ValueError: no match, an invalid pattern, or a projection of ``nn.MultiheadAttention``.
    """
    excluded = (lambda name: False) if exclude_modules is None else _matcher(exclude_modules)
    _warn_of_unmatched(model, "exclude_modules", exclude_modules)
    # These projections are never called: attention passes their weights to a function.
    attention = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    if target_modules == ALL_LINEAR:
        return _all_linear(model, excluded, include_head, attention)
    wanted = _matcher(target_modules)
    _warn_of_unmatched(model, "target_modules", target_modules)
    found = {n: m for n, m in model.named_modules() if n and wanted(n) and not excluded(n)}
    for name, module in found.items():
        if id(module) in attention:
            raise ValueError(
                f"{name} is part of nn.MultiheadAttention, which reads its weights without calling"
                " it, so an adapter there would have no effect: leave it out with exclude_modules"
            )
        if layer_class(module) is None:
            raise TypeError(
                f"expected targets to be Linear, Conv1D, Embedding or Conv2d, got {name}:"
                f" {type(module).__name__}"
            )
    if not found:
        raise ValueError(_no_match(model, target_modules))
    return found


def _all_linear(model, excluded, include_head: bool, attention: set[int]) -> dict[str, nn.Module]:
    head = None
    if not include_head and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    found, left_out = {}, []
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or layer_class(module) is FusedLoRAConv1D
        if not name or not linear or excluded(name) or module is head:
            continue
        if id(module) in attention:
            left_out.append(f"{name} (nn.MultiheadAttention does not call it)")
        elif layer_class(module) is None:
            left_out.append(f"{name} (a {type(module).__name__}: not exactly nn.Linear)")
        else:
            found[name] = module
    if left_out:
        warnings.warn(
            f"fused_lora: no adapter for {', '.join(left_out)}; name them in exclude_modules to"
            " silence this warning",
            stacklevel=4,
        )
    if not found:
        raise ValueError("expected a model with Linear or Conv1D layers to adapt, found none")
    return found


def _matcher(target: str | Iterable[str]):
    """A predicate on names: a regex that matches all, or a list of names and of their suffixes.

    A suffix starts after a dot: "proj" matches "attn.proj", not "q_proj".
    """
    if isinstance(target, str):
        try:
            return re.compile(target).fullmatch
        except re.error as error:
            raise ValueError(f"expected a regular expression, got {target!r}: {error}") from error
    suffixes = tuple(target)
    if not all(isinstance(suffix, str) and suffix for suffix in suffixes):
        raise TypeError(f"expected names of modules as str, got {suffixes!r}")
    return lambda name: any(name == s or name.endswith(f".{s}") for s in suffixes)


def _warn_of_unmatched(model: nn.Module, argument: str, target: str | Iterable[str] | None) -> None:
    """Warn of the parts of ``argument`` that match no module.

    Targets of which none matches are an error instead, in :func:`find_targets`.
    """
    parts = [target] if isinstance(target, str) else list(target or ())
    names = [name for name, _ in model.named_modules() if name]
    idle = [
        part
        for part in parts
        if not any(map(_matcher(part if isinstance(target, str) else [part]), names))
    ]
    if idle and (argument != "target_modules" or len(idle) < len(parts)):
        near = difflib.get_close_matches(idle[0], {n.rpartition(".")[2] for n in names})
        hint = f"; similar: {', '.join(near)}" if near else ""
        warnings.warn(
            f"fused_lora: {argument} has {', '.join(map(repr, idle))}, which names no module{hint}",
            stacklevel=4,
        )


def _no_match(model: nn.Module, target: str | Iterable[str]) -> str:
    wanted = [target] if isinstance(target, str) else list(target)
    names = [n for n, m in model.named_modules() if n and layer_class(m) is not None]
    endings = {name.rpartition(".")[2] for name in names}
    near = [
        match
        for want in wanted
        for pool in (sorted(endings), names)
        for match in difflib.get_close_matches(want, pool, n=_NEAR_NAMES)
    ]
    listed = list(dict.fromkeys(near or sorted(endings)))[:_NEAR_NAMES]
    message = f"expected target_modules to match a module, got {target!r}"
    if isinstance(target, str):
        message += ", a regular expression that no name matches in full"
    if not listed:
        return message + "; nothing in this model can be adapted"
    return f"{message}; {'similar names' if near else 'available names'}: {', '.join(listed)}"


def adapter_configs(
    names: Collection[str],
    config: AdapterConfig,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
) -> dict[str, AdapterConfig]:
    """The configuration per layer name: ``config``, with rank and alpha from the patterns.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, a key that is not a
            regular expression, or one that matches no name.
    """
    _check_pattern("rank_pattern", rank_pattern, names)
    _check_pattern("alpha_pattern", alpha_pattern, names)
    return {
        name: replace(
            config,
            rank=pattern_value(rank_pattern, name, config.rank),
            alpha=pattern_value(alpha_pattern, name, config.alpha),
        )
        for name in names
    }


@functools.lru_cache(maxsize=1 << 14)  # a file may have one key per layer
def compile_pattern(key: str) -> re.Pattern:
    """A key of ``rank_pattern`` or ``alpha_pattern``; matches a name, or its end after a dot.

    Raises:
        ValueError: not a regular expression.
    """
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a regular expression, got {key!r}: {error}") from error


def pattern_value(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first key that matches ``name``; see :func:`compile_pattern`."""
    for key, value in (pattern or {}).items():
        if compile_pattern(key).match(name):
            return value
    return default


def _check_pattern(
    argument: str, pattern: Mapping[str, float] | None, names: Collection[str]
) -> None:
    for key in pattern or {}:
        try:
            matches = compile_pattern(key).match
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
        if not any(matches(name) for name in names):
            raise ValueError(f"expected {argument}'s {key!r} to match an adapted module, none does")
