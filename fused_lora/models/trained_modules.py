"""Modules that train whole beside the adapters, such as a classification head: ``modules_to_save``.

Such a module keeps its place, class and names. Its Parameters and buffers are copies, one set per
adapter, as PEFT copies the module. The active adapter's are in the module; the originals and the
inactive adapters' are kept aside, outside ``parameters()``, ``buffers()`` and ``state_dict()``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..distributed import sharding
from ..layers.offload import onloaded
from .aside import (
    ASIDE,
    Aside,
    MovesAside,
    copy_of,
    originals_of,
    owners_of,
    present,
    swap,
    table_of,
    trained_tensors,
    write,
)
from .modules_to_save import REMOVE_HOOKS, warn_of_ties
from .wrappers import clean

_ORDER = (
    "quantise before apply_lora, and leave modules that train whole out, as with the filter_fn of"
    " torchao's quantize_"
)
_QUANTISED = f"which does not train: {_ORDER}"
_FROZEN = "does not require grad: requires_grad_(True) lets it train"


def copy_tensors(
    model: nn.Module, found: Mapping[str, nn.Module], tied: bool = False
) -> dict[nn.Module, dict[str, Tensor]]:
    """Copies of all Parameters and buffers of the modules, by owner and name.

    Args:
        tied: whether modules that share a Parameter share its copy.
    """
    warn_of_ties(model, found, tied)
    copies: dict[nn.Module, dict[str, Tensor]] = {}
    memo: dict[int, Tensor] = {}
    with torch.inference_mode(False):  # inference tensors could not be trained
        for root in found.values():
            memo = memo if tied else {}  # within one module, shared Parameters stay shared
            for owner in root.modules():
                if owner in copies:
                    continue
                tensors = {n: copy.deepcopy(p, memo) for n, p in own_tensors(owner, False).items()}
                buffers = {n: b.detach().clone() for n, b in present(owner._buffers).items()}
                if tensors or buffers:
                    copies[owner] = tensors | buffers
    return copies


def train_copies(
    found: Mapping[str, nn.Module], copies: Mapping[nn.Module, dict[str, Tensor]]
) -> None:
    """Put ``copies`` in the place of the originals, which are kept aside; the copies train."""
    roots = set(found.values())
    for owner, tensors in copies.items():
        aside = Aside(owner in roots, tensors, disabled=True)
        owner.__dict__[ASIDE] = aside
        owner.__dict__["_apply"] = MovesAside(owner)
        swap(owner)
        for parameter in present(owner._parameters).values():
            parameter.requires_grad_(True)
    for root in roots:
        if ASIDE not in root.__dict__:  # it owns nothing itself
            root.__dict__[ASIDE] = Aside(True, {})
            root.__dict__["_apply"] = MovesAside(root)


def is_trained(module: nn.Module) -> bool:
    """Whether ``modules_to_save`` names this module, and not a module around it."""
    aside = module.__dict__.get(ASIDE)
    return aside is not None and aside.root


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in ``modules_to_save``, by their first name in ``named_modules()``."""
    return {name: module for name, module in model.named_modules() if is_trained(module)}


