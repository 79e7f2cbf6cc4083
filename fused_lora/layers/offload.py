"""Layers that accelerate has offloaded: their Parameters are on the meta device between calls.

``cpu_offload``, ``disk_offload`` and ``dispatch_model`` give such a module a hook, which loads its
Parameters from a mapping before each forward and drops them afterwards. Here a hook is recognised
by its attributes: accelerate is an optional package.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, update_wrapper, wraps
from types import MethodType

import torch
from torch import Tensor, nn

from .replacing import is_own_forward


def offload_hook(module: nn.Module):
    """The hook that loads the Parameters of ``module``, or None."""
    return _offloading(vars(module).get("_hf_hook"))


def _offloading(hook):
    for member in getattr(hook, "hooks", ()):  # a SequentialHook
        if (found := _offloading(member)) is not None:
            return found
    return hook if getattr(hook, "offload", False) and hasattr(hook, "weights_map") else None


def has_values(module: nn.Module, *names: str) -> bool:
    """Whether the Parameters of these names hold values, here or where a hook loads them from."""
    found = [module._parameters.get(name) for name in names]
    return offload_hook(module) is not None or not any(p is not None and p.is_meta for p in found)


def has_offloaded_adapter(module: nn.Module) -> bool:
    """Whether a hook loads the adapter: a backward pass gives its gradient to a copy."""
    return module.lora_A.is_meta and offload_hook(module) is not None


def stored(module: nn.Module, name: str) -> Tensor | None:
    """The Parameter of that name, or the tensor in memory that the module's hook loads it from."""
    parameter = getattr(module, name)
    hook = offload_hook(module)
    if parameter is None or hook is None or not parameter.is_meta:
        return parameter
    values, key = _in_memory(hook.weights_map, name)
    return parameter if values is None else values.get(key, parameter)


def is_tied(module: nn.Module, name: str) -> bool:
    """Whether a hook loads the Parameter of that name once for several modules."""
    return name in getattr(offload_hook(module), "tied_params_names", ())


def _in_memory(values: Mapping, name: str) -> tuple[dict | None, str]:
    """The dict that ``values[name]`` is read from first, and its key there; None without a dict."""
    while not isinstance(values, dict):
        if isinstance(values, ChainMap):  # see _write_back
            values = values.maps[0]
        elif hasattr(values, "dataset") and hasattr(values, "prefix"):
            values, name = values.dataset, values.prefix + name
        elif isinstance(getattr(values, "state_dict", None), dict):
            values = values.state_dict  # of tensors that replace those on disk
        else:
            return None, name
    return values, name


def has_own_hook(module: nn.Module) -> bool:
    """Whether the module's forward is its class's within a hook of accelerate."""
    forward, inner = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return (
        isinstance(forward, partial)
        and "_hf_hook" in vars(module)
        and (forward.args == (module,) and is_own_forward(module, inner))
    )


def give_hook(source: nn.Module, target: nn.Module, without: Collection[str]) -> None:
    """Give ``target`` the hook of ``source``, less the Parameters named in ``without``."""
    if not has_own_hook(source):
        return
    target._old_forward = MethodType(type(target).forward, target)
    run = partial(vars(source)["forward"].func, target)
    target.forward = update_wrapper(run, target._old_forward)
    if (hook := offload_hook(target)) is not None:
        for name in without:
            hook.original_devices.pop(name, None)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within the context an offloaded module's Parameters hold their values; changes are kept.

    Raises:
        ValueError: the hook has no value for one of them.
    """
    hook = offload_hook(module)
    if hook is None or not any(p.is_meta for p in module.parameters()):
        yield
        return
    try:
        try:
            with torch.inference_mode(False):  # inference tensors count no versions
                hook.pre_forward(module)
        except KeyError as error:
            raise ValueError(
                f"expected offloaded values of every Parameter, got none of {error}: load the"
                " weights first, then offload the model"
            ) from error
        before = {name: (p, p._version) for name, p in module.named_parameters()}
        yield
        _write_back(hook, module, before)
    finally:
        hook.post_forward(module, None)


def _write_back(hook, module: nn.Module, before: Mapping[str, tuple[Tensor, int]]) -> None:
    """Store the Parameters that changed where the hook will load them from."""
    devices = hook.original_devices  # of every Parameter that removing the hook restores
    after = dict(module.named_parameters())
    for name in before.keys() - after.keys():
        devices.pop(name, None)
    for name, parameter in after.items():
        old, version = before.get(name, (None, None))
        if parameter is old and parameter._version == version:
            continue
        devices.setdefault(name, devices.get("weight", parameter.device))
        values, key = _in_memory(hook.weights_map, name)
        if values is None:
            values, key = {}, name
            hook.weights_map = ChainMap(values, hook.weights_map)
        values[key] = parameter.detach().cpu()


def with_values(method: Callable) -> Callable:
    """Decorate a layer's method: it runs within :func:`onloaded`."""

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        with onloaded(self):
            return method(self, *args, **kwargs)

    return wrapper
