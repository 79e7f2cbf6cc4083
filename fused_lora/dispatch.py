"""Who runs a call: the choice of implementation and strategy, its reason, and the fallback."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from . import aten, cost, devices, dropout, tuned
from .runner import TritonRunner, described, forget_failures
from .sharding import is_shard
from .validation import check_dropout, check_impl, check_tensors

# The oldest that runs every test; torch 2.11 brings it.
MIN_TRITON = (3, 6)
_OLDEST = ".".join(map(str, MIN_TRITON))
_CURE = (
    f"the kernels need Triton {_OLDEST} or newer: a GPU build of torch 2.11 or newer brings it, and"
    " on Linux pip install -U triton adds it"
)
_UNTUNED = "; modelled, nothing was measured for this shape (python -m fused_lora.tune does)"


@dataclass(frozen=True)
class Decision:
    """What would run, and why.

    Attributes:
        impl: "triton", "torch" or "reference".
        forward: the strategy: Triton's "split", "single_pass" or "addmm", or "torch" (PyTorch's
            operators, with Triton's mask and the other direction's kernels); None without Triton.
        backward: likewise.
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


def explain(
    target: nn.Module | Tensor,
    weight: Tensor | None = None,
    lora_A: Tensor | None = None,
    *,
    tokens: int = 1024,
    dropout_p: float | None = None,
    impl: str | None = None,
) -> Decision:
    """Which implementation and strategy a call would use, and why. Runs nothing.

    Of an eager call on plain tensors, in ``x``'s own dtype: autocast and compilers are not asked.

    Args:
        target: an adapted layer, or ``x (..., in)`` with ``weight`` and
            ``lora_A`` as for :func:`fused_lora.fused_lora_linear`.
        tokens: number of rows to assume for a module.
        dropout_p: of the call; a module's own unless given.
        impl: as in the call; a module's own unless given.

    Raises:
        TypeError: neither a layer nor three tensors.
        ValueError: an explicit ``impl`` that cannot run here.
    """
    if isinstance(target, nn.Module) and hasattr(target, "lora_A"):
        layer = target
        if tokens < 0:
            raise ValueError(f"expected tokens >= 0, got {tokens}")
        if layer.merged or not layer.enabled:
            state = "merged" if layer.merged else "disabled"
            return Decision("torch", None, None, f"the adapter is {state}: the plain layer")
        if layer.no_kernel is not None:
            return Decision("torch", None, None, f"{layer.no_kernel}, in plain PyTorch")
        weight, lora_A = layer.to_matrix(layer.weight), layer.lora_A
        if is_shard(weight):
            weight = weight.to_local()  # what this rank computes with
        x = torch.empty((tokens, weight.shape[1]), dtype=weight.dtype, device="meta")
        impl = layer.impl if impl is None else impl
        if dropout_p is None:
            dropout_p = layer.dropout if layer.training else 0.0
        if layer.use_dora:
            return _explain_dora(layer, weight, tokens, dropout_p, impl)
    elif all(isinstance(t, Tensor) for t in (target, weight, lora_A)):
        x = target
        if weight.dim() == lora_A.dim() == 2:
            lora_B = lora_A.new_empty((weight.shape[0], lora_A.shape[0]))
            check_tensors(x, weight.detach(), lora_A, lora_B, None, 1.0)
    else:
        raise TypeError(
            "expected an adapted layer, or the tensors x, weight and lora_A, got "
            f"{type(target).__name__}"
        )
    impl = "auto" if impl is None else impl
    dropout_p = 0.0 if dropout_p is None else dropout_p
    check_impl(impl)
    check_dropout(dropout_p)
    rows = x.shape[:-1].numel()
    return _explain(impl, weight, x.dtype, rows, lora_A.shape[0], dropout_p)


def _explain(impl: str, weight: Tensor, dtype, rows: int, rank: int, dropout_p: float) -> Decision:
    if impl == "reference":
        return Decision("reference", None, None, "asked for: eager autograd")
    dropped = dropout.keep_count(dropout_p) < dropout.KEEP_ALL
    return _decide(impl, weight.device, dtype, rows, *weight.shape, rank, dropped)


def _explain_dora(layer, weight: Tensor, tokens: int, dropout_p: float, impl: str) -> Decision:
    """The product that DoRA is built around, and what DoRA adds to it."""
    inner = _explain(impl, weight, weight.dtype, tokens, layer.rank, 0.0)
    added = "DoRA adds, in PyTorch, the norms (one read of the weight) and a product with y"
    if dropout_p:
        added += ", and with dropout a second product with the weight"
    return replace(inner, reason=f"{inner.reason}; {added}")


def choose(
    x: Tensor,
    weight: Tensor | None,
    lora_B: Tensor,
    impl: str,
    dropped: bool,
    base: Tensor | None = None,
):
    """The runner for ``x (M,K)``: an object with ``dropout_mask``, ``forward`` and ``backward``.

    ``base`` is the output that takes the weight's place.
    """
    if impl == "torch" or (
        impl == "auto" and not _may_run_triton(x, weight if base is None else base)
    ):
        return aten
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    (M, K), (N, R) = x.shape, lora_B.shape
    dtype = x.dtype
    if base is not None:  # beside which there is one way only
        dtype, impl = torch.promote_types(dtype, base.dtype), impl.partition(":")[0]
    return _runner(impl, x.device, dtype, M, N, K, R, dropped, aligned)


