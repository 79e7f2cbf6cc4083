"""Selects the implementation and strategies of a call, with a reason; "auto" can fall back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.config import is_aligned
from ..strategy import cost, devices, tuning_cache
from . import cpu_gemm, torch_impl
from .dropout import KEEP_ALL
from .segments import Segments
from .triton_impl import TritonRunner, described, forget_failures

# The oldest version that passes every test; torch 2.11 includes it.
MIN_TRITON = (3, 6)
_OLDEST = ".".join(map(str, MIN_TRITON))
_CURE = (
    f"the kernels need Triton {_OLDEST} or newer: a GPU build of torch 2.11 or newer includes it;"
    " on Linux, pip install -U triton installs it"
)
_UNTUNED = "; modelled, not measured for this shape (python -m fused_lora.tune measures it)"


@dataclass(frozen=True)
class Decision:
    """What would run, and why.

    Attributes:
        impl: "triton", "torch" or "reference".
        forward: the strategy: "split", "single_pass" or "addmm" of Triton, or "torch" (PyTorch's
            operators; Triton still computes the mask or the other direction). None without Triton.
        backward: the strategy of backward, one of the same.
        reason: one sentence.
    """

    impl: str
    forward: str | None
    backward: str | None
    reason: str

    def __str__(self) -> str:
        if self.forward is None:
            return f"{self.impl}: {self.reason}"
        return f"{self.impl} (forward {self.forward}, backward {self.backward}): {self.reason}"


def choose(
    x: Tensor,
    weight: Tensor | None,
    lora_B: Tensor,
    impl: str,
    dropped: bool,
    base: Tensor | None = None,
):
    """The runner for ``x (M,K)``: an object with ``forward`` and ``backward``.

    ``base``, if given, replaces the product with the weight.
    """
    if impl == "torch" or (
        impl == "auto" and not _may_run_triton(x, weight if base is None else base)
    ):
        return torch_impl
    aligned = is_aligned(x.stride(0) * x.element_size(), x.data_ptr())
    (M, K), (N, R) = x.shape, lora_B.shape
    dtype = x.dtype
    if base is not None:  # the kernels have only one strategy without a weight
        dtype, impl = torch.promote_types(dtype, base.dtype), impl.partition(":")[0]
    return _runner(impl, x.device, dtype, M, N, K, R, dropped, aligned)


def choose_backward(
    dy: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, impl: str, dropped: bool
):
    """The runner for ``dy (M,N)`` in the backward operator, which has no access to forward's."""
    if impl == "torch" or (
        impl == "auto" and not _may_run_triton(dy, dy if weight is None else weight)
    ):
        return torch_impl
    (M, N), (R, K) = dy.shape, lora_A.shape
    if weight is None:
        impl = impl.partition(":")[0]
    return _runner(impl, dy.device, dy.dtype, M, N, K, R, dropped, True)


class SegmentedCall(NamedTuple):
    """What the choice for a call over segments depends on, beside x's device and dtype.

    Attributes:
        M, K, N: rows, in_features, out_features.
        segments: their number.
        of_experts: whether each segment has a weight of its own.
        covered: whether every row is known to belong to a segment.
        adapted: rank and keep count of the segments that have an adapter.
        aligned: whether every row of x starts on a 16-byte boundary.
    """

    M: int
    K: int
    N: int
    segments: int
    of_experts: bool
    covered: bool
    adapted: frozenset[tuple[int, int]]
    aligned: bool = True

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, segments: Segments, adapted: Iterable[tuple[int, int]]
    ) -> SegmentedCall:
        """The call on ``x (..., K)`` and a weight ``(N, K)`` or ``(G, N, K)``."""
        M, (N, K) = x.shape[:-1].numel(), weight.shape[-2:]
        pitch = x.stride(-2) if x.dim() > 1 else K
        aligned = is_aligned(pitch * x.element_size(), x.data_ptr())
        covered = segments.covers(M)
        return cls(M, K, N, len(segments), weight.dim() == 3, covered, frozenset(adapted), aligned)