def trained_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The Parameters that train in ``modules_to_save``; those of the active adapter."""
    for root in trained_modules(model).values():
        for part in root.modules():
            aside = part.__dict__.get(ASIDE)
            disabled = aside is not None and aside.disabled
            yield from (
                tensor
                for tensor in (aside.base if disabled else part._parameters).values()
                if isinstance(tensor, nn.Parameter)
            )


def stopped_copies(model: nn.Module, frozen: bool) -> dict[str, str]:
    """The modules in ``modules_to_save``, and their parts, that no longer train.

    Args:
        frozen: whether plain Parameters count too that do not require grad.

    Returns:
        By name, the first such Parameter and what became of it.
    """
    found = {}
    for place, name, tensor in _copies(model):
        if not tensor.requires_grad and (frozen or not _is_plain(tensor)):
            cure = _FROZEN if _is_plain(tensor) else f"{_kind(tensor)}, {_QUANTISED}"
            found.setdefault(place, f"{name} {cure}")
    return found


def check_plain(model: nn.Module, doing: str) -> None:
    """Check that no copy has been quantised: its values could not be read or written.

    Raises:
        RuntimeError: one has.
    """
    for place, name, tensor in _copies(model):
        if not _is_plain(tensor):
            raise RuntimeError(
                f"expected plain float Parameters in modules_to_save to {doing}, got {place}, whose"
                f" {name} {_kind(tensor)}: {_ORDER}"
            )


def _copies(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """The names of modules and the tensors in them that train, or did when they were copied."""
    for root_name, root in trained_modules(model).items():
        for part_name, part in root.named_modules():
            aside = part.__dict__.get(ASIDE, Aside(False, {}))
            current = aside.base if aside.disabled else part._parameters | part._buffers
            copied = {name for name, t in aside.base.items() if isinstance(t, nn.Parameter)}
            for name in sorted(copied | present(part._parameters).keys()):
                if current.get(name) is not None:
                    yield ".".join(filter(None, (root_name, part_name))), name, current[name]


def _is_plain(tensor: Tensor) -> bool:
    wrapped = is_traceable_wrapper_subclass(tensor) and not sharding.is_shard(tensor)
    return tensor.is_floating_point() and not wrapped


def _kind(tensor: Tensor) -> str:
    wrapped = is_traceable_wrapper_subclass(tensor)
    return f"is of class {type(tensor).__name__}" if wrapped else f"is of {tensor.dtype}"


def original_tensors(module: nn.Module) -> list[Tensor]:
    """The originals that ``module`` itself keeps aside."""
    aside = module.__dict__.get(ASIDE)
    return [] if aside is None or aside.disabled else list(aside.base.values())


def own_tensors(module: nn.Module, buffers: bool = True) -> dict[str, Tensor]:
    """The Parameters of ``module`` itself and the buffers that its ``state_dict`` holds."""
    named = present(module._parameters)
    if buffers:
        transient = module._non_persistent_buffers_set
        named |= {n: b for n, b in present(module._buffers).items() if n not in transient}
    return named


def named_parts(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """A module and its parts by all their names, without those of wrappers."""
    return [(clean(n), part) for n, part in root.named_modules(remove_duplicate=False)]


def module_state(root: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """What ``state_dict`` would hold of a module, by name: an adapter's copies or the module's own.

    Args:
        root: any module; only one in ``modules_to_save`` has adapters' copies.
        name: an inactive adapter; None for the active one.
    """
    if name is not None:
        _check_complete(root)
    state = {}
    for place, owner in named_parts(root):
        kept = own_tensors(owner)
        if ASIDE in owner.__dict__:
            sharding.reshard(owner)
            with onloaded(owner):
                kept = own_tensors(owner)
                source = (
                    trained_tensors(owner) if name is None else owner.__dict__[ASIDE].inactive[name]
                )
                kept = {n: source.get(n, tensor).detach() for n, tensor in kept.items()}
            _check_gathered(owner, kept)
        state |= {f"{place}.{key}" if place else key: tensor for key, tensor in kept.items()}
    return state


@torch.no_grad()
def load_state(root: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Write a state as :func:`module_state` returns it; an inactive adapter may be a new one."""
    for place, owner in named_parts(root):
        if ASIDE not in owner.__dict__:
            continue
        prefix = f"{place}." if place else ""
        given = {key: state[prefix + key] for key in own_tensors(owner) if prefix + key in state}
        if name is None:
            write(trained_tensors(owner), given)
            continue
        inactive = owner.__dict__[ASIDE].inactive
        if name not in inactive:
            inactive[name] = {key: copy_of(tensor) for key, tensor in originals_of(owner).items()}
        write(inactive[name], given)


def add_copies(model: nn.Module, name: str, source: str | None = None) -> None:
    """Give a new inactive adapter a copy of each module: the original, or another adapter's.

    Args:
        source: an inactive adapter, or "" for the active one; None for the original.
    """
    for owner in owners_of(model):
        aside = owner.__dict__[ASIDE]
        if source is None:
            tensors = originals_of(owner)
        else:
            tensors = aside.inactive[source] if source else trained_tensors(owner)
        aside.inactive[name] = {key: copy_of(tensor) for key, tensor in tensors.items()}


