"""Whole models: disable adapters, merge them, remove them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from operator import methodcaller

import torch
from torch import nn

from ..distributed.sharding import check_whole
from ..layers.base import LoRALayer
from ..layers.config import check_flag
from ..layers.merging import memory, overlap
from ..layers.offload import is_tied, stored
from .adapt import check_contains_layers, replace_modules, restore_fast_path
from .check import check_effective
from .fusion import OWN, unfuse
from .parameters import check_kept, lora_layers
from .record import forget
from .trained_modules import check_originals, original_tensors, swap_originals, untrain
from .warn import warn

_TOLD = "_told_of_base_weights"  # in the __dict__ of a merged model: the warning has been given


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context every adapted layer computes its base layer alone.

    Modules in ``modules_to_save`` compute with their original Parameters.

    Raises:
        RuntimeError: a module in ``modules_to_save``, or a part of one, was replaced or
            parametrized.
        ValueError: the model has no adapters, or it has ``modules_to_save`` and is sharded or was
            resized.
    """
    layers = list(lora_layers(model).values())
    check_kept(model)
    check_originals(model, "disable adapters")
    before = [layer.enabled for layer in layers]
    changed = []
    try:
        for layer in layers:
            layer.enabled = False
        changed = swap_originals(model, disabled=True)
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        if changed:
            swap_originals(model, disabled=False)


def merge_lora(model: nn.Module, keep_base: bool = True) -> None:
    """Merge the active adapter of every layer into its weight; see :meth:`LoRALayer.merge`.

    For faster calls, not for export: ``state_dict()``, and with it ``save_pretrained``, keeps the
    base weights and the adapters apart, as before merging, and warns of it once per merge.
    ``unload_lora(model)`` makes a plain model, whose ``save_pretrained`` exports the merged one.

    On an error the model is unchanged. The exception is ``keep_base=False``, which keeps no base
    weights: if memory runs out half-way, the layers merged so far stay merged, and
    :func:`unload_lora` merges the others.

    Warns of layers that never ran while others have, see :func:`fused_lora.check_adapters`.

    Raises:
        RuntimeError: a layer is already merged, its adapter does not fit its weight, or it is not
            zero but without effect, since another module reads the weight and does not call the
            layer.
        TypeError: a weight is not a Parameter, or is quantised, or a layer computes itself.
        ValueError: the model has no adapters or no values (meta), another module uses a layer's
            weight too, or a merged weight would contain NaN or infinity.
    """
    check_flag("keep_base", keep_base)
    layers = lora_layers(model)
    _merge(model, layers, keep_base)
    _forget_state_hook(model)
    _around(model, layers).register_state_dict_pre_hook(_tell_of_base_weights)


def _around(model: nn.Module, layers: Mapping[str, LoRALayer]) -> nn.Module:
    """The innermost module that contains all ``layers``: within every wrapper of the model."""
    parents = [name.split(".")[:-1] for name in layers]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(parents), max(parents), strict=False))
    return model.get_submodule(".".join(part for part, _ in same))


