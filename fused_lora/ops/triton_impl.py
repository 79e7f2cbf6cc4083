"""Runs the kernels that a decision names; under "auto", PyTorch's operators replace failed ones."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ..kernels.config import DIGITS
from ..kernels.operands import BackwardOperands, ForwardOperands
from . import dropout, shared_torch, torch_impl
from .constants import constant, scalar

_failed: set[tuple] = set()

# A part of the error's text or the name of its type, and the cure.
_CURES = (
    ("OutOfResources", "a smaller rank needs less"),
    ("C compiler", "install gcc or clang, or set CC: Triton builds its launcher with it"),
    ("libcuda.so", "make the GPU driver's libcuda.so.1 visible to ldconfig"),
    ("active drivers", "install the GPU's driver and a torch build for it"),
    ("Python.h", "install Python's headers (python3-dev): Triton builds its launcher with them"),
)


def run_forward(strategies, strategy: str, operands: ForwardOperands):
    """The forward with ``strategy``; results as of :func:`.torch_impl.forward`.

    Args:
        strategies: the module :mod:`fused_lora.kernels.strategies`, whose import needs Triton.
        strategy: "torch" is :func:`.torch_impl.forward` with the kernel's keep bits.
    """
    x, keep_bits = operands.x, None
    if strategy == "torch":
        if operands.seed is not None:
            keep_bits = _make_keep_bits(strategies, operands.seed, *x.shape, operands.keep_count)
        return torch_impl.forward(operands, keep_bits)
    if operands.seed is not None:
        keep_bits = dropout.empty_keep_bits(*x.shape, x.device)
    operands = _with_scale_tensor(operands, x.device)
    return *strategies.forward(operands, strategy, keep_bits), keep_bits


def run_backward(strategies, strategy: str, operands: BackwardOperands):
    """The backward with ``strategy``, whichever implementation's forward computed ``S``."""
    if strategy == "torch":
        return torch_impl.backward(operands)
    S, dtype = operands.S, operands.dy.dtype
    if S is not None and S.dtype != dtype:  # wider, as compiled code keeps it on a CPU
        operands = operands._replace(S=S.to(dtype))
    return strategies.backward(_with_scale_tensor(operands, operands.dy.device), strategy)


def _with_scale_tensor(operands, device: torch.device):
    """The operands with the scale as a tensor, whose current value a captured graph reads."""
    if isinstance(operands.scaling, Tensor):
        return operands
    return operands._replace(scaling=_scale_tensor(operands.scaling, device))


