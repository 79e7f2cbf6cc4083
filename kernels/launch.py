"""Launches with little host overhead.

For every launch Triton selects the compiled binary again, by each argument's dtype, alignment and
divisibility. All of these follow from the config and the tensors' shapes, strides, dtypes and
alignment. If these are the same as in an earlier launch, that launch is repeated with the new
addresses. If anything else can change the binary or observes launches (hooks, debugging, an unknown
Triton), Triton's own launch is used.
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

# Versions of Triton whose compiled kernels can be run as :class:`_Plan` runs them.
KNOWN = {"3.6", "3.7", "3.8", "3.9"}
# Whether launches are repeated; one that is observed is not, see :func:`_observed`.
REPEATS = ".".join(triton.__version__.split(".")[:2]) in KNOWN and not INTERPRETED
# On AMD GPUs Triton specialises on whether a buffer is smaller than 2 GiB.
_BUFFERS_HAVE_SIZES = torch.version.hip is not None
_BUFFER_BYTES = 1 << 31
_MOST_PLANS = 4096
_MOST_ADDRESSES = 256  # cached descriptors per operand

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
        operands: tensors and :class:`Tile`.
        numbers: integers that the kernel may specialise.
        constants: ``tl.constexpr`` parameters by name.
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
    """Launch ``kernel`` on the current device with ``arguments(config, *tensors, *flags)``.

    Args:
        arguments: a function whose result depends only on the config, the flags and the tensors'
            shapes, strides, dtypes and alignment to 16 bytes; its operands are among ``tensors``.
        config: identified by ``id``: pass the same object each time; None if the kernel has none.
        tensors: the possible operands; None for one that is omitted.
        scalars: floats, and 32-bit integers that the kernel does not specialise.
        flags: hashable arguments of ``arguments``.
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
    # Distinct objects even if one tensor was passed twice: :func:`_place` compares by identity.
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

    def __init__(self, compiled, made: Arguments, config, tensors: list):
        self.run, self.function = compiled.run, compiled.function
        self.metadata = compiled.packed_metadata
        self.kept = compiled, config  # keeps the binary loaded and the id of the config unique
        self.grid = (*made.grid, 1, 1)[:3]
        self.rest = (*made.numbers, *made.constants.values())
        self.operands = [_place(operand, tensors) for operand in made.operands]

    def repeat(self, tensors: tuple, scalars: tuple[float, ...], stream: int) -> None:
        operands = [
            tensors[at] if descriptors is None else descriptors[tensors[at].data_ptr()]
            for at, descriptors in self.operands
        ]
        # None: launch metadata and the two hooks; nothing observes the launch.
        self.run(
            *self.grid, stream, self.function, self.metadata, None, None, None,
            *operands, *scalars, *self.rest,
        )  # fmt: skip


def _place(operand: torch.Tensor | Tile, tensors: list) -> tuple[int, "_Descriptors | None"]:
    """Index of an operand in ``tensors``, and its descriptors if it is a :class:`Tile`."""
    tile = operand if isinstance(operand, Tile) else None
    tensor = operand if tile is None else tile.tensor
    at = next(i for i, t in enumerate(tensors) if t is tensor)
    return at, None if tile is None else _Descriptors(tile)


class _Address(NamedTuple):
    """The part of a tensor that a descriptor reads; it does not keep the memory alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Descriptors(dict):
    """Descriptors with one shape, strides and block, created on demand and cached by address."""

    def __init__(self, tile: Tile):
        t = tile.tensor.t() if tile.transposed else tile.tensor
        self.dtype, self.rest = t.dtype, (t.shape, t.stride(), list(tile.block))

    def __missing__(self, address: int) -> TensorDescriptor:
        if len(self) >= _MOST_ADDRESSES:
            self.clear()
        made = self[address] = TensorDescriptor(_Address(address, self.dtype), *self.rest)
        return made
