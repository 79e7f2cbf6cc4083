"""Named adapters of one base model: add, switch, delete, combine.

Every adapter covers all adapted layers of the model. The active one is in the layers' Parameters;
each layer keeps the others in ``inactive_adapters``, outside ``parameters()`` and ``state_dict()``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from ..distributed.sharding import check_replaceable, check_whole
from ..layers.base import LoRALayer
from ..layers.config import Adapter, AdapterConfig, check_rank
from .parameters import adapted_layers, check_kept, lora_layers
from .targets import adapter_configs, warn_of_zero_scales
from .trained_modules import (
    add_copies,
    check_copies,
    delete_copies,
    switch_copies,
    trained_modules,
)
from .warn import warn

COMBINATIONS = ("cat", "svd")
_MAX = sys.float_info.max  # an int may be too large for math.isfinite


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, the active one first.

    Raises:
        ValueError: the model has no adapters, or its layers have different ones.
    """
    return _names(adapted_layers(model))


def _names(layers: Mapping[str, LoRALayer]) -> list[str]:
    names = {name: [x.adapter_name, *x.inactive_adapters] for name, x in layers.items()}
    first, expected = next(iter(names.items()))
    for name, found in names.items():
        if found[0] != expected[0] or set(found) != set(expected):
            raise ValueError(
                f"expected the same adapters in every layer, got {', '.join(expected)} at {first}"
                f" and {', '.join(found)} at {name}"
            )
    return expected


def add_adapter(
    model: nn.Module,
    name: str,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
) -> None:
    """Add an inactive adapter to every adapted layer; :func:`set_adapter` makes it active.

    It also has a copy of each module in ``modules_to_save``, with the original values.

    Args:
        name: the new adapter's name.
        rank, alpha, dropout, rank_pattern, alpha_pattern, use_rslora, use_dora, init: as for
            :func:`fused_lora.apply_lora`.

    Raises:
        RuntimeError: a layer is merged.
        TypeError, ValueError: an argument of the wrong type or out of range, a name in use, PiSSA
            (which changes the base weight), or a model that has no adapters or is sharded.
    """
    layers = lora_layers(model)
    check_new_name(layers, name)
    check_whole(model, "add adapters")
    check_copies(model, "add adapters", offloaded_ok=True)
    config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
    configs = adapter_configs(layers, config, rank_pattern, alpha_pattern)
    new = {}  # complete before a layer changes: an error leaves the model as it was
    for place, layer in layers.items():
        check_sharing(place, layer, configs[place])
        try:
            new[place] = layer.new_adapter(configs[place])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    _add(model, name, layers, new)
    warn_of_zero_scales({place: adapter.scaling for place, adapter in new.items()})


def _add(
    model: nn.Module,
    name: str,
    layers: Mapping[str, LoRALayer],
    new: Mapping[str, Adapter],
    source: str | None = None,
) -> None:
    """Keep a complete adapter aside; ``source`` as for ``add_copies``. All or nothing."""
    try:
        add_copies(model, name, source)
    except BaseException:
        delete_copies(model, name)
        raise
    for place, layer in layers.items():
        layer.inactive_adapters[name] = new[place]


