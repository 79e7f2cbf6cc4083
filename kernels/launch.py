"""Launches that cost the host little.

Triton finds the binary of a call anew each time: it looks at every argument's dtype, alignment and
divisibility. All of these follow from the tensors' shapes, strides, dtypes and alignment and from
the config, so a launch that has them as before is repeated, with other addresses. Where anything
else can change the binary or watch launches (hooks, debugging, an unknown Triton) it is plain.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter import INTERPRETED

# Whose compiled kernels are known to be run as :class:`_Plan` does; others are launched plainly.
KNOWN = {"3.6", "3.7", "3.8", "3.9"}
# Whether launches are repeated, unless something watches them: see :func:`_observed`.
REPEATS = ".".join(triton.__version__.split(".")[:2]) in KNOWN and not INTERPRETED
_BUFFERS_HAVE_SIZES = torch.version.hip is not None  # Triton specialises on them there
_BUFFER_BYTES = 1 << 31
_MOST_PLANS = 4096
_MOST_ADDRESSES = 256  # of one descriptor

_plans: dict[tuple, "_Plan"] = {}


class Tile(NamedTuple):
    """A tensor, or its transpose, that the kernel takes as a descriptor of ``block``."""

    tensor: torch.Tensor
    block: tuple[int, int]
    transposed: bool = False

    def descriptor(self) -> TensorDescriptor:
        t = self.tensor.t() if self.transposed else self.tensor
        return TensorDescriptor(t, t.shape, t.stride(), list(self.block))


class Arguments(NamedTuple):
    """A launch, but for what may change without another binary; in the kernel's order.

    Attributes:
        grid: programs along each axis.
        operands: tensors and :class:`Tile`; before the scalars.
        numbers: integers; after the scalars.
        constants: by name; last.
        options: ``num_warps`` and ``num_stages``.
    """

    grid: tuple[int, ...]
    operands: tuple[torch.Tensor | Tile, ...]
    numbers: tuple[int, ...]
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
    """Launch ``kernel`` on the current device as ``arguments(config, *tensors, *flags)`` says.

    Args:
        arguments: a function of nothing but the flags and the tensors' shapes, strides, dtypes and
            alignment to 16 bytes, whose operands are among ``tensors``.
        config: hashable by identity; None if there is none to choose.
        tensors: those that may be operands, or None where one is left out.
        scalars: floats, and integers of 32 bits that the kernel does not specialise.
        flags: hashable.
    """
    if not REPEATS or _observed(kernel):
        _launch_plainly(kernel, arguments(config, *tensors, *flags), scalars)
        return
    active = driver.active
    device = active.get_current_device()
    key = (
        arguments,
        id(config),
        device,
        flags,
        *[
            t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0)
            for t in tensors
        ],
    )
    if _BUFFERS_HAVE_SIZES:
        key += tuple(
            t is not None and t.untyped_storage().nbytes() < _BUFFER_BYTES for t in tensors
        )
    plan = _plans.get(key)
    if plan is not None:
        plan.repeat(tensors, scalars, active.get_current_stream(device))
        return
    tensors = [t if t is None else t.detach() for t in tensors]  # an object each, if one came twice
    made = arguments(config, *tensors, *flags)
    compiled = _launch_plainly(kernel, made, scalars)
    if isinstance(compiled, CompiledKernel):
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = _Plan(compiled, made, config, tensors)


def forget() -> None:
    """Look every binary up again, as after another driver was made the active one."""
    _plans.clear()


def _observed(kernel) -> bool:
    """Whether somebody looks at launches, or wants other code than usual."""
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

    def __init__(self, compiled, made: Arguments, config, tensors: list):
        self.run, self.function = compiled.run, compiled.function
        self.metadata = compiled.packed_metadata
        self.kept = compiled, config  # the binary loaded, and its config's identity its own
        self.grid = (*made.grid, 1, 1)[:3]
        self.rest = (*made.numbers, *made.constants.values())
        self.operands = [_place(operand, tensors) for operand in made.operands]

    def repeat(self, tensors: tuple, scalars: tuple[float, ...], stream: int) -> None:
        operands = [
            tensors[at] if descriptors is None else descriptors[tensors[at].data_ptr()]
            for at, descriptors in self.operands
        ]
        # No metadata and no hooks: nobody listens.
        self.run(
            *self.grid, stream, self.function, self.metadata, None, None, None,
            *operands, *scalars, *self.rest,
        )  # fmt: skip


def _place(operand: torch.Tensor | Tile, tensors: list) -> tuple[int, "_Descriptors | None"]:
    """Which of ``tensors`` an operand is, and its descriptors."""
    tile = operand if isinstance(operand, Tile) else None
    tensor = operand if tile is None else tile.tensor
    at = next(i for i, t in enumerate(tensors) if t is tensor)
    return at, None if tile is None else _Descriptors(tile)


class _Address(NamedTuple):
    """What a descriptor reads of its tensor; keeps no memory alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Descriptors(dict):
    """Descriptors of one shape, strides and block, by address."""

    def __init__(self, tile: Tile):
        t = tile.tensor.t() if tile.transposed else tile.tensor
        self.dtype, self.rest = t.dtype, (t.shape, t.stride(), list(tile.block))

    def __missing__(self, address: int) -> TensorDescriptor:
        if len(self) >= _MOST_ADDRESSES:
            self.clear()
        made = self[address] = TensorDescriptor(_Address(address, self.dtype), *self.rest)
        return made
