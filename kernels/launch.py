"""Launches with little host overhead.

For every launch Triton selects the compiled binary again, by each argument's dtype, alignment and
divisibility. All of these follow from the config and the tensors' shapes, strides, dtypes and
alignment. If these are the same as in an earlier launch, that launch is repeated with the new
addresses: by the C function that Triton's launcher calls, with each descriptor encoded once per
address. If anything else can change the binary or observes launches (hooks, debugging, an unknown
Triton), Triton's own launch is used.
"""

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter import INTERPRETED

# Versions of Triton whose compiled kernels can be run as :class:`_Plan` runs them.
KNOWN = {"3.6", "3.7", "3.8", "3.9"}
# Whether launches are repeated; one that is observed is not, see :func:`_observed`.
REPEATS = ".".join(triton.__version__.split(".")[:2]) in KNOWN and not INTERPRETED
# On AMD GPUs Triton specialises on whether a buffer is smaller than 2 GiB.
_BUFFERS_HAVE_SIZES = torch.version.hip is not None
_BUFFER_BYTES = 1 << 31
_MOST_PLANS = 4096
_MOST_ADDRESSES = 512  # encoded descriptors per operand: more than a model's layers of one shape

_plans: dict[tuple, "_Plan"] = {}


class Tile(NamedTuple):
    """A tensor, or its transpose, passed to the kernel as a descriptor of ``block`` tiles."""

    tensor: torch.Tensor
    block: tuple[int, int]
    transposed: bool = False

    def descriptor(self) -> TensorDescriptor:
        t = self.tensor.t() if self.transposed else self.tensor
        return TensorDescriptor(t, t.shape, t.stride(), list(self.block))


class Arguments(NamedTuple):
    """A launch without its scalars, which may change without another binary.

    The kernel's parameters are the operands, the scalars, the numbers, then the constants.

    Attributes:
        grid: programs along each axis.
        operands: tensors and :class:`Tile`; None for a parameter that is not in the binary.
        numbers: integers that the kernel may specialise, or None likewise.
        constants: ``tl.constexpr`` parameters by name.
        options: ``num_warps``, ``num_stages``, and ``launch_pdl`` if it is on.
    """

    grid: tuple[int, ...]
    operands: tuple[torch.Tensor | Tile | None, ...]
    numbers: tuple[int | None, ...]
    constants: dict[str, object]
    options: dict[str, int]


def launch(
    kernel,
    arguments: Callable[..., Arguments],
    config,
    tensors: tuple[torch.Tensor | None, ...],
    scalars: tuple[float, ...],
    *flags,
) -> None:
    """Launch ``kernel`` on the current device with ``arguments(config, *tensors, *flags)``.

    Args:
        arguments: a function whose result depends only on the config, the flags and the tensors'
            shapes, strides, dtypes and alignment to 16 bytes; its operands are among ``tensors``.
        config: identified by ``id``: pass the same object each time; None if the kernel has none.
        tensors: the possible operands, on the current device; None for one that is omitted.
        scalars: floats, and 32-bit integers that the kernel does not specialise.
        flags: hashable arguments of ``arguments``.
    """
    if not REPEATS or _observed(kernel):
        _launch_plainly(kernel, arguments(config, *tensors, *flags), scalars)
        return
    active = driver.active
    device = active.get_current_device()
    key, addresses = [arguments, id(config), device, flags], []
    for t in tensors:
        if t is None:
            key.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            key.append((t.shape, t.stride(), t.dtype, t.get_device(), address % 16 == 0))
            addresses.append(address)
    if _BUFFERS_HAVE_SIZES:
        key += [t is not None and t.untyped_storage().nbytes() < _BUFFER_BYTES for t in tensors]
    key = tuple(key)
    plan = _plans.get(key)
    if plan is not None:
        plan.repeat(addresses, scalars, active.get_current_stream(device))
        return
    # Distinct objects even if one tensor was passed twice: :class:`_Plan` compares by identity.
    tensors = [t if t is None else t.detach() for t in tensors]
    made = arguments(config, *tensors, *flags)
    compiled = _launch_plainly(kernel, made, scalars)
    if isinstance(compiled, CompiledKernel):
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = _Plan(compiled, made, config, tensors)


def forget() -> None:
    """Drop all plans, so that binaries are looked up again, for example with another driver."""
    _plans.clear()


