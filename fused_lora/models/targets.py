"""Which modules of a model get an adapter, and which class adapts each."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn

from ..layers.base import LoRALayer
from ..layers.beside import LoRABeside, computes_itself, shape_of
from ..layers.config import AdapterConfig
from ..layers.conv import LoRAConv2d
from ..layers.embedding import LoRAEmbedding
from ..layers.linear import FusedLoRAConv1D, FusedLoRALinear
from ..layers.parameter import LoRAParameter, ParameterTarget
from ..layers.wrapping import BASE
from ..ops.validation import listed
from .arguments import described
from .bypass import Bypass, bypassed, warn_of_readers
from .warn import warn

ALL_LINEAR = "all-linear"
_NEAR_NAMES = 6  # suggested when nothing matched
_SMALLEST_SCALE = 2.0**-150  # half of float32's smallest number, which the layers' scale rounds to
_CLASSES = {nn.Linear: FusedLoRALinear, nn.Embedding: LoRAEmbedding, nn.Conv2d: LoRAConv2d}


def layer_class(module: nn.Module | ParameterTarget) -> type[LoRALayer] | None:
    """The class that adapts ``module``, or None."""
    if isinstance(module, ParameterTarget):
        return LoRAParameter
    cls = FusedLoRAConv1D if is_conv1d(module) else _CLASSES.get(type(module))
    if cls in (FusedLoRALinear, FusedLoRAConv1D):
        return LoRABeside if computes_itself(module) else cls
    if cls is None and _is_special_linear(module):
        return LoRABeside
    return cls


def _is_special_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of another class, such as a quantised one."""
    if isinstance(module, nn.Linear):
        return not isinstance(module, LoRALayer)
    # Many quantised layers derive from nn.Module: they have a linear layer's sizes and no children.
    return not module._modules and shape_of(module) is not None


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``; works without transformers installed."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def find_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None,
    include_head: bool,
    trained: Collection[nn.Module] = (),
    heads: Collection[nn.Module] = (),
    missing_ok: bool = False,
) -> dict[str, nn.Module]:
    """The modules to adapt, by their first name; see :func:`fused_lora.apply_lora`.

    Args:
        trained: the modules in ``modules_to_save`` and their parts, which get no adapter.
        heads: heads without a base in any file and their parts, which "all-linear" leaves out.
        missing_ok: whether there may be none, since Parameters are adapted.

    Raises:
        TypeError: a target of a class that cannot be adapted.
        ValueError: no match, an invalid pattern, or a layer that another module bypasses.
    """
    excluded = excluder(exclude_modules)
    _warn_of_unmatched(model, "exclude_modules", exclude_modules)
    readers = bypassed(model)
    if target_modules == ALL_LINEAR:
        return _all_linear(model, excluded, include_head, readers, {*trained, *heads}, missing_ok)
    if not target_modules and missing_ok:
        return {}
    wanted = matcher(target_modules)
    _warn_of_unmatched(model, "target_modules", target_modules)
    found = {n: m for n, m in model.named_modules() if n and wanted(n) and not excluded(n)}
    if found and all(module in trained for module in found.values()):
        raise ValueError(
            f"expected target_modules to match a module that modules_to_save does not train whole,"
            f" got {target_modules!r}: a module trains one way or the other"
        )
    found = {name: module for name, module in found.items() if module not in trained}
    for name, module in found.items():
        if id(module) in readers and readers[id(module)].refused:
            raise ValueError(
                f"expected layers that are called, got {name}: {readers[id(module)].reason}, so an"
                " adapter there would have no effect: leave it out with exclude_modules"
            )
        if layer_class(module) is None:
            inside = {n.rpartition(".")[2] for n, m in module.named_modules() if layer_class(m)}
            hint = f"; name layers inside it: {listed(sorted(inside))}" if inside else ""
            raise TypeError(
                f"expected targets to be Linear, Conv1D, Embedding or Conv2d, got {name}:"
                f" {type(module).__name__}{hint}"
            )
    if not found:
        if any(wanted(name) for name, _ in model.named_modules() if name):
            raise ValueError(
                f"expected a module to adapt, got exclude_modules {exclude_modules!r}, which leaves"
                f" out all that target_modules {target_modules!r} names"
            )
        raise ValueError(_no_match(model, target_modules))
    warn_of_readers(found, readers)
    return found


def _all_linear(
    model: nn.Module,
    excluded,
    include_head: bool,
    readers: Mapping[int, Bypass],
    silent: set[nn.Module],
    missing_ok: bool,
) -> dict[str, nn.Module]:
    head = None
    if not include_head and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    left_out: dict[str, list[str]] = {}  # names by reason
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if not name or not linear or excluded(name) or module is head or module in silent:
            continue
        if id(module) in readers and readers[id(module)].refused:
            left_out.setdefault(readers[id(module)].reason, []).append(name)
        else:
            found[name] = module
    if left_out:
        parts = ", ".join(f"{listed(names)} ({reason})" for reason, names in left_out.items())
        warn(f"no adapter for {parts}; name them in exclude_modules to silence this warning")
    if not found and not missing_ok:
        raise ValueError(_no_linear(model))
    warn_of_readers(found, readers)
    return found