def _tell_of_base_weights(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Warn, at the first ``state_dict()`` after merging, that it holds the base weights.

    A hook of a module around the layers and not of each: FSDP takes the states of single layers.
    """
    kept = any(isinstance(m, LoRALayer) and m._base_weight is not None for m in model.modules())
    if keep_vars or not kept or model.__dict__.get(_TOLD):  # exporters keep the variables
        return
    model.__dict__[_TOLD] = True
    warn(
        "the state_dict() of a merged model has the base weights, and the adapters"
        " apart, so that it loads into an adapted model; to export the merged model, call"
        " unload_lora(model) first, then save_pretrained or state_dict()",
    )


def _forget_state_hook(model: nn.Module) -> None:
    for module in model.modules():
        hooks = module._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _tell_of_base_weights]:
            del hooks[key]
            module.__dict__.pop(_TOLD, None)


def _merge(
    model: nn.Module, layers: Mapping[str, LoRALayer], keep_base: bool, originals: bool = True
) -> None:
    """Check every layer, then merge every layer.

    Args:
        originals: whether the originals of ``modules_to_save`` are still needed.
    """
    _check_each(layers, methodcaller("check_mergeable"))
    _check_each(layers, methodcaller("check_fit"))
    _check_unshared(model, layers, originals)
    check_effective(model, layers)
    if not keep_base:  # then an overflow found half-way could not be undone
        _check_each(layers, methodcaller("check_finite"))
    merged = []
    try:
        for name, layer in layers.items():
            _check_each({name: layer}, methodcaller("merge", keep_base))
            merged.append(layer)
    except BaseException:
        if keep_base:  # else there is nothing to restore
            for layer in merged:
                layer.unmerge()
        raise


def _unmerge(layers: Mapping[str, LoRALayer]) -> None:
    _check_each(layers, methodcaller("check_restorable"))
    for layer in layers.values():
        layer.unmerge()


def _check_each(layers: Mapping[str, LoRALayer], check: Callable[[LoRALayer], None]) -> None:
    for name, layer in layers.items():
        try:
            check(layer)
        except (RuntimeError, TypeError, ValueError) as error:
            if type(error) not in (RuntimeError, TypeError, ValueError):
                raise  # such as out of memory
            raise type(error)(f"{name}: {error}") from error


def _check_unshared(model: nn.Module, layers: Mapping[str, LoRALayer], originals: bool) -> None:
    """Check that no other module has a tensor in the memory that merging writes."""
    # By memory, not identity: tied weights can be different tensors on one storage.
    users: dict[int, list[tuple[str, tuple[nn.Module, str], tuple[int, int, int]]]] = {}
    for name, module in model.named_modules():
        tensors = [(key, stored(module, key)) for key in module._parameters]
        tensors += module._buffers.items()
        tensors += [("", tensor) for tensor in (original_tensors(module) if originals else [])]
        for key, tensor in tensors:
            if tensor is not None and tensor.layout == torch.strided:  # no other can be a view
                place = memory(tensor)
                users.setdefault(place[0], []).append((name, (module, key), place))
    for name, layer in layers.items():
        own = memory(stored(layer, "weight"))
        if is_tied(layer, "weight"):
            raise ValueError(
                f"expected a weight used by {name} alone, got one that accelerate keeps tied to"
                " others: untie it before the model is dispatched"
            )
        others = [
            user or "the model itself"
            for user, owner, place in users[own[0]]
            if owner != layer.weight_owner and overlap(place, own)
        ]
        if others:
            raise ValueError(
                f"expected a weight used by {name} alone, got one shared with {', '.join(others)},"
                f" which merging would change too: untie it first, by giving {name} a copy of the"
                " weight in a new nn.Parameter"
            )


def unmerge_lora(model: nn.Module) -> None:
    """Restore every base weight, bit for bit; on an error none is restored.

    Raises:
        RuntimeError: a layer is not merged, was merged with ``keep_base=False``, or resized since.
        TypeError: a weight was quantised since.
        ValueError: the model has no adapters.
    """
    _unmerge(lora_layers(model))
    _forget_state_hook(model)


def unload_lora(model: nn.Module, merge: bool = True) -> nn.Module:
    """Replace adapted layers by plain ones, in place, with their active adapters merged or dropped.

    Everything stays frozen; inactive adapters are lost. On an error the model is unchanged, except
    if memory runs out while merging: some layers then stay merged, and a second call continues.

    Args:
        merge: whether the plain weights contain the adapters. If True, layers that are already
            merged stay so and modules in ``modules_to_save`` keep their trained values; if False,
            layers are unmerged and those modules get their original Parameters back.

    Returns:
        ``model``.

    Raises:
        RuntimeError: ``merge=False``, and a layer no longer has its base weight; with
            ``merge=True``, see :func:`merge_lora`.
        TypeError: a layer's forward was replaced on the instance (other than by accelerate's
            hooks, which the plain layer gets), or a weight to merge into is not a Parameter or is
            quantised, or a layer to merge into computes itself.
        ValueError: the model has no adapters, is sharded or is itself a layer, or a weight to merge
            into is shared or would contain NaN or infinity.
    """
    check_flag("merge", merge)
    check_contains_layers(model)
    layers = lora_layers(model)
    check_whole(model, "unload adapters")
    _check_each(layers, LoRALayer.check_forward)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    if merge:
        # keep_base=False: base weights, which nothing needs again, would double the memory.
        unmerged = {n: x for n, x in layers.items() if n not in merged}
        _merge(model, unmerged, keep_base=False, originals=False)
    else:
        check_originals(model, "restore a module")
        _check_each(layers, methodcaller("check_base"))
        _unmerge(merged)
    restore_fast_path(model)
    unfuse(model, OWN)
    untrain(model, keep=merge)
    _forget_state_hook(model)
    replace_modules(model, {layer: layer.plain() for layer in layers.values()})
    forget(model)
    return model
