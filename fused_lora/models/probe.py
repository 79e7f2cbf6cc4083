"""Which linear layers of a module read the same input: its forward, run without values.

The forward runs on the meta device, on a stand-in for the module whose linear layers record their
input. What it finds is a hint: the layers check at every call whether they got the same tensor.
So a forward that cannot run this way costs speed, but never correctness.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

_ROWS = (2, 16)  # of the input: a batch of sequences


class _Recorder:
    """Stands for a linear layer: notes its name and input."""

    def __init__(self, name: str, layer: nn.Module, calls: list[tuple[str, Tensor]]):
        self._name, self._layer, self._calls = name, layer, calls

    def __call__(self, x, *args, **kwargs):
        self._calls.append((self._name, x))
        return x.new_empty((*x.shape[:-1], self._layer.out_features))

    def __getattr__(self, name):
        return getattr(self._layer, name)


class _Passing:
    """Stands for any other submodule: returns its first argument."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __call__(self, x=None, *args, **kwargs):
        return x

    def __getattr__(self, name):
        return getattr(self._module, name)


class _StandIn:
    """Stands for the module: its submodules are replaced, and what is set on it is dropped."""

    def __init__(self, module: nn.Module, replaced: dict):
        object.__setattr__(self, "_known", (module, replaced))

    def __getattr__(self, name):
        module, replaced = object.__getattribute__(self, "_known")
        if name in replaced:
            return replaced[name]
        found = getattr(module, name)
        if isinstance(found, Tensor):  # a buffer that the forward may write
            return torch.empty_like(found, device="meta")
        if type(found) in (list, dict, set):
            return copy.copy(found)
        if inspect.ismethod(found) and found.__self__ is module:
            return found.__func__.__get__(self)
        return found

    def __setattr__(self, name, value):
        pass


def shared_inputs(
    module: nn.Module, forward: Callable, is_linear: Callable[[nn.Module], bool]
) -> list[tuple[str, ...]]:
    """The names of the layers that share an input, in the order of their calls, for each input.

    Args:
        forward: the module's forward, as a function of it and its arguments.
        is_linear: whether a submodule is a layer to look for.
    """
    children = {name: child for name, child in module._modules.items() if child is not None}
    layers = {name: child for name, child in children.items() if is_linear(child)}
    if len(layers) < 2:
        return []
    calls: list[tuple[str, Tensor]] = []
    replaced = {
        name: _Recorder(name, child, calls) if name in layers else _Passing(child)
        for name, child in children.items()
    }
    first = next(iter(layers.values()))
    x = torch.empty((*_ROWS, first.in_features), device="meta")
    with _same_random_numbers(), torch.no_grad(), suppress(Exception, SystemExit):
        # Whatever it raises, the calls before are known.
        args, kwargs = _arguments(forward, x)
        forward(_StandIn(module, replaced), *args, **kwargs)
    found: dict[int, dict[str, None]] = {}
    for name, given in calls:
        found.setdefault(id(given), {})[name] = None
    return [tuple(names) for names in found.values() if len(names) > 1]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Within the context PyTorch's, Python's and NumPy's generators may be used; then restored."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.random.set_state(before[1])


def _arguments(forward: Callable, x: Tensor) -> tuple[list, dict[str, None]]:
    """``x`` for the first parameter after the module, None for others without a default."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = [None for p in required[1:] if p.kind in positional]
    return [x, *others], {p.name: None for p in required if p.kind is p.KEYWORD_ONLY}