def _observed(kernel) -> bool:
    """Whether hooks observe launches, or debugging or instrumentation changes the code."""
    runtime = knobs.runtime
    return bool(
        runtime.debug
        or kernel.debug
        or kernel.pre_run_hooks
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def _launch_plainly(kernel, made: Arguments, scalars: tuple[float, ...]):
    operands = (o.descriptor() if isinstance(o, Tile) else o for o in made.operands)
    return kernel[made.grid](*operands, *scalars, *made.numbers, **made.constants, **made.options)


class _Plan:
    """A compiled launch, to be repeated on tensors of the same shapes, strides and alignment."""

    def __init__(self, compiled: CompiledKernel, made: Arguments, config, tensors: list):
        self.kept = compiled, config  # keeps the binary loaded and the id of the config unique
        self.entry = _entry(compiled, (*made.grid, 1, 1)[:3])
        self.rest = (*made.numbers, *made.constants.values())
        encoders = _encoders(compiled, self.entry)
        self.operands = [_place(operand, tensors, encoders) for operand in made.operands]

    def repeat(self, addresses: list[int | None], scalars: tuple[float, ...], stream: int) -> None:
        given = []
        for at, encoded in self.operands:
            if encoded is None:
                given.append(addresses[at])
            else:
                given += encoded[addresses[at]]
        given += scalars
        given += self.rest
        function, before, after, packed = self.entry
        if packed:
            function(*before, stream, *after, given)
        else:
            function(*before, stream, *after, *given)


class _Entry(NamedTuple):
    """A function that launches a binary: ``function(*before, stream, *after, *given)``.

    ``given`` are the kernel's arguments; they are one argument, a sequence, if ``packed``.
    """

    function: Callable
    before: tuple
    after: tuple
    packed: bool


def _entry(compiled: CompiledKernel, grid: tuple[int, int, int]) -> _Entry:
    """The C function that Triton's launcher calls, or the launcher itself if its calls vary."""
    launcher = compiled.run
    # None: launch metadata and the two hooks; nothing observes the launch.
    after = compiled.function, compiled.packed_metadata, None, None, None
    in_python = _Entry(launcher, grid, after, packed=False)
    launch = getattr(launcher, "launch", None)
    # Scratch memory is allocated anew for every launch.
    scratch = [getattr(launcher, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    if launch is None or any(scratch):
        return in_python
    # The order of the arguments depends on the version and the backend: copy the launcher's.
    calls, probe, stream, given = [], copy.copy(launcher), object(), object()
    probe.launch = lambda *arguments: calls.append(arguments)
    probe(*grid, stream, *after, given)
    *arguments, last = calls[0]
    packed = last == (given,)
    if stream not in arguments or not (packed or last is given):
        return in_python
    before, after = arguments[: arguments.index(stream)], arguments[arguments.index(stream) + 1 :]
    # For a kernel with descriptors, a Python function around the C function encodes them.
    around = inspect.getclosurevars(launch).nonlocals if inspect.isfunction(launch) else {}
    return _Entry(around.get("launcher", launch), tuple(before), tuple(after), packed)


def _encoders(compiled: CompiledKernel, entry: _Entry) -> Iterator[Callable]:
    """For each descriptor of the kernel, a function to the arguments that ``entry`` has for it."""
    launcher = compiled.run
    if entry.function is launcher:
        return itertools.repeat(lambda descriptor: (descriptor,))
    types = [t for t in compiled.src.signature.values() if str(t).startswith("tensordesc")]
    # A list of one for each descriptor that hardware reads; empty if descriptors are decomposed.
    formats = getattr(compiled.metadata, "tensordesc_meta", None)
    formats = [[form] for form in formats] if formats else [[]] * len(types)
    wrap = sys.modules[type(launcher).__module__].wrap_handle_tensordesc
    return (
        partial(_encode, entry, wrap(lambda *arguments: arguments, {0: type_}, form))
        for type_, form in zip(types, formats, strict=True)
    )


def _encode(entry: _Entry, around: Callable, descriptor: TensorDescriptor) -> Sequence:
    """What ``around``, Triton's wrapper of a function in C, passes for ``descriptor``."""
    common = *entry.before, 0, *entry.after
    if entry.packed:
        return around(*common, (descriptor,))[-1]
    return around(*common, descriptor)[len(common) :]


def _place(
    operand: torch.Tensor | Tile | None, tensors: list, encoders: Iterator[Callable]
) -> tuple[int, "_Encoded | None"]:
    """Index of an operand in ``tensors``, and its encoded descriptors if it is a :class:`Tile`."""
    tile = operand if isinstance(operand, Tile) else None
    tensor = operand if tile is None else tile.tensor
    at = next(i for i, t in enumerate(tensors) if t is tensor)
    return at, None if tile is None else _Encoded(tile, next(encoders))


class _Address(NamedTuple):
    """The part of a tensor that a descriptor reads; it does not keep the memory alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Encoded(dict):
    """Arguments that stand for descriptors of one shape, strides and block, by address."""

    def __init__(self, tile: Tile, encode: Callable[[TensorDescriptor], Sequence]):
        t = tile.tensor.t() if tile.transposed else tile.tensor
        self.dtype, self.rest = t.dtype, (t.shape, t.stride(), list(tile.block))
        self.encode = encode

    def __missing__(self, address: int) -> Sequence:
        if len(self) >= _MOST_ADDRESSES:
            self.clear()
        descriptor = TensorDescriptor(_Address(address, self.dtype), *self.rest)
        made = self[address] = self.encode(descriptor)
        return made
