"""A module that is a gated MLP, run as one function: the state that its class's forward looks for.

The forward of the class is replaced once, and does what it did for every module without this state.
So copies, pickles and classes that are derived later (FSDP2's) keep it.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..ops.operands import Projection
from ..ops.projections import as_block, is_fusible
from ..ops.validation import check_options, check_projection
from .hooks import changed, on_every_module
from .reading import LayerReader
from .shared_input import may_run_together

_STATE = "_fused_lora_block"
# Classes whose forward is replaced, each with the original and the replacement.
_replaced: dict[type[nn.Module], tuple[Callable, Callable]] = {}
_attached: WeakSet[nn.Module] = WeakSet()


class GatedBlock(LayerReader):
    """How a module computes the gated MLP, and when it may run as one function.

    Args:
        owner: the class that defines the module's forward.
        layers: names of gate, up and down.
        order: indices of gate and up in the order of their calls: dropout's seeds are drawn so.
        activation: a name of :data:`fused_lora.ops.activations.FORWARD`.
        function: the attribute that is the activation, and its value; or None.
        settings: the attributes of the activation that its result depends on.
    """

    def __init__(
        self,
        owner: type[nn.Module],
        layers: tuple[str, str, str],
        order: tuple[int, int],
        activation: str,
        function: tuple[str, object] | None,
        settings: dict[str, object],
    ):
        self.owner, self.layers, self.order = owner, layers, order
        self.activation, self.function, self.settings = activation, function, settings
        replace_forward(owner)

    def reason(self, module: nn.Module) -> str | None:
        """Why the module's own forward runs, whatever its input; None if it is one function."""
        if "forward" in vars(module):
            return "a replaced forward"
        found = self._projections(module, None)
        if isinstance(found, str):
            return found
        layers, impl = found
        if impl in ("reference", "triton:single_pass"):
            return f"impl={impl!r}"
        frozen = all(not layer.weight.requires_grad for layer in layers)
        return None if frozen else "a trainable base weight"

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The module's output; None if its own forward must compute it."""
        if not may_run_together(x):
            return None
        found = self._projections(module, x)
        if isinstance(found, str):
            return None
        layers, impl = found
        if not _fit(x, layers, impl):
            return None
        for name in self.layers:
            self.note_call(module._modules[name])
        return as_block(x, layers, self.activation, impl, (*self.order, 2))

    def _projections(
        self, module: nn.Module, x: Tensor | None
    ) -> tuple[list[Projection], str] | str:
        if self.function is not None:
            name, function = self.function
            now = module._modules.get(name)
            now = vars(module).get(name) if now is None else now
            if now is not function:
                return f"another {name}"
            if isinstance(now, nn.Module):
                if reason := changed(now):
                    return f"{reason} on {name}"
                if any(vars(now).get(key) != value for key, value in self.settings.items()):
                    return f"another setting of {name}"
        children, layers = [], []
        for name in self.layers:
            child = module._modules.get(name)
            if child is None:
                return f"no {name}"
            if reason := changed(child):
                return f"{reason} on {name}"
            if x is not None and len(layers) == 2:
                x = torch.empty((0, layers[0].weight.shape[0]), dtype=x.dtype, device=x.device)
            projection = self.read(child, x)
            if isinstance(projection, str):
                return f"{name}: {projection}"
            children.append(child)
            layers.append(projection)
        if on_every_module():
            return "a hook on every module"
        first, *others = {self.impl(child) for child in children}
        return "layers with different impl" if others else (layers, first)

    def __getstate__(self):
        owner = self.owner
        return vars(self) | {"owner": f"{owner.__module__}:{owner.__qualname__}"}

    def __setstate__(self, state):
        vars(self).update(state)
        with suppress(Exception):  # a class that cannot be imported: its forward stays as it is
            self.owner = pkgutil.resolve_name(state["owner"])
            replace_forward(self.owner)


def attach(module: nn.Module, block: GatedBlock) -> None:
    """Run ``module`` as ``block``."""
    vars(module)[_STATE] = block
    _attached.add(module)


def detach(module: nn.Module) -> None:
    """Run the forward of ``module`` itself again; undoes :func:`attach`.

    The class gets its forward back with its last block, unless other code has replaced it since.
    """
    block = vars(module).pop(_STATE, None)
    if block is None:
        return
    _attached.discard(module)
    original, given = _replaced.get(block.owner, (None, None))
    in_use = {attached.owner for attached in map(block_of, _attached) if attached is not None}
    if original is not None and block.owner not in in_use:
        del _replaced[block.owner]
        if block.owner.forward is given:
            block.owner.forward = original


def attached(kind: type[GatedBlock]) -> list[nn.Module]:
    """The modules that run as blocks of a kind."""
    return [module for module in list(_attached) if type(block_of(module)) is kind]


def block_of(module: nn.Module) -> GatedBlock | None:
    """What :func:`attach` attached."""
    return vars(module).get(_STATE)


def original_forward(module: nn.Module) -> Callable:
    """The forward of the module's class, without blocks."""
    forward = forward_owner(module).forward
    return getattr(forward, "_without_blocks", forward)


def forward_owner(module: nn.Module) -> type[nn.Module]:
    """The class that defines the module's forward."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def replace_forward(owner: type[nn.Module]) -> None:
    """Let the forward of a class run modules that are blocks as such."""
    if owner in _replaced and owner.forward is _replaced[owner][1]:
        return
    original = owner.forward
    keyword = list(inspect.signature(original).parameters)[1]

    @wraps(original)
    def forward(self, *args, **kwargs):
        block = self.__dict__.get(_STATE)
        if block is not None and len(args) + len(kwargs) == 1:
            x = args[0] if args else kwargs.get(keyword)
            y = block.output(self, x)
            if y is not None:
                return y
        return original(self, *args, **kwargs)

    forward._without_blocks = original
    _replaced[owner] = original, forward
    owner.forward = forward


def _fit(x: Tensor, layers: list[Projection], impl: str) -> bool:
    """Whether the layers can compute with ``x``; errors are left to the module's own forward."""
    gate, up, down = layers
    hidden = gate.weight.shape[0]
    if up.weight.shape[0] != hidden or down.weight.shape[1] != hidden:
        return False
    inner = torch.empty((0, hidden), dtype=x.dtype, device=x.device)
    try:
        for layer, given in zip(layers, (x, x, inner), strict=True):
            check_options(impl, layer.dropout_p)
            check_projection(given, *layer[:5])
    except (TypeError, ValueError):
        return False
    return is_fusible(x, layers, impl) and not any(layer.lora_A.is_inference() for layer in layers)
