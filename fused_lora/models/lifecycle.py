"""Whole models: disable adapters, merge them, remove them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..distributed.sharding import check_whole
from ..layers.base import LoRALayer
from ..layers.merging import memory, overlap
from ..layers.replacing import check_own_forward
from .adapt import check_contains_layers, replace_modules, restore_fast_path
from .parameters import lora_layers


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context every adapted layer computes its base layer alone.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_lora(model: nn.Module, keep_base: bool = True) -> None:
    """Merge the active adapter of every layer into its weight; see :meth:`LoRALayer.merge`.

    On an error the model is unchanged. The exception is ``keep_base=False``, which keeps no base
    weights: if memory runs out half-way, the layers merged so far stay merged, and
    :func:`unload_lora` merges the others.

    Raises:
        RuntimeError: a layer is already merged.
        TypeError: a weight is not a Parameter.
        ValueError: the model has no adapters, or another module uses a layer's weight too.
    """
    _merge(model, lora_layers(model), keep_base)


def _merge(model: nn.Module, layers: Mapping[str, LoRALayer], keep_base: bool) -> None:
    """Check every layer, then merge every layer."""
    _check_each(layers, LoRALayer.check_mergeable)
    _check_unshared(model, layers)
    merged = []
    try:
        for layer in layers.values():
            layer.merge(keep_base)
            merged.append(layer)
    except BaseException:
        if keep_base:  # else there is nothing to restore
            for layer in merged:
                layer.unmerge()
        raise


def _unmerge(layers: Mapping[str, LoRALayer]) -> None:
    _check_each(layers, LoRALayer.check_restorable)
    for layer in layers.values():
        layer.unmerge()


def _check_each(layers: Mapping[str, LoRALayer], check: Callable[[LoRALayer], None]) -> None:
    for name, layer in layers.items():
        try:
            check(layer)
        except (RuntimeError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error


def _check_unshared(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Check that no other module has a tensor in the memory that merging writes."""
    # By memory, not identity: tied weights can be different tensors on one storage.
    users: dict[int, list[tuple[str, tuple[int, int, int]]]] = {}
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                place = memory(tensor)
                users.setdefault(place[0], []).append((name, place))
    for name, layer in layers.items():
        own = memory(layer.weight)
        others = [u for u, place in users[own[0]] if u != name and overlap(place, own)]
        if others:
            raise ValueError(
                f"expected a weight used by {name} alone, got one shared with {', '.join(others)},"
                f" which merging would change too: untie it first, by giving {name} a copy of the"
                " weight in a new nn.Parameter"
            )


def unmerge_lora(model: nn.Module) -> None:
    """Restore every base weight, bit for bit; on an error none is restored.

    Raises:
        RuntimeError: a layer is not merged, or was merged with ``keep_base=False``.
        ValueError: the model has no adapters.
    """
    _unmerge(lora_layers(model))


def unload_lora(model: nn.Module, merge: bool = True) -> nn.Module:
    """Replace adapted layers by plain ones, in place, with their active adapters merged or dropped.

    Everything stays frozen; inactive adapters are lost. On an error the model is unchanged, except
    if memory runs out while merging: some layers then stay merged, and a second call continues.

    Args:
        merge: whether the plain weights contain the adapters. If True, layers that are already
            merged stay so; if False, they are unmerged.

    Returns:
        ``model``.

    Raises:
        RuntimeError: ``merge=False``, and a layer no longer has its base weight.
        TypeError: a layer's forward was replaced on the instance, or a weight to merge into is not
            a Parameter.
        ValueError: the model has no adapters, is sharded or is itself a layer, or a weight to merge
            into is shared.
    """
    check_contains_layers(model)
    layers = lora_layers(model)
    check_whole(model, "unload adapters")
    _check_each(layers, check_own_forward)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    if merge:
        # keep_base=False: base weights, which nothing needs again, would double the memory.
        _merge(model, {n: x for n, x in layers.items() if n not in merged}, keep_base=False)
    else:
        _check_each(layers, LoRALayer.check_base)
        _unmerge(merged)
    restore_fast_path(model)
    replace_modules(model, {layer: layer.plain() for layer in layers.values()})
    return model