def _no_linear(model: nn.Module) -> str:
    layers = {n: layer_class(m) for n, m in model.named_modules() if n}
    message = "expected a model with Linear or Conv1D layers to adapt, found none"
    if any(kind and issubclass(kind, nn.Linear) for kind in layers.values()):
        return f"{message} besides those left out: see exclude_modules and include_head"
    others = [name for name, kind in layers.items() if kind is not None]
    if others:
        return f"{message}; target_modules may name its other layers: {listed(others)}"
    return f"{message}, nor another layer that can be adapted, in a {type(model).__name__}"


def excluder(exclude_modules: str | Iterable[str] | None):
    """A predicate on names: whether ``exclude_modules`` has them."""
    return (lambda name: False) if exclude_modules is None else matcher(exclude_modules)


def matcher(target: str | Iterable[str]):
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
    if argument == "exclude_modules":  # which may name a Parameter too
        names += [name for name, _ in model.named_parameters()]
    idle = [
        part
        for part in parts
        if not any(map(matcher(part if isinstance(target, str) else [part]), names))
    ]
    if idle and (argument != "target_modules" or len(idle) < len(parts)):
        near = difflib.get_close_matches(idle[0], {n.rpartition(".")[2] for n in names})
        hint = f"; similar: {', '.join(near)}" if near else ""
        warn(f"{argument} has {', '.join(map(repr, idle))}, which names no module{hint}")


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
    shown = list(dict.fromkeys(near or sorted(endings)))[:_NEAR_NAMES]
    message = f"expected target_modules to match a module, got {target!r}"
    if isinstance(target, str):
        message += ", a regular expression that no name matches in full"
        if target in endings:
            message += f" (as a name it belongs in a list: [{target!r}])"
    if not shown:
        return message + "; nothing in this model can be adapted"
    return f"{message}; {'similar names' if near else 'available names'}: {', '.join(shown)}"


def pattern_name(place: str, module: nn.Module | ParameterTarget) -> str:
    """The name that ``rank_pattern`` matches: a layer's, or that of a Parameter, as in PEFT."""
    if not isinstance(module, ParameterTarget | LoRAParameter):
        return place
    while place.endswith(f".{BASE}"):
        place = place.removesuffix(f".{BASE}")
    return f"{place}.{module.parameter_name}"


def adapter_configs(
    found: Mapping[str, nn.Module | ParameterTarget],
    config: AdapterConfig,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    doubled: Collection[str] = (),
) -> dict[str, AdapterConfig]:
    """The configuration per layer name: ``config``, with rank and alpha from the patterns.

    Args:
        doubled: the names of layers whose rank and alpha are twice those of ``config``.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, a key that is not a
            regular expression, or one that matches no name.
    """
    names = {place: pattern_name(place, module) for place, module in found.items()}
    _check_pattern("rank_pattern", rank_pattern, names.values())
    _check_pattern("alpha_pattern", alpha_pattern, names.values())
    factors = {place: 2 if place in doubled else 1 for place in found}
    return {
        place: replace(
            config,
            rank=pattern_value(rank_pattern, [name], factors[place] * config.rank),
            alpha=pattern_value(alpha_pattern, [name], factors[place] * config.alpha),
        )
        for place, name in names.items()
    }


def warn_of_zero_scales(scales: Mapping[str, float]) -> None:
    """Warn of new adapters that add nothing and do not train: their ``alpha`` is zero."""
    if idle := [name for name, scale in scales.items() if abs(scale) <= _SMALLEST_SCALE]:
        warn(
            f"alpha gives a scale of 0 at {listed(idle)}: there the adapter adds"
            " nothing, and its gradients are 0, until the layer's scaling is set",
        )


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


def pattern_value(
    pattern: Mapping[str, float] | None, names: Iterable[str], default: float
) -> float:
    """The value of the first key that matches the first of ``names`` that any key matches.

    See :func:`compile_pattern`.
    """
    for name in names:
        for key, value in (pattern or {}).items():
            if compile_pattern(key).match(name):
                return value
    return default


def _check_pattern(
    argument: str, pattern: Mapping[str, float] | None, names: Collection[str]
) -> None:
    if not isinstance(pattern, Mapping | None):
        raise TypeError(
            f"expected {argument} to be a dict of patterns and numbers, got {described(pattern)}"
        )
    for key in pattern or {}:
        if not isinstance(key, str):
            raise TypeError(f"expected {argument}'s keys to be str, got {described(key)}")
        try:
            matches = compile_pattern(key).match
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
        if not any(matches(name) for name in names):
            raise ValueError(f"expected {argument}'s {key!r} to match an adapted module, none does")