def choose_segmented(x: Tensor, impl: str, call: SegmentedCall) -> TritonRunner | None:
    """What runs the kernels over segments of ``x (M,K)``; None: PyTorch's operators compute it."""
    decision = decide_segmented(impl, x.device, x.dtype, call)
    if decision.impl == "torch":
        return None
    rank = max(rank for rank, _ in call.adapted)
    key = ("segments", x.device, x.dtype, call.K, call.N, rank)
    return TritonRunner(decision, x.device, key if impl == "auto" else None)


@lru_cache(maxsize=4096)
def decide_segmented(impl, device, dtype, call: SegmentedCall) -> Decision:
    """As :func:`decide`, over segments."""
    if impl == "torch":
        return Decision("torch", None, None, f"requested{_widened(device, dtype)}")
    problem = _not_worth_it(device) if impl == "auto" else None
    problem = problem or triton_problem(device) or _dtype_problem(dtype)
    if problem is None and len({count for _, count in call.adapted}) > 1:
        problem = "the kernels drop entries of all segments with one probability, got several"
    # Such rows get the common weight's base output, which the kernels do not compute.
    rest = None if call.of_experts or call.covered else "there may be rows of no segment"
    if impl == "triton:split" and rest:
        problem = problem or f"{rest}: Segments(..., whole=True) says that there are none"
    if problem is not None and impl != "auto":
        raise ValueError(f"impl={impl!r} cannot run here: {problem}")
    if problem is not None:
        return Decision("torch", None, None, f"{problem}{_widened(device, dtype)}")
    if 0 in (call.M, call.K, call.N):
        return Decision("torch", None, None, "an empty dimension: there is nothing to launch")
    if not call.adapted:
        return Decision("torch", None, None, "no segment has an adapter: the base product alone")
    if asked := impl.partition(":")[2]:
        return Decision("triton", asked, asked, "segments: requested")
    if rest:
        reason = f"segments: {rest}, so the vendor's GEMM computes the base"
        return Decision("triton", "addmm", "addmm", reason)
    (forward, reason), (backward, backward_reason) = (
        _modelled_segments(call, device, dtype, is_backward) for is_backward in (False, True)
    )
    if backward_reason != reason:
        reason = f"forward: {reason}; backward: {backward_reason}"
    measured = "; modelled, not measured" if device.type == "cuda" else ""
    return Decision("triton", forward, backward, f"segments: {reason}{measured}")


def _modelled_segments(
    call: SegmentedCall, device: torch.device, dtype: torch.dtype, is_backward: bool
) -> tuple[str, str]:
    """As :func:`modelled`, of one direction over segments."""
    from ..kernels import launch

    dropped = any(count < KEEP_ALL for _, count in call.adapted)
    columns, inner = (call.K, call.N) if is_backward else (call.N, call.K)
    return cost.choose_strategy(
        devices.device_of(device),
        dtype.itemsize,
        call.M,
        columns,
        inner,
        max(rank for rank, _ in call.adapted),
        masked=("output" if is_backward else "operand") if dropped else None,
        aligned=(call.aligned or is_backward)
        and is_aligned(call.K * dtype.itemsize, call.N * dtype.itemsize),
        gradients=is_backward,
        strategies=("split", "addmm"),
        repeated=launch.REPEATS,
        segments=call.segments,
        weights=call.segments if call.of_experts else 1,
    )


def _may_run_triton(x: Tensor, frozen: Tensor) -> bool:
    """Whether these are plain tensors on a GPU; subclasses need PyTorch's own operators."""
    return x.is_cuda and type(x) is Tensor and type(frozen) in (Tensor, nn.Parameter)


@lru_cache(maxsize=4096)
def _runner(impl: str, device, dtype, M, N, K, R, dropped: bool, aligned: bool):
    decision = decide(impl, device, dtype, M, N, K, R, dropped, aligned)
    if decision.impl == "torch":
        return torch_impl
    key = (device, dtype, N, K, R, dropped)  # one failure counts for any number of rows
    return TritonRunner(decision, device, key if impl == "auto" else None)


