"""Records and checks every address that a kernel accesses under Triton's interpreter.

``with record() as launches: launcher(...)`` checks each launch when it ends. Every unmasked lane
must read and write an element of a tensor argument, not merely an address inside its span. Every
element of a written tensor must be written exactly once, or at most once if it is named in
``partly``. Tensors from :func:`guarded` lie between guard bands that no kernel may write.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

GUARD = 64  # elements on each side


class AccessError(AssertionError):
    """A launch accessed memory outside its arguments, or did not write an output exactly once."""


@dataclass
class Launch:
    """One launch: bytes per argument name; reads counted once per address and in total."""

    kernel: str
    read_unique: dict[str, int] = field(default_factory=dict)
    read_total: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


class _Region:
    """The elements of one tensor argument, as addresses."""

    def __init__(self, name: str, base: Tensor, shape, strides):
        self.name, self.itemsize = name, base.element_size()
        offsets = np.zeros(1, dtype=np.int64)
        for size, stride in zip(shape, strides, strict=True):
            steps = np.arange(size, dtype=np.int64) * stride
            offsets = (offsets[:, None] + steps).reshape(-1)
        self.elements = np.unique(base.data_ptr() + offsets * self.itemsize).astype(np.uint64)
        self.reads: list[np.ndarray] = []
        self.writes: list[np.ndarray] = []

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.elements, addresses)
        at = np.minimum(at, max(0, self.elements.size - 1))
        return self.elements[at] == addresses if self.elements.size else addresses != addresses


class _Recorder:
    def __init__(self, partly: tuple[str, ...]):
        self.partly = ("tickets_ptr", *partly)  # not every ticket of a workspace is used
        self.launches: list[Launch] = []
        self.regions: list[_Region] = []

    def begin(self, names: list[str], args) -> None:
        self.regions = []
        known = set()
        for name, arg in zip(names, args, strict=False):
            if isinstance(arg, TensorDescriptor):
                base, shape, strides = arg.base, arg.shape, arg.strides
            elif isinstance(arg, Tensor):
                base, shape, strides = arg, arg.shape, arg.stride()
            else:
                continue
            if base.data_ptr() not in known:  # an omitted one repeats another
                known.add(base.data_ptr())
                self.regions.append(_Region(name, base, shape, strides))

    def access(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, kind: str) -> None:
        mask = np.broadcast_to(np.asarray(mask, bool), pointers.shape)  # it may be of integers
        addresses = pointers[mask].reshape(-1).astype(np.uint64)
        for region in self.regions:
            if region.itemsize != itemsize or not addresses.size:
                continue
            inside = region.holds(addresses)
            if inside.any():
                getattr(region, kind).append(addresses[inside])
            addresses = addresses[~inside]
        if addresses.size:
            raise AccessError(f"{kind} outside of every argument, at {addresses[:4].tolist()}")

    def end(self, kernel: str) -> None:
        launch = Launch(kernel)
        for region in self.regions:
            if region.reads:
                reads = np.concatenate(region.reads)
                launch.read_unique[region.name] = np.unique(reads).size * region.itemsize
                launch.read_total[region.name] = reads.size * region.itemsize
            if region.writes:
                places, counts = np.unique(np.concatenate(region.writes), return_counts=True)
                if (counts > 1).any():
                    raise AccessError(f"{kernel} writes elements of {region.name} repeatedly")
                if places.size != region.elements.size and region.name not in self.partly:
                    missing = region.elements.size - places.size
                    raise AccessError(f"{kernel} leaves {missing} elements of {region.name}")
                launch.written[region.name] = places.size * region.itemsize
        self.launches.append(launch)


@contextmanager
def record(partly: tuple[str, ...] = ()):
    """Record and check every launch in the block; yields a list that gets one Launch for each."""
    recorder = _Recorder(partly)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def itemsize(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def recording_load(self, ptrs, mask, *args, **kwargs):
        recorder.access(ptrs.data, mask.data, itemsize(ptrs), "reads")
        return load(self, ptrs, mask, *args, **kwargs)

    def recording_store(self, ptrs, value, mask, *args, **kwargs):
        recorder.access(ptrs.data, mask.data, itemsize(ptrs), "writes")
        return store(self, ptrs, value, mask, *args, **kwargs)

    def recording_call(self, *args, **kwargs):
        recorder.begin(self.arg_names, args)
        call(self, *args, **kwargs)
        recorder.end(self.fn.__name__)

    builder.create_masked_load, builder.create_masked_store = recording_load, recording_store
    executor.__call__ = recording_call
    try:
        yield recorder.launches
    except interpreter.InterpreterError as error:
        if isinstance(error.__cause__, AccessError):
            raise error.__cause__ from None
        raise
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = call


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``tensor`` between two guard bands, and the whole buffer."""
    fill = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    buffer = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor), buffer


def assert_guards(buffer: Tensor) -> None:
    """Check that the guard bands of a buffer from :func:`guarded` are unchanged."""
    bands = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
    untouched = (
        bands.isnan() if bands.is_floating_point() else bands == torch.iinfo(bands.dtype).max
    )
    if not untouched.all():
        raise AccessError("a guard band was written")