def _scale_tensor(scaling: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(scaling, Tensor):
        return scaling
    return constant(scalar, float(scaling), device)


def _make_keep_bits(strategies, seed: Tensor, rows: int, columns: int, keep_count: int) -> Tensor:
    keep_bits = dropout.empty_keep_bits(rows, columns, seed.device)
    strategies.dropout_mask(keep_bits, seed, keep_count, DIGITS)
    return keep_bits


# Parts of the driver's error messages after which its context is lost.
_STICKY = ("illegal", "misaligned address", "launch failure", "assert", "hardware stack error")


class TritonRunner:
    """The kernels, with the interface of :mod:`.torch_impl`; :func:`.dispatch.choose` returns it.

    Args:
        decision: a :class:`.dispatch.Decision` with a strategy per direction; it may be "torch".
        device: the tensors' device.
        fallback_key: under "auto", the key to remember a failure by; None: failures are raised.
    """

    def __init__(self, decision, device: torch.device, fallback_key: tuple | None):
        from ..kernels import shared_input, strategies

        self.strategies = strategies
        self.shared = shared_input
        self.decision = decision
        self.device = device
        self.key = fallback_key

    def forward(self, operands: ForwardOperands):
        """Same operands and results as :func:`.torch_impl.forward`."""
        if self.decision.forward == "torch":
            keep_bits = None
            if operands.seed is not None:  # Triton's failure must not be mistaken for PyTorch's
                kernel = partial(_make_keep_bits, self.strategies)
                args = operands.seed, *operands.x.shape, operands.keep_count
                keep_bits = self.run(kernel, dropout.make_keep_bits, *args)
            return torch_impl.forward(operands, keep_bits)
        kernels = partial(run_forward, self.strategies, self.decision.forward)
        return self.run(kernels, torch_impl.forward, operands)

    def rank_dtype(self, x: Tensor, lora_A: Tensor) -> torch.dtype:
        """The dtype in which :meth:`forward` returns ``S`` for ``x (M,K)``."""
        if self.decision.forward == "torch" or self.key in _failed:
            return torch_impl.rank_dtype(x, lora_A)
        return x.dtype  # as the kernels store it

    def backward(self, operands: BackwardOperands):
        """Same operands and results as :func:`.torch_impl.backward`."""
        if self.decision.backward == "torch":
            return torch_impl.backward(operands)
        kernels = partial(run_backward, self.strategies, self.decision.backward)
        return self.run(kernels, torch_impl.backward, operands)

    # The parts of ops/shared_input.py, with the interface of ops/shared_torch.py. Each runs at most
    # one kernel that writes in place, the last: after a failure PyTorch finds its operands intact.

    def shrink(self, x, adapters, seeds, keep_counts):
        """As :func:`.shared_torch.shrink`."""
        if 0 in x.shape:
            return shared_torch.shrink(x, adapters, seeds, keep_counts)
        present = [i for i, adapter in enumerate(adapters) if adapter is not None]
        some = ([values[i] for i in present] for values in (adapters, seeds, keep_counts))
        kernels = partial(self.shared.shrink_shared, scale=self._scale_tensor(1.0))
        found = self.run(kernels, shared_torch.shrink, x, *some)
        S, keep_bits = ([None] * len(adapters) for _ in range(2))
        for i, s, bits in zip(present, *found, strict=True):
            S[i], keep_bits[i] = s, bits
        return S, keep_bits

    def expand(self, x, weight, bias, S, lora_B, scaling):
        """As :func:`.shared_torch.expand`."""
        if S is None or self.decision.forward == "torch":
            return shared_torch.expand(x, weight, bias, S, lora_B, scaling)

        def kernels(x, weight, bias, S, lora_B, scaling):
            scale = self._scale_tensor(scaling)
            operands = ForwardOperands(x, weight, None, lora_B, bias, scale)
            return self.shared.expand(operands, self.decision.forward, S)

        return self.run(kernels, shared_torch.expand, x, weight, bias, S, lora_B, scaling)

    def thin_gradients(self, dy, lora_B, S, scaling, needs=(True, True)):
        """As :func:`.shared_torch.thin_gradients`."""

        def kernels(dy, lora_B, S, scaling, needs):
            return self.shared.thin_gradients(dy, lora_B, S, self._scale_tensor(scaling), needs)

        return self.run(kernels, shared_torch.thin_gradients, dy, lora_B, S, scaling, needs)

    def input_gradients(self, x, dx, adapters, G, keep_bits, inv_keeps, needs):
        """As :func:`.shared_torch.input_gradients`; one launch for adapters of one dropout."""
        together: dict[float | None, list[int]] = {}
        for i, (g, bits, inv_keep) in enumerate(zip(G, keep_bits, inv_keeps, strict=True)):
            if g is not None:
                together.setdefault(None if bits is None else inv_keep, []).append(i)
        dA = [None] * len(adapters)
        for members in together.values():
            operands = (adapters, G, keep_bits, inv_keeps, needs)
            some = ([values[i] for i in members] for values in operands)
            kernels, fallback = self.shared.input_gradients, shared_torch.input_gradients
            for i, gradient in zip(members, self.run(kernels, fallback, x, dx, *some), strict=True):
                dA[i] = gradient
        return dA

    def gated(self, gate, up, activation):
        """As :func:`.shared_torch.gated`."""
        return self.run(self.shared.gated, shared_torch.gated, gate, up, activation)

    def gated_backward(
        self, dy, gate, up, activation, weight, lora_A, G, keep_bits, inv_keep, need_A,
        may_overwrite,
    ):  # fmt: skip
        """As :func:`.shared_torch.gated_backward`."""

        def kernels():
            dh = shared_torch.base_gradient(dy, weight)
            return self.shared.gated_backward(
                gate, up, dh, activation, G, lora_A, keep_bits, inv_keep, may_overwrite
            )

        found = self.run(kernels, lambda: None)
        if found is None:
            return shared_torch.gated_backward(
                dy, gate, up, activation, weight, lora_A, G, keep_bits, inv_keep, need_A,
                may_overwrite,
            )  # fmt: skip
        dgate, dup, h = found
        dA = None
        if need_A:
            operands = ([value] for value in (lora_A, G, keep_bits, inv_keep, True))
            (dA,) = self.input_gradients(h, None, *operands)
        return dgate, dup, dA

    def _scale_tensor(self, scaling: float | Tensor) -> Tensor:
        return _scale_tensor(scaling, self.device)

    def run(self, kernels, fallback, *args):
        """``kernels(*args)``; under "auto", ``fallback(*args)`` if they fail, and from then on."""
        if self.key in _failed:
            return fallback(*args)
        try:
            # Triton launches on the current device, whatever the tensors' device is.
            elsewhere = self.device.type == "cuda" and (
                self.device.index != torch.cuda.current_device()
            )
            with torch.cuda.device(self.device) if elsewhere else nullcontext():
                return kernels(*args)
        except Exception as error:
            # PyTorch could not run either: after a sticky error, or without free memory.
            if self.key is None or isinstance(error, torch.OutOfMemoryError) or is_sticky(error):
                raise
            _failed.add(self.key)
            warnings.warn(
                f"fused_lora: Triton failed ({described(error)}); PyTorch's operators are used for"
                " this layer shape from now on. impl='torch' selects them without this warning;"
                " impl='triton' raises the error.",
                stacklevel=2,
            )
            return fallback(*args)


def is_sticky(error: BaseException) -> bool:
    """Whether the device is unusable after ``error``, so that all later calls fail too."""
    if isinstance(error, torch.AcceleratorError):
        return True
    text = str(error)  # Triton's own errors are RuntimeErrors
    return "Triton Error" in text and any(kind in text for kind in _STICKY)


def forget_failures() -> None:
    """Forget all failures, so that every layer shape tries the kernels again."""
    _failed.clear()


def described(error: Exception) -> str:
    """Type and first line of an error, and the cure if it is known."""
    kind = type(error).__name__
    first_line = str(error).strip().partition("\n")[0]
    text = f"{kind}: {first_line}"
    for part, cure in _CURES:
        if part == kind or part in str(error):
            return f"{text}; {cure}"
    return text