@lru_cache(maxsize=4096)
def decide(impl, device, dtype, M, N, K, R, dropped, aligned=True) -> Decision:
    if impl == "torch":
        return Decision("torch", None, None, f"requested{_widened(device, dtype)}")
    problem = _not_worth_it(device) if impl == "auto" else None
    problem = problem or triton_problem(device) or _dtype_problem(dtype)
    if problem is not None:
        if impl != "auto":
            raise ValueError(f"impl={impl!r} cannot run here: {problem}")
        if device.type == "cuda" and dtype != torch.float64:
            _warn_once(
                f"fused_lora: PyTorch's operators are used on {device}: {problem}. impl='torch'"
                " selects them without this warning."
            )
        return Decision("torch", None, None, f"{problem}{_widened(device, dtype)}")
    if 0 in (M, N, K):
        return Decision("torch", None, None, "an empty dimension: there is nothing to launch")
    asked = impl.partition(":")[2]

    def strategy(direction: str, rows_aligned: bool) -> tuple[str, str]:
        aligned = rows_aligned and is_aligned(K * dtype.itemsize, N * dtype.itemsize)
        call = tuning_cache.Call(direction, dtype, M, K, N, R, dropped, aligned)
        allowed = call.strategies if impl == "auto" else call.kernel_strategies
        if asked:
            if asked not in allowed:
                able = " or ".join(allowed)
                raise ValueError(f"impl={impl!r} cannot run here: expected {able} for {call.key}")
            return asked, "requested"
        entry = tuning_cache.lookup(call, device)
        if entry is not None and (best := entry.best(allowed)):
            other = "" if best == entry.strategy else f"; {best} is the fastest kernel strategy"
            return best, f"tuned entry {call.key!r}: {entry}{other}"
        chosen, reason = modelled(call, device, allowed)
        return chosen, f"{reason}{_UNTUNED if device.type == 'cuda' else ''}"

    forward, reason = strategy("forward", aligned)
    backward, backward_reason = strategy("backward", True)
    if backward_reason != reason:
        reason = f"forward: {reason}; backward: {backward_reason}"
    if forward == backward == "torch" and not dropped:  # nor a mask that Triton would compute
        return Decision("torch", None, None, reason)
    return Decision("triton", forward, backward, reason)


def modelled(
    call: tuning_cache.Call, device: torch.device, strategies: Collection[str]
) -> tuple[str, str]:
    """The strategy that the cost model chooses for ``call``, and its reason.

    Args:
        strategies: the candidates, of ``call.strategies``.
    """
    from ..kernels import launch

    forward = call.direction == "forward"
    columns, inner = (call.N, call.K) if forward else (call.K, call.N)
    return cost.choose_strategy(
        devices.device_of(device),
        call.dtype.itemsize,
        call.M,
        columns,
        inner,
        call.R,
        masked=call.masked,
        aligned=call.aligned,
        gradients=not forward,
        strategies=strategies,
        repeated=launch.REPEATS,
    )


@lru_cache
def triton_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"the kernels run on CUDA and ROCm devices, got {device.type}"
    try:
        import triton

        if _numbers(triton.__version__) < MIN_TRITON:
            return f"Triton {triton.__version__} is older than {_OLDEST}; {_CURE}"
        from ..kernels import strategies
    except Exception as error:  # a damaged Triton can raise anything, not only ImportError
        return f"Triton cannot be imported ({described(error)}); {_CURE}"
    if device.type == "cpu" and not strategies.INTERPRETED:
        return (
            "the tensors are on a CPU, where Triton runs only in its interpreter:"
            " set TRITON_INTERPRET=1 before the kernels are first used"
        )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """``(3, 6)`` of "3.6.0+git1234"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dtype_problem(dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the kernels compute float16, bfloat16 and float32, got float64"
    return None


def _not_worth_it(device: torch.device) -> str | None:
    """Why "auto" does not use Triton on ``device``, even if it could run there; or None."""
    if device.type != "cuda":
        return f"the tensors are on a {device.type} device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "GPUs before sm_80 lack bfloat16 matrix instructions and asynchronous copies"
    return None


def _widened(device: torch.device, dtype: torch.dtype) -> str:
    """The end of a reason for a dtype that this CPU emulates; empty for others."""
    if device.type != "cpu" or dtype not in cpu_gemm.EMULATED:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"; no instructions for {name} on this CPU: float32 products, for the base from 9 rows"


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def clear_decisions() -> None:
    """Forget cached decisions and failures, for example after tuning."""
    _runner.cache_clear()
    decide.cache_clear()
    decide_segmented.cache_clear()
    triton_problem.cache_clear()
    _warn_once.cache_clear()
    tuning_cache.forget()
    forget_failures()