@torch.no_grad()
def switch_copies(model: nn.Module, active: str, name: str) -> None:
    """Write the copies of the adapter ``name`` in place; keep those of ``active`` aside.

    Raises:
        RuntimeError: a part of a module was replaced, or a copy quantised.
        ValueError: copies without values here, or of other shapes.
    """
    check_plain(model, "switch adapters")
    check_copies(model, f"switch to the adapter {name!r}", name)
    owners = owners_of(model)
    for owner in owners:
        sharding.reshard(owner)
    # All copies before the first write: memory may run out.
    previous = [{key: copy_of(t) for key, t in trained_tensors(owner).items()} for owner in owners]
    for owner, copies in zip(owners, previous, strict=True):
        inactive = owner.__dict__[ASIDE].inactive
        write(trained_tensors(owner), inactive[name])
        del inactive[name]
        inactive[active] = copies


def delete_copies(model: nn.Module, name: str) -> None:
    """Drop the copies of an inactive adapter."""
    for owner in owners_of(model):
        owner.__dict__[ASIDE].inactive.pop(name, None)


def check_originals(model: nn.Module, doing: str) -> None:
    """Check that the originals can take the place of the copies.

    Raises:
        RuntimeError: a parametrization computes a tensor that was a Parameter.
        ValueError: the model is sharded, or a module has been resized or offloaded since.
    """
    if not trained_modules(model):
        return
    sharding.check_whole(model, f"{doing} with modules_to_save")
    check_copies(model, doing)


def check_copies(
    model: nn.Module, doing: str, source: str | None = None, offloaded_ok: bool = False
) -> None:
    """Check that copies can be read from the modules that train whole, and written into them.

    Args:
        source: whose tensors must fit: those of an inactive adapter, or "" for the active one's,
            which always do; None for the originals.
        offloaded_ok: whether only the originals are needed, which are never offloaded.

    Raises:
        RuntimeError: a parametrization or FSDP1 replaced a Parameter, or a part is new.
        ValueError: a module has been resized or offloaded since.
    """
    _check_complete(model)
    for place, owner in model.named_modules():
        if ASIDE not in owner.__dict__:
            continue
        aside = owner.__dict__[ASIDE]
        current = {name: table_of(owner, name)[name] for name in aside.base}
        _check_gathered(owner, current)
        kept = aside.inactive[source] if source else current if source == "" else aside.base
        whose = f"the adapter {source!r}" if source else "the original"
        for name, tensor in current.items():
            if tensor.is_meta and not offloaded_ok:
                raise ValueError(
                    f"expected {place}.{name} in memory to {doing}, as it is in modules_to_save,"
                    f" got it offloaded: {REMOVE_HOOKS} first"
                )
            if tensor.shape != kept[name].shape:
                raise ValueError(
                    f"expected {place}.{name} of shape {tuple(kept[name].shape)} to {doing}, as"
                    f" {whose} has, got {tuple(tensor.shape)}: resize the model before apply_lora"
                )


def _check_complete(model: nn.Module) -> None:
    for place, root in trained_modules(model).items():
        for name, part in root.named_modules():
            if ASIDE not in part.__dict__ and own_tensors(part):
                raise RuntimeError(
                    f"expected the modules that were there when {place or 'a module'} began to"
                    f" train, got a new {type(part).__name__} at {name} in it: replace modules"
                    " before apply_lora"
                )


def swap_originals(model: nn.Module, disabled: bool) -> list[nn.Module]:
    """Put the originals in place, or the copies again; return the owners that changed."""
    changed = [owner for owner in owners_of(model) if owner.__dict__[ASIDE].disabled != disabled]
    for owner in changed:
        swap(owner)
    return changed


def untrain(model: nn.Module, keep: bool) -> None:
    """Leave plain, frozen modules: with the trained values, or with the originals."""
    swap_originals(model, disabled=not keep)
    for owner in owners_of(model):
        for parameter in present(owner._parameters).values():
            parameter.requires_grad_(False)
        del owner.__dict__[ASIDE], owner.__dict__["_apply"]


def _check_gathered(owner: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if not getattr(owner, "_is_fsdp_managed_module", False):
        return
    for name, original in owner.__dict__[ASIDE].base.items():
        tensor = tensors.get(name, original)
        if not sharding.is_shard(tensor) and tensor.shape != original.shape:
            raise RuntimeError(
                "expected whole Parameters, got FSDP1's flat ones: do it on every rank within"
                " FullyShardedDataParallel.summon_full_params(model)"
            )