def choose_backward(
    dy: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, impl: str, dropped: bool
):
    """The runner of a backward whose forward chose in another place, for ``dy (M,N)``."""
    if impl == "torch" or (
        impl == "auto" and not _may_run_triton(dy, dy if weight is None else weight)
    ):
        return aten
    (M, N), (R, K) = dy.shape, lora_A.shape
    if weight is None:
        impl = impl.partition(":")[0]
    return _runner(impl, dy.device, dy.dtype, M, N, K, R, dropped, True)


def _may_run_triton(x: Tensor, frozen: Tensor) -> bool:
    """A plain tensor on a GPU; subclasses need PyTorch's own operators."""
    return x.is_cuda and type(x) is Tensor and type(frozen) in (Tensor, nn.Parameter)


@lru_cache(maxsize=4096)
def _runner(impl: str, device, dtype, M, N, K, R, dropped: bool, aligned: bool):
    decision = _decide(impl, device, dtype, M, N, K, R, dropped, aligned)
    if decision.impl == "torch":
        return aten
    key = (device, dtype, N, K, R, dropped)
    return TritonRunner(decision, device, key if impl == "auto" else None)


@lru_cache(maxsize=4096)
def _decide(impl, device, dtype, M, N, K, R, dropped, aligned=True) -> Decision:
    if impl == "torch":
        return Decision("torch", None, None, f"asked for{_widened(device, dtype)}")
    problem = _not_worth_it(device) if impl == "auto" else None
    problem = problem or triton_problem(device) or _dtype_problem(dtype)
    if problem is not None:
        if impl != "auto":
            raise ValueError(f"impl={impl!r} cannot run here: {problem}")
        if device.type == "cuda" and dtype != torch.float64:
            _warn_once(
                f"fused_lora: PyTorch's products are used on {device}: {problem}. impl='torch' asks"
                " for them without this warning."
            )
        return Decision("torch", None, None, f"{problem}{_widened(device, dtype)}")
    if 0 in (M, N, K):
        return Decision("torch", None, None, "an empty dimension: there is nothing to launch")
    asked = impl.partition(":")[2]

    def strategy(direction: str, rows_aligned: bool) -> tuple[str, str]:
        aligned = rows_aligned and K * dtype.itemsize % 16 == N * dtype.itemsize % 16 == 0
        call = tuned.Call(direction, dtype, M, K, N, R, dropped, aligned)
        allowed = call.strategies if impl == "auto" else call.kernel_strategies
        if asked:
            if asked not in allowed:
                able = " or ".join(allowed)
                raise ValueError(f"impl={impl!r} cannot run here: expected {able} for {call.key}")
            return asked, "asked for"
        entry = tuned.lookup(call, device)
        if entry is not None and (best := entry.best(allowed)):
            other = "" if best == entry.strategy else f"; {best} is the fastest of the kernels'"
            return best, f"tuned entry {call.key!r}: {entry}{other}"
        chosen, reason = modelled(call, device, with_torch=impl == "auto")
        return chosen, f"{reason}{_UNTUNED if device.type == 'cuda' else ''}"

    forward, reason = strategy("forward", aligned)
    backward, backward_reason = strategy("backward", True)
    if backward_reason != reason:
        reason = f"forward: {reason}; backward: {backward_reason}"
    if forward == backward == "torch" and not dropped:  # not even the mask is Triton's
        return Decision("torch", None, None, reason)
    return Decision("triton", forward, backward, reason)


def modelled(call: tuned.Call, device: torch.device, *, with_torch: bool = True) -> tuple[str, str]:
    """The strategy that the cost model chooses for ``call``, and its reason.

    Args:
        with_torch: whether PyTorch's operators alone are a candidate.
    """
    from .kernels import launch

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
        with_torch=with_torch,
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
        from .kernels import ops
    except Exception as error:  # a damaged or foreign Triton fails in other ways than ImportError
        return f"Triton cannot be imported ({described(error)}); {_CURE}"
    if device.type == "cpu" and not ops.INTERPRETED:
        return (
            "the tensors are on a CPU, where Triton runs only interpreted; set TRITON_INTERPRET=1"
            " before the kernels are first used"
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
    """Why "auto" leaves Triton aside although it could run."""
    if device.type != "cuda":
        return f"the tensors are on a {device.type} device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "GPUs before sm_80 lack bfloat16 matrix instructions and asynchronous copies"
    return None


def _widened(device: torch.device, dtype: torch.dtype) -> str:
    """What a reason says of a dtype that a CPU emulates."""
    if device.type != "cpu" or dtype not in aten.EMULATED:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"; this CPU has no instructions for {name}: products in float32, the base's from 9 rows"


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def clear_decisions() -> None:
    """Forget cached decisions and failures, as after a change of tuning."""
    _runner.cache_clear()
    _decide.cache_clear()
    triton_problem.cache_clear()
    _warn_once.cache_clear()
    tuned.forget()
    forget_failures()