def set_adapter(model: nn.Module, name: str) -> list[str]:
    """Make the adapter ``name`` active; the one that was active becomes inactive.

    Where shapes match, values are written into the same Parameters, so optimizers that hold them
    stay valid (but keep the moments of the previous adapter). Other layers get new Parameters, and
    a warning reports it. After :func:`fused_lora.adapter_parameters` each adapter has Parameters of
    its own, which change places instead.

    Returns:
        The names of the layers whose Parameters are new.

    Raises:
        RuntimeError: a layer is merged, a parametrization computes a tensor of its adapter, or a
            module in ``modules_to_save`` was replaced.
        ValueError: the model has no adapters or none of that name, or the adapter has other shapes
            and the model is sharded or wrapped in ``DistributedDataParallel``.
    """
    layers = lora_layers(model)
    known = _names(layers)
    check_unmerged(layers)
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    if name == known[0]:
        return []
    own = any(layer.trains_inactive for layer in layers.values())
    if own:
        check_replaceable(model, "switch between adapters with Parameters of their own")
        for layer in layers.values():
            layer.train_inactive()
    previous = {}  # of every layer before one changes: an error leaves the model as it was
    for place, layer in layers.items():
        try:
            stashed = layer.stash_adapter()  # checks the layer
            previous[place] = layer.active_adapter() if own else stashed
        except (RuntimeError, ValueError) as error:
            if type(error) not in (RuntimeError, ValueError):
                raise  # such as out of memory
            raise type(error)(f"{place}: {error}") from error
    # Other shapes need new Parameters, which data-parallel wrappers would not reduce or shard.
    if not all(layer.fits(layer.inactive_adapters[name]) for layer in layers.values()):
        check_replaceable(model, "switch to an adapter of other shapes")
    check_kept(model)
    switch_copies(model, known[0], name)
    replaced = []
    for place, layer in layers.items():
        if own:
            layer.exchange_adapter(layer.inactive_adapters[name])
        elif not layer.activate_adapter(layer.inactive_adapters[name]):
            replaced.append(place)
        del layer.inactive_adapters[name]
        layer.inactive_adapters[layer.adapter_name] = previous[place]
        layer.adapter_name = name
    if replaced:
        warn(
            f"the adapter {name!r} has other shapes at {len(replaced)} of"
            f" {len(layers)} layers, whose Parameters are new: create a new optimizer",
        )
    return replaced


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an inactive adapter.

    Raises:
        ValueError: the model has no adapters or none of that name, or the adapter is active.
    """
    layers = lora_layers(model)
    known = _names(layers)
    if name == known[0]:
        raise ValueError(
            f"expected an inactive adapter to delete, got {name!r}, the active one: call"
            " set_adapter with another name first, or unload_lora(model, merge=False)"
        )
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    for layer in layers.values():
        del layer.inactive_adapters[name]
    delete_copies(model, name)


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    name: str,
    weights: Mapping[str, float],
    *,
    combination: str = "cat",
    rank: int | None = None,
) -> None:
    """Add an inactive adapter whose update is ``Σ w·s·B A``, a weighted sum of other adapters'.

    Its scale is 1 and its dropout that of the first adapter in ``weights``. Modules in
    ``modules_to_save`` have no sum: a single adapter's are copied, those of several are an error.

    Args:
        name: the new adapter's name.
        weights: a finite factor ``w``, of either sign, per adapter name.
        combination: "cat" concatenates the factors, which is exact, with the sum of the ranks as
            its rank; "svd" is the best approximation of rank ``rank``.
        rank: for "svd"; by default the largest of the adapters' ranks.

    Raises:
        RuntimeError: a layer is merged.
        TypeError, ValueError: a ``name`` in use, unknown or no names in ``weights``, DoRA (whose
            update is not a product of two factors), PiSSA, several adapters of a model with
            ``modules_to_save``, an argument of the wrong type or out of range, or a model that has
            no adapters or is sharded.
    """
    layers = lora_layers(model)
    check_new_name(layers, name)
    check_whole(model, "add adapters")
    known = _names(layers)
    if combination not in COMBINATIONS:
        raise ValueError(
            f"expected combination to be one of {', '.join(COMBINATIONS)}, got {combination!r}"
        )
    if not isinstance(weights, Mapping):
        raise TypeError(f"expected weights to be a dict of names and numbers, got {weights!r:.60}")
    if not weights or any(source not in known for source in weights):
        raise ValueError(f"expected weights of the adapters {', '.join(known)}, got {weights!r}")
    for source, weight in weights.items():
        if not isinstance(weight, Real) or isinstance(weight, bool) or not abs(weight) <= _MAX:
            raise ValueError(f"expected a finite weight of {source!r}, got {weight!r}")
    if len(weights) > 1 and (trained := trained_modules(model)):
        raise ValueError(
            f"expected one adapter in a model with modules_to_save ({', '.join(trained)}), of which"
            f" no sum is defined, got {', '.join(weights)}"
        )
    source = next(iter(weights))
    copied = "" if source == known[0] else source
    check_copies(model, "add adapters", copied)
    if rank is not None:
        check_rank(rank)
        if combination == "cat":
            raise ValueError(f"expected rank=None with combination='cat', got {rank}")
    new = {}
    for place, layer in layers.items():
        sources = {
            source: layer.stash_adapter()
            if source == layer.adapter_name
            else layer.inactive_adapters[source]
            for source in weights
        }
        for source, adapter in sources.items():
            if adapter.config.use_dora:
                raise ValueError(f"{place}: expected adapters without DoRA, got {source!r}")
            check_sharing(place, layer, adapter.config)
        terms = [(weights[source] * a.scaling, a) for source, a in sources.items()]
        new[place] = _weighted_sum(layer, terms, combination, rank)
    _add(model, name, layers, new, copied)


def _weighted_sum(
    layer: LoRALayer, terms: list[tuple[float, Adapter]], combination: str, rank: int | None
) -> Adapter:
    first = terms[0][1]
    like = first.tensors["lora_A"]
    wide = {"device": "cpu", "dtype": torch.float64}  # on the CPU: MPS has no float64
    factors = [(w, *(t.to(**wide) for t in layer.stacked(a.tensors))) for w, a in terms]
    A = torch.cat([A for _, A, _ in factors], dim=1)
    B = torch.cat([w * B for w, _, B in factors], dim=2)
    if combination == "svd":
        A, B = _truncated(A, B, rank or max(a.config.rank for _, a in terms))
    # The factors contain weights and scales: alpha = rank makes the scale 1.
    config = AdapterConfig(A.shape[1], A.shape[1], first.config.dropout)
    tensors = {name: tensor.to(like) for name, tensor in layer.unstacked(A, B).items()}
    return Adapter(config, config.scaling, tensors)


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors of ``B A``: an SVD of the small product of two QR triangles."""
    qb, rb = torch.linalg.qr(B)
    qa, ra = torch.linalg.qr(A.mT)
    U, sigma, Vh = torch.linalg.svd(rb @ ra.mT)
    kept = min(rank, sigma.shape[1])
    root = sigma[:, :kept].sqrt()  # shared evenly between the factors
    # Zeros fill up to the requested rank where B A has fewer singular values.
    new_A, new_B = A.new_zeros(len(A), rank, A.shape[2]), B.new_zeros(*B.shape[:2], rank)
    new_A[:, :kept] = root.unsqueeze(2) * (Vh[:, :kept] @ qa.mT)
    new_B[:, :, :kept] = (qb @ U[:, :, :kept]) * root.unsqueeze(1)
    return new_A, new_B


