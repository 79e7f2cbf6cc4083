"""Named adapters of one base model: add, switch, delete, combine.

Every adapter covers all adapted layers of the model. One is active, in the layers' Parameters; the
others are kept aside in each layer and are no part of ``parameters()`` or ``state_dict()``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from ..distributed.sharding import check_replaceable, check_whole
from ..layers.base import LoRALayer
from ..layers.config import Adapter, AdapterConfig, check_rank
from .parameters import lora_layers
from .targets import adapter_configs

COMBINATIONS = ("cat", "svd")


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, the active one first.

    Raises:
        ValueError: no adapters, or layers that were not named together.
    """
    return _names(lora_layers(model))


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
    """Give every adapted layer one more adapter, which :func:`set_adapter` makes active.

    Args:
        name: a new one.
        others: as for :func:`fused_lora.apply_lora`.

    Raises:
        RuntimeError: a merged layer.
        TypeError, ValueError: an argument of the wrong type or out of range, a name in use, no
            adapters, PiSSA, whose base weight is its own, or a sharded model.
    """
    layers = lora_layers(model)
    check_new_name(layers, name)
    check_whole(model, "add adapters")
    config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
    configs = adapter_configs(layers, config, rank_pattern, alpha_pattern)
    new = {}
    for place, layer in layers.items():
        check_sharing(place, layer, configs[place])
        try:
            new[place] = layer.new_adapter(configs[place])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    for place, layer in layers.items():
        layer.inactive_adapters[name] = new[place]


def set_adapter(model: nn.Module, name: str) -> list[str]:
    """Make another adapter active; the one that was is kept aside.

    Where shapes match, values are written into the same Parameters, and optimizers that hold them
    stay valid (their moments are the other adapter's). Elsewhere the Parameters are new ones, and a
    warning says so.

    Returns:
        The names of the layers whose Parameters are new.

    Raises:
        RuntimeError: a merged layer.
        ValueError: no adapters, no adapter of that name, or one of other shapes in a model that
            is sharded or in ``DistributedDataParallel``.
    """
    layers = lora_layers(model)
    known = _names(layers)
    check_unmerged(layers)
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    if name == known[0]:
        return []
    if not all(layer.fits(layer.inactive_adapters[name]) for layer in layers.values()):
        check_replaceable(model, "switch to an adapter of other shapes")
    replaced = []
    for place, layer in layers.items():
        previous = layer.stash_adapter()
        if not layer.activate_adapter(layer.inactive_adapters[name]):
            replaced.append(place)
        del layer.inactive_adapters[name]
        layer.inactive_adapters[layer.adapter_name] = previous
        layer.adapter_name = name
    if replaced:
        warnings.warn(
            f"fused_lora: the adapter {name!r} has other shapes at {len(replaced)} of"
            f" {len(layers)} layers, whose Parameters are new: make a new optimizer",
            stacklevel=2,
        )
    return replaced


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter that is not active.

    Raises:
        ValueError: no adapters, no adapter of that name, or the active one.
    """
    layers = lora_layers(model)
    known = _names(layers)
    if name == known[0]:
        raise ValueError(
            f"expected an inactive adapter to delete, got {name!r}, the active one: set_adapter to"
            " another first, or unload_lora(model, merge=False)"
        )
    if name not in known:
        raise ValueError(f"expected one of the adapters {', '.join(known)}, got {name!r}")
    for layer in layers.values():
        del layer.inactive_adapters[name]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    name: str,
    weights: Mapping[str, float],
    *,
    combination: str = "cat",
    rank: int | None = None,
) -> None:
    """Add the adapter whose update is the weighted sum of other adapters' updates.

    Args:
        name: a new one.
        weights: names of adapters to finite factors, of any sign.
        combination: "cat" is exact, and its rank is the sum of the ranks; "svd" is the best
            approximation of rank ``rank`` (by default the largest of the ranks).

    Raises:
        RuntimeError: a merged layer.
        TypeError, ValueError: unknown or used names, DoRA (whose update is no product), no weights,
            an argument of the wrong type or out of range, or a sharded model.
    """
    layers = lora_layers(model)
    check_new_name(layers, name)
    check_whole(model, "add adapters")
    known = _names(layers)
    if combination not in COMBINATIONS:
        raise ValueError(
            f"expected combination to be one of {', '.join(COMBINATIONS)}, got {combination!r}"
        )
    if not weights or any(source not in known for source in weights):
        raise ValueError(f"expected weights of the adapters {', '.join(known)}, got {weights!r}")
    for source, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"expected a finite weight of {source!r}, got {weight!r}")
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
    for place, layer in layers.items():
        layer.inactive_adapters[name] = new[place]


def _weighted_sum(
    layer: LoRALayer, terms: list[tuple[float, Adapter]], combination: str, rank: int | None
) -> Adapter:
    first = terms[0][1]
    like = first.tensors["lora_A"]
    wide = {"device": "cpu", "dtype": torch.float64}  # MPS has no float64
    A = torch.cat([a.tensors["lora_A"].flatten(1).to(**wide) for _, a in terms])
    B = torch.cat([a.tensors["lora_B"].flatten(1).to(**wide) * w for w, a in terms], dim=1)
    if combination == "svd":
        A, B = _truncated(A, B, rank or max(a.config.rank for _, a in terms))
    # The scale of the sum is 1, in the factors.
    config = AdapterConfig(len(A), len(A), first.config.dropout)
    tensors: dict[str, Tensor] = {"lora_A": A, "lora_B": B}
    return Adapter(
        config,
        config.scaling,
        {
            n: tensors[n].to(like).view(s)
            for n, s in layer.adapter_shapes(layer.weight, config).items()
        },
    )


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of ``rank`` for ``B A``, by an SVD of the thin factors' triangles alone."""
    qb, rb = torch.linalg.qr(B)
    qa, ra = torch.linalg.qr(A.t())
    U, sigma, Vh = torch.linalg.svd(rb @ ra.t())
    kept = min(rank, len(sigma))
    root = sigma[:kept].sqrt()
    new_A, new_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
    new_A[:kept] = root.unsqueeze(1) * (Vh[:kept] @ qa.t())
    new_B[:, :kept] = (qb @ U[:, :kept]) * root
    return new_A, new_B


def check_name(name: str) -> None:
    """Check that an adapter can have that name.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected an adapter's name to be a str, got {type(name).__name__}")
    if not name:
        raise ValueError("expected an adapter's name, got ''")


def check_new_name(layers: Mapping[str, LoRALayer], name: str) -> None:
    """Check that an adapter of that name may be added.

    Raises:
        RuntimeError: a merged layer.
        TypeError, ValueError: no name, or one in use.
    """
    check_unmerged(layers)
    check_name(name)
    if name in _names(layers):
        raise ValueError(f"expected a new adapter's name, got {name!r}, which is in use")


def check_unmerged(layers: Mapping[str, LoRALayer]) -> None:
    """Check that no layer is merged, so that the weights are the base's.

    Raises:
        RuntimeError: one is.
    """
    for place, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"expected unmerged layers, got {place} merged: unmerge_lora first")


def check_sharing(place: str, layer: LoRALayer, config: AdapterConfig) -> None:
    """Check that an adapter can share the layer's weight with those that are there.

    Raises:
        ValueError: PiSSA, old or new.
    """
    if "pissa" in (config.init, layer.init):
        raise ValueError(
            f"{place}: expected adapters that share one base weight, got init='pissa', which"
            " changes it: a PiSSA model has one adapter"
        )
