"""Many adapters in one batch: what a layer computes while ``adapter_segments`` is open.

An open block belongs to a model and a thread. PyTorch's thread-local state holds it, which the
threads of a backward pass inherit: a checkpointed forward runs again there. A forward that a
checkpoint will repeat marks that checkpoint with its block. The repetition finds the mark and
computes with the same block; after the block it is refused, since the model's state has changed.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import FrameType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _get_obj_in_tls, _is_key_in_tls, _stash_obj_in_tls
from torch._C._autograd import _top_saved_tensors_default_hooks

from ..ops.functional import fused_lora_add, fused_lora_linear
from ..ops.modes import outside_graphs
from ..ops.segments import Segments

BASE = "__base__"  # PEFT's word for a sample without an adapter; None means the same
_KEY = "fused_lora_segments"
_MARK = "_fused_lora_block"
_lock = threading.Lock()
_in_blocks: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class NamedAdapter(NamedTuple):
    """One adapter of a layer, active or not."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout_p: float


class Block:
    """An open ``adapter_segments``.

    Args:
        names: the adapter of each sample; None for none.
        places: the layers of the model, with their names.
        absent: the names of the adapters that no sample has and that get zero gradients.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        places: Mapping[nn.Module, str],
        absent: Sequence[str] = (),
    ):
        self.runs = [(name, len(list(samples))) for name, samples in groupby(names)]
        self.batch, self.places, self.absent, self.open = len(names), places, absent, True
        self.names = [name for name in dict.fromkeys(names) if name is not None]
        self._segments: dict[tuple[int, torch.device], Segments] = {}

    def segments(self, x: Tensor) -> Segments:
        """The rows of ``x``, one segment per run of samples with one adapter.

        Raises:
            ValueError: the rows are not those of the samples.
        """
        rows = x.shape[:-1].numel()
        whole = x.dim() > 1 and x.shape[0] == self.batch
        if not whole and (x.dim() > 2 or rows % self.batch):
            raise ValueError(
                f"expected an input of {self.batch} samples, as adapter_segments got names, with"
                f" shape ({self.batch}, ..., in) or ({self.batch}*tokens, in), got"
                f" {tuple(x.shape)}"
            )
        key = rows // self.batch, x.device
        if key not in self._segments:
            ends, end = [], 0
            for _, samples in self.runs:
                ends.append(end := end + samples * key[0])
            self._segments[key] = Segments.of_ends(ends, x.device)
        return self._segments[key]

    def check_open(self, place: str) -> None:
        """Check that backward still runs within the block.

        Raises:
            RuntimeError: the block is closed.
        """
        if not self.open:
            raise RuntimeError(
                f"expected backward inside the with block of adapter_segments, got {place} computed"
                " again outside of it by activation checkpointing, where every sample would get the"
                " active adapter"
            )


class SegmentRoute:
    """A layer's way through open blocks; held by the layer while there are any.

    This class reads the library's own layers, a subclass may read others.
    """

    attribute: ClassVar[str] = "segment_route"  # of the layer, that holds the route

    def __init__(self, layer: nn.Module):
        self._layer = weakref.ref(layer)
        self.users = 0  # open blocks, in all threads
        self.repeats = False  # whether a checkpoint may repeat a forward of a closed block

    @outside_graphs  # the sizes of the segments are data
    def output(self, layer: nn.Module, x: Tensor, more: bool = False) -> Tensor | None:
        """The layer's output in the block that is open; None if there is none.

        Args:
            more: whether the call has other arguments, which no block allows.

        Raises:
            RuntimeError: the layer was merged inside the block, or the block of the forward that
                a checkpoint repeats is closed.
            TypeError, ValueError: an input that does not fit.
        """
        if not isinstance(x, Tensor):
            return None
        block = self.block(layer)
        if block is None or self.is_disabled(layer):
            return None
        place = block.places[layer]
        if reason := self.reason(layer, block.names):
            raise RuntimeError(f"{place}: expected a layer that can run in segments, got {reason}")
        if more:
            raise TypeError(f"{place}: expected one argument in adapter_segments, got several")
        try:
            y = self._compute(layer, x, block)
        except (TypeError, ValueError) as error:
            if type(error) not in (TypeError, ValueError):
                raise
            raise type(error)(f"{place}: {error}") from error
        self._watch(y, block, place)
        return y

    def is_open(self, layer: nn.Module) -> bool:
        """Whether :meth:`output` would compute the layer, or refuse to."""
        try:
            return self.block(layer) is not None
        except RuntimeError:
            return True

    def block(self, layer: nn.Module) -> Block | None:
        """The block that the layer runs in.

        Raises:
            RuntimeError: a replica of the layer, or a repeated forward of a closed block.
        """
        if self._layer() is not layer:
            raise RuntimeError(
                f"expected the model's own {type(layer).__name__} in adapter_segments, got a copy"
                " that shares its state, such as a replica of DataParallel"
            )
        if _current_graph_task_id() != -1:
            repeated = list(_repeated())
            for checkpoint in repeated:
                block = getattr(checkpoint, _MARK, None)
                if block is not None and layer in block.places:
                    block.check_open(block.places[layer])
                    return block
        else:
            repeated = []
        block = next((block for block in _blocks() if layer in block.places), None)
        if block is not None and repeated:
            raise RuntimeError(
                f"expected forward and backward inside one with block of adapter_segments, got"
                f" {block.places[layer]} computed again in a block by activation checkpointing, but"
                " not computed in it before"
            )
        return block

    def _compute(self, layer: nn.Module, x: Tensor, block: Block) -> Tensor:
        segments = block.segments(x)
        found = {name: self.adapter(layer, x, name) for name in block.names}
        each = [found.get(name) for name, _ in block.runs]
        if not any(adapter is not None for adapter in each):
            y = self.base_output(layer, x)
        elif (plain := self.plain_base(layer, block.names)) is not None:
            weight, bias = plain
            A, B, scaling, dropout_p = zip(
                *((None, None, 1.0, 0.0) if adapter is None else adapter for adapter in each),
                strict=True,
            )
            y = fused_lora_linear(
                x, weight, A, B, bias,
                scaling=scaling, dropout_p=dropout_p, impl=self.impl(layer), segments=segments,
            )  # fmt: skip
        else:
            y = self._beside(layer, x, each, segments)
        if block.absent and torch.is_grad_enabled():
            others = [self.adapter(layer, x, name) for name in block.absent]
            absent = [t for adapter in others if adapter is not None for t in adapter[:2]]
            if absent := [t for t in absent if t.requires_grad]:
                y = _WithZeros.apply(y, *absent)
        return y

    def _beside(self, layer, x: Tensor, each: list[NamedAdapter | None], segments) -> Tensor:
        """The base's own product plus each segment's adapter."""
        y = self.base_output(layer, x)
        shape, rows, flat = y.shape, y.flatten(0, -2), x.flatten(0, -2)
        parts = [
            rows[a:b]
            if adapter is None
            else fused_lora_add(
                rows[a:b], flat[a:b], adapter.lora_A, adapter.lora_B,
                scaling=adapter.scaling, dropout_p=adapter.dropout_p, impl=self.impl(layer),
            )
            for adapter, (a, b) in zip(each, segments.bounds, strict=True)
        ]  # fmt: skip
        return torch.cat(parts).view(shape)

    def _watch(self, y: Tensor, block: Block, place: str) -> None:
        """Mark the checkpoints that will repeat this forward."""
        hooks = _top_saved_tensors_default_hooks(True)
        if hooks is not None:
            self.repeats = True
            if y.requires_grad:  # unknown hooks may repeat it too
                y.register_hook(lambda _: block.check_open(place))
            if (frame := _closed_over(hooks[1], "frame")) is not None:
                setattr(frame, _MARK, block)
        if hooks is not None or not torch.is_grad_enabled():
            for checkpoint in _running():
                self.repeats = True
                setattr(checkpoint, _MARK, block)

    def is_disabled(self, layer: nn.Module) -> bool:
        """Whether the layer computes without any adapter."""
        return not (layer.enabled or layer.merged)

    def reason(self, layer: nn.Module, names: Sequence[str]) -> str | None:
        """Why the layer cannot run in segments with these adapters; None if it can."""
        read = getattr(layer, "segment_reason", None)
        return f"a {type(layer).__name__}" if read is None else read(names)

    def adapter(self, layer: nn.Module, x: Tensor, name: str) -> NamedAdapter | None:
        """The adapter of that name; None if the layer has none."""
        return layer.named_adapter(name)

    def plain_base(
        self, layer: nn.Module, names: Sequence[str]
    ) -> tuple[Tensor, Tensor | None] | None:
        """The base's weight as ``(out, in)`` and its bias; None if it runs its own forward."""
        return layer.plain_base()

    def base_output(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer's output without an adapter."""
        return layer.base_output(x)

    def impl(self, layer: nn.Module) -> str:
        """The layer's implementation."""
        return layer.impl

    def __reduce__(self):
        return type(None), ()  # a copy is outside of the block


@contextmanager
def opened(block: Block, route: type[SegmentRoute]) -> Iterator[None]:
    """Run the layers of ``block`` in it, in this thread.

    Raises:
        RuntimeError: one of them already runs in a block.
    """
    before = _blocks()
    for other in before:
        if shared := [place for m, place in block.places.items() if m in other.places]:
            raise RuntimeError(
                "expected adapter_segments of a model outside of another one, got"
                f" {shared[0]}, which already runs in one: they cannot be nested"
            )
    with _lock:
        for layer in block.places:
            if route.attribute not in vars(layer) and "torch._dynamo" in sys.modules:
                torch._dynamo.reset()  # compiled code has no guard on a missing attribute
            held = vars(layer).get(route.attribute)
            if held is None or held._layer() is not layer:
                held = vars(layer)[route.attribute] = route(layer)
            held.users += 1
            _in_blocks.add(layer)
    _stash_obj_in_tls(_KEY, (*before, block))
    try:
        yield
    finally:
        block.open = False
        _stash_obj_in_tls(_KEY, before)
        with _lock:
            for layer in block.places:
                held = vars(layer)[route.attribute]
                held.users -= 1
                if not held.users:
                    _in_blocks.discard(layer)
                    if not held.repeats:
                        vars(layer)[route.attribute] = None


def check_closed(attribute: str, layers: set[nn.Module] | None, doing: str) -> None:
    """Check that no layer runs in a block, in any thread.

    Args:
        attribute: of the kind of route.
        layers: those to check, all by default.

    Raises:
        RuntimeError: one does.
    """
    for layer in list(_in_blocks):
        route = vars(layer).get(attribute)
        if route is not None and route.users and (layers is None or layer in layers):
            raise RuntimeError(f"expected {doing} outside of adapter_segments, got it inside")


def _blocks() -> tuple[Block, ...]:
    return _get_obj_in_tls(_KEY) if _is_key_in_tls(_KEY) else ()


def _repeated() -> Iterator[object]:
    """What identifies the checkpoints whose function runs again now, the innermost first."""
    for frame in _frames():
        code = frame.f_code
        if code.co_name == "unpack_hook" and "frame" in code.co_freevars:
            yield frame.f_locals["frame"]  # of torch.utils.checkpoint, without reentry
        elif _is_function(code, "backward"):
            yield frame.f_locals["ctx"]


def _running() -> Iterator[object]:
    """The same of the checkpoints whose function runs for the first time."""
    for frame in _frames():
        code = frame.f_code
        if _is_function(code, "forward"):
            yield frame.f_locals["ctx"]
        elif code.co_name == "checkpoint" and "gen" in code.co_varnames:
            inner = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            if inner is not None and (found := inner.f_locals.get("new_frame")) is not None:
                yield found


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_function(code, name: str) -> bool:
    return code.co_name == name and code.co_argcount > 0 and code.co_varnames[0] == "ctx"


def _closed_over(function, name: str) -> object | None:
    """The value of a variable that a function has from the one around it."""
    code = getattr(function, "__code__", None)
    if code is None or name not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index(name)].cell_contents


class _WithZeros(torch.autograd.Function):
    """``y``, with zero gradients of tensors that it does not depend on."""

    @staticmethod
    def forward(ctx, y, *absent):
        ctx.save_for_backward(*absent)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *map(torch.zeros_like, ctx.saved_tensors)
