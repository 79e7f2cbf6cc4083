"""Layers of one parent that read the same tensor, such as q, k and v: one thin product for all.

The first layer that is called with an ``x`` leads: it computes its own output, and ``S_i`` of those
that follow in the parent's forward. A later one that is called with the very same ``x`` computes
only its own product (:mod:`fused_lora.ops.shared_input`). Which layers share an input is a hint:
every call checks it, and a layer that does not follow runs alone, with the same result.

What a call does depends on its operands and the layers' state alone, never on earlier runs, and not
on the grad mode: activation checkpointing repeats it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks

from ..ops import shared_input
from ..ops.modes import autocasts, is_dynamo_compiling, is_eager, without_autocast
from ..ops.operands import Projection
from ..ops.projections import as_autocast, is_fusible
from ..ops.validation import check_options, check_projection
from .hooks import may_change_input
from .reading import LayerReader

# With fewer rows the thin products cost less than the work to share them.
MIN_ROWS = 32


class _Waiting(NamedTuple):
    """What a layer must still have to use the ``S`` that was computed for it."""

    S: Tensor
    lora_A: Tensor
    version: int
    requires_grad: bool
    dropout_p: float


class _Chain:
    """The chain that is open in a thread: its ``x``, and the layers that have not come yet.

    It may keep the graph of a layer that never comes: it is closed when ``x`` is freed, when the
    first layer's backward starts, and when the next chain opens.
    """

    def __init__(self, parent: nn.Module, x: Tensor):
        close = _closer(self)
        self.parent = weakref.ref(parent)
        self.x = weakref.ref(x, close)
        self.state = _state(x)
        self.on_backward = close
        self.alias: Tensor | None = None
        self.waiting: dict[str, _Waiting] = {}

    def close(self) -> None:
        self.alias = None
        self.waiting = {}


class _Thread(threading.local):
    chain: _Chain | None = None


_thread = _Thread()


class SharedInput(LayerReader):
    """A layer's place among those of its parent that share an input.

    Held by the layer. Refers to the parent weakly, so that it keeps no module alive; a copy of the
    layer alone has no place, a copy of the parent has places of its own.

    Args:
        parent: the module whose children the layers are.
        names: theirs, in the order in which the parent's forward calls them.
        index: of the layer that holds this.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], index: int):
        self._parent = weakref.ref(parent)
        self.names = names
        self.index = index

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output, as the first or a later layer of a chain; None if it runs alone."""
        if not may_run_together(x):
            return None
        parent = self._parent()
        if parent is None or parent._modules.get(self.names[self.index]) is not layer:
            return None  # replaced, or a replica of DataParallel
        layer_now = self.read(layer, x)
        if isinstance(layer_now, str):
            return None
        chain = _thread.chain
        if (
            chain is not None
            and chain.x() is x
            and chain.parent() is parent
            and chain.state == _state(x)
        ):
            y = self._follow(chain, layer, layer_now, x)
            if y is not None:
                return y
        return self._lead(parent, layer, layer_now, x)

    def _lead(self, parent, layer, first: Projection, x: Tensor) -> Tensor | None:
        impl = self.impl(layer)
        if may_change_input(layer) or not _fits(x, first, impl):
            return None
        projections = {self.names[self.index]: first}
        for name in self.names[self.index + 1 :]:
            other = parent._modules.get(name)
            if other is None or may_change_input(other):
                continue
            projection = self.read(other, x)
            if (
                not isinstance(projection, str)
                and self.impl(other) == impl
                and _fits(x, projection, impl)
            ):
                projections[name] = projection
        if len(projections) == 1:
            return None
        chain = _Chain(parent, x)
        layers = list(projections.values())
        x = as_autocast(x)
        with without_autocast(x):
            seeds = shared_input.draw_seeds(x, layers)
            alias, S = shared_input.shrink(x, layers, seeds, impl, chain.on_backward)
            y, chain.alias = shared_input.expand(alias, S[0], first, impl)
        for (name, projection), s in list(zip(projections.items(), S, strict=True))[1:]:
            A = projection.lora_A
            chain.waiting[name] = _Waiting(s, A, A._version, A.requires_grad, projection.dropout_p)
        _thread.chain = chain
        return y

    def _follow(self, chain: _Chain, layer, now: Projection, x: Tensor) -> Tensor | None:
        waiting = chain.waiting.pop(self.names[self.index], None)
        alias, impl = chain.alias, self.impl(layer)
        if (
            waiting is None
            or alias is None  # closed by a backward in another thread
            or now.lora_A is not waiting.lora_A
            or now.lora_A._version != waiting.version
            or now.lora_A.requires_grad != waiting.requires_grad
            or now.dropout_p != waiting.dropout_p
            or not _fits(x, now, impl)
        ):
            return None
        with without_autocast(x):
            y, chain.alias = shared_input.expand(alias, waiting.S, now, impl)
        if not chain.waiting:
            chain.close()
            _thread.chain = None
        return y

    def __deepcopy__(self, memo):
        parent = memo.get(id(self._parent()))
        return None if parent is None else type(self)(parent, self.names, self.index)

    def __reduce__(self):
        parent = self._parent()
        if parent is None:
            return type(None), ()
        return type(self), (parent, self.names, self.index)


def may_run_together(x: Tensor) -> bool:
    """Whether the call is eager, with a plain ``x`` of enough rows that counts its changes."""
    return (
        not is_dynamo_compiling()  # first: a comparison of sizes would be a guard
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and is_eager()
        and not x.is_inference()
    )


def _fits(x: Tensor, projection: Projection, impl: str) -> bool:
    """Whether a layer can be one of a chain with ``x``; errors are left to its own forward."""
    try:
        check_options(impl, projection.dropout_p)
        check_projection(x, *projection[:5])
    except (TypeError, ValueError):
        return False
    return is_fusible(x, (projection,), impl) and not projection.lora_A.is_inference()


def _state(x: Tensor) -> tuple:
    """What must be the same for all calls of a chain, beside ``x`` itself."""
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
    # Hooks of saved tensors: a checkpoint around one layer only computes that layer again.
    hooks = _top_saved_tensors_default_hooks(True)
    return (
        x._version, x.requires_grad, x.data_ptr(), torch.is_grad_enabled(), dtype, stream, hooks,
    )  # fmt: skip


def _closer(chain: _Chain) -> Callable[..., None]:
    """A function that closes ``chain``, but does not keep it alive."""
    ref = weakref.ref(chain)

    def close(*_) -> None:
        if (found := ref()) is not None:
            found.close()

    return close
