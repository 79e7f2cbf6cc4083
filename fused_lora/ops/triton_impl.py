"""The kernels with a decision taken; under "auto" with PyTorch's products behind them."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from ..kernels.config import DIGITS
from . import dropout, torch_impl

_failed: set[tuple] = set()

# Part of the error's text or of its type's name, and what to do about it.
_CURES = (
    ("OutOfResources", "a smaller rank needs less"),
    ("C compiler", "install gcc or clang, or set CC: Triton builds its launcher with it"),
    ("libcuda.so", "make the GPU driver's libcuda.so.1 visible to ldconfig"),
    ("active drivers", "install the GPU's driver and a torch build for it"),
    ("Python.h", "install Python's headers (python3-dev): Triton builds its launcher with them"),
)


def run_forward(strategies, strategy: str, *args):
    """As :func:`.torch_impl.forward` by ``strategy``, "torch" for PyTorch itself."""
    if strategy == "torch":
        return torch_impl.forward(*args)
    *args, base = args
    return strategies.forward(*args, strategy, base)


def run_backward(strategies, strategy: str, dy, x, weight, lora_A, lora_B, S, *args):
    """As :func:`.torch_impl.backward`, likewise; reads what either forward has saved."""
    if strategy == "torch":
        return torch_impl.backward(dy, x, weight, lora_A, lora_B, S, *args)
    if S is not None and S.dtype != torch.float32:  # PyTorch's is in x's dtype
        S = S.float()
    return strategies.backward(dy, x, weight, lora_A, lora_B, S, *args, strategy)


# Of the driver's messages, those after which its context is lost.
_STICKY = ("illegal", "misaligned address", "launch failure", "assert", "hardware stack error")


class TritonRunner:
    """What :func:`.dispatch.choose` gives for the kernels.

    Args:
        decision: with a strategy each way, "torch" perhaps for one of them.
        device: of the tensors.
        fallback_key: under "auto", what a failure is remembered by; None raises it.
    """

    def __init__(self, decision, device: torch.device, fallback_key: tuple | None):
        from ..kernels import strategies

        self.ops = strategies
        self.decision = decision
        self.device = device
        self.key = fallback_key

    def dropout_mask(self, seed: Tensor, rows: int, columns: int, keep: int) -> Tensor:
        """Keep bits ``int32 (rows, words)``; see :mod:`.dropout`."""

        def kernel():
            keep_bits = dropout.empty_keep_bits(rows, columns, seed.device)
            self.ops.dropout_mask(keep_bits, seed, keep, DIGITS)
            return keep_bits

        return self._run(kernel, lambda: torch_impl.dropout_mask(seed, rows, columns, keep))

    def forward(self, *args, base):
        """As :func:`.torch_impl.forward`."""
        if self.decision.forward == "torch":
            return torch_impl.forward(*args, base)
        return self._run(
            lambda: run_forward(self.ops, self.decision.forward, *args, base),
            lambda: torch_impl.forward(*args, base),
        )

    def backward(self, *args):
        """As :func:`.torch_impl.backward`."""
        if self.decision.backward == "torch":
            return torch_impl.backward(*args)
        return self._run(
            lambda: run_backward(self.ops, self.decision.backward, *args),
            lambda: torch_impl.backward(*args),
        )

    def _run(self, kernels, instead):
        if self.key in _failed:
            return instead()
        try:
            # Triton launches on the current device, whatever the tensors' device is.
            elsewhere = self.device.type == "cuda" and (
                self.device.index != torch.cuda.current_device()
            )
            with torch.cuda.device(self.device) if elsewhere else nullcontext():
                return kernels()
        except Exception as error:
            # An asynchronous error leaves the device unusable, and memory is missing either way.
            if self.key is None or isinstance(error, torch.OutOfMemoryError) or is_sticky(error):
                raise
            _failed.add(self.key)
            warnings.warn(
                f"fused_lora: Triton failed ({described(error)}); PyTorch's products are used for"
                " this layer shape from now on. impl='torch' asks for them without this warning;"
                " impl='triton' raises the error.",
                stacklevel=2,
            )
            return instead()


def is_sticky(error: BaseException) -> bool:
    """Whether the device is unusable after ``error``: everything that follows on it fails too."""
    if isinstance(error, torch.AcceleratorError):
        return True
    text = str(error)  # Triton's own are RuntimeErrors
    return "Triton Error" in text and any(kind in text for kind in _STICKY)


def forget_failures() -> None:
    """Let every shape try the kernels again."""
    _failed.clear()


def described(error: Exception) -> str:
    """Type and first line of an error, and what to do about it where that is known."""
    kind = type(error).__name__
    first_line = str(error).strip().partition("\n")[0]
    text = f"{kind}: {first_line}"
    for part, cure in _CURES:
        if part == kind or part in str(error):
            return f"{text}; {cure}"
    return text