def check_name(name: str) -> None:
    """Check an adapter's name.

    Raises:
        TypeError: not a str.
        ValueError: empty.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected an adapter's name to be a str, got {type(name).__name__}")
    if not name:
        raise ValueError("expected an adapter's name, got ''")


def check_new_name(layers: Mapping[str, LoRALayer], name: str) -> None:
    """Check that an adapter of that name may be added.

    Raises:
        RuntimeError: a layer is merged.
        TypeError, ValueError: not a valid name, or one in use.
    """
    check_unmerged(layers)
    check_name(name)
    if name in _names(layers):
        raise ValueError(f"expected a new adapter's name, got {name!r}, which is in use")


def check_unmerged(layers: Mapping[str, LoRALayer]) -> None:
    """Check that no layer is merged: every ``weight`` is then the base weight.

    Raises:
        RuntimeError: a layer is merged.
    """
    for place, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"expected unmerged layers, got {place} merged: unmerge_lora first")


def check_sharing(place: str, layer: LoRALayer, config: AdapterConfig) -> None:
    """Check that a new adapter can share the layer's base weight with the existing ones.

    Raises:
        ValueError: the new or the active adapter is PiSSA's.
    """
    if "pissa" in (config.init, layer.init):
        raise ValueError(
            f"{place}: expected adapters that share one base weight, got init='pissa', which"
            " changes it: a PiSSA model has one adapter"
        )
