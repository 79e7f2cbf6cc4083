"""The layer as two registered operators, for compilers: ``torch.ops.fused_lora.lora_linear``.

To a compiler each direction is one opaque operator, whose implementation is chosen when it runs, as
in eager mode. Triton therefore runs in compiled models, and the number of tokens may be symbolic.
Both operators are pure functions of their inputs. The dropout seed is an input, drawn outside with
``torch.randint``: an operator that drew its own seed would use another mask when activation
checkpointing recomputes the forward.

Eager mode calls :mod:`.autograd` directly, with less host overhead. An exported model contains
neither operator: see :func:`exported`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..kernels.operands import BackwardOperands
from . import autograd, dispatch, dropout, reference
from .modes import is_compiling, without_autocast
from .operands import Operands
from .torch_impl import as_dtype

# If the package is imported again after removal from sys.modules, replace the old operators.
if hasattr(torch.ops.fused_lora, "_library"):
    torch.ops.fused_lora._library._destroy()
_library = torch.ops.fused_lora._library = torch.library.Library("fused_lora", "FRAGMENT")
# Names in a schema are public: ``keep`` is keep_count, and ``words`` keep_bits.
_library.define(
    "lora_linear(Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? bias,"
    " Tensor scaling, Tensor? seed, int keep, str impl, Tensor? base)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B,"
    " Tensor? S, Tensor scaling, Tensor? words, float inv_keep, str impl, bool[3] needs)"
    " -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def lora_linear(operands: Operands) -> Tensor:
    """:func:`.autograd.lora_linear` for code that a compiler or a dispatch mode intercepts."""
    x, weight, lora_A, lora_B, bias, _, _, _, impl, base = operands
    tensors = (x, weight, lora_A, lora_B, bias, base)
    if not all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        # Subclasses need PyTorch's own operators; DTensors arrive here as plain local tensors.
        if impl.startswith("triton"):
            kinds = ", ".join(sorted({type(t).__name__ for t in tensors if t is not None}))
            raise ValueError(f"impl={impl!r} cannot run here: expected plain tensors, got {kinds}")
        if is_compiling():
            # In PyTorch 2.11, Dynamo returns zero gradients of a Function that writes in place.
            return reference.forward(operands)
        return autograd.lora_linear(operands._replace(impl="torch"))
    if not is_compiling() and torch.is_grad_enabled():
        return _Intercepted.apply(*operands)
    scaling = _on_device(operands.scaling, x)
    return torch.ops.fused_lora.lora_linear(*operands._replace(scaling=scaling))[0]


def exported(operands: Operands, dropout_p: float) -> Tensor:
    """The layer in PyTorch's operators only: an exported or traced model runs without this package.

    Dropout is PyTorch's own too.
    """
    x, weight, lora_A, lora_B, bias, scaling, *_, base = operands
    dtype = x.dtype
    if base is None:
        base = F.linear(x, as_dtype(weight, dtype), None if bias is None else as_dtype(bias, dtype))
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    S = F.linear(dropped, as_dtype(lora_A, dtype))
    branch = reference.scaled(F.linear(S, as_dtype(lora_B, dtype)), scaling)
    return as_dtype(base + branch, base.dtype)


@torch.library.impl(_library, "lora_linear", "CompositeExplicitAutograd")
def _forward(*args):
    """``y (..., N)``, ``S (M,R)``, the keep bits (empty without dropout) and a copy of the scale.

    All are contiguous. Backward reads the copy, since the scale may be written in place before it.
    """
    operands = Operands(*args)
    x, scaling = operands.x, operands.scaling
    with without_autocast(x):
        y, S, keep_bits, _ = autograd.forward(operands._replace(scaling=_on_host(scaling)))
    if keep_bits is None:
        keep_bits = _no_keep_bits(x)
    return y.contiguous(), S.to(_rank_dtype(x)).contiguous(), keep_bits, scaling.clone()


@torch.library.register_fake("fused_lora::lora_linear", lib=_library)
def _(x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl, base):
    K, (N, R) = x.shape[-1], lora_B.shape
    M = math.prod(x.shape[:-1])  # Size.numel() would specialise a symbolic number
    y = x.new_empty((*x.shape[:-1], N), dtype=x.dtype if base is None else base.dtype)
    S = x.new_empty((M, R), dtype=_rank_dtype(x))
    keep_bits = _no_keep_bits(x) if seed is None else dropout.empty_keep_bits(M, K, x.device)
    return y, S, keep_bits, torch.empty_like(scaling)


@torch.library.impl(_library, "lora_linear_backward", "CompositeExplicitAutograd")
def _backward(dy, x, weight, lora_A, lora_B, S, scaling, keep_bits, inv_keep, impl, needs):
    """Those of ``dx (M,K)``, ``dA`` and ``dB`` that ``needs`` selects, contiguous."""
    dropped = keep_bits is not None
    with without_autocast(dy):
        runner = dispatch.choose_backward(dy, weight, lora_A, lora_B, impl, dropped)
        gradients = runner.backward(
            BackwardOperands(
                dy, x, weight, lora_A, lora_B, S, _on_host(scaling), keep_bits, inv_keep,
                tuple(needs),
            )
        )  # fmt: skip
    return [g.contiguous() for g, need in zip(gradients, needs, strict=True) if need]


@torch.library.register_fake("fused_lora::lora_linear_backward", lib=_library)
def _(dy, x, weight, lora_A, lora_B, S, scaling, keep_bits, inv_keep, impl, needs):
    dx = dy.new_empty((dy.shape[0], lora_A.shape[1]))
    made = dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)
    return [gradient for gradient, need in zip(made, needs, strict=True) if need]


class _Registered:
    """The runner of intercepted code: its backward calls the registered operator."""

    def __init__(self, impl: str):
        self.impl = impl

    def backward(self, operands: BackwardOperands):
        operands = operands._replace(scaling=_on_device(operands.scaling, operands.dy))
        *tensors, needs = operands
        _let_counters_count()
        made = iter(torch.ops.fused_lora.lora_linear_backward(*tensors, self.impl, needs))
        return tuple(next(made) if need else None for need in needs)


def _setup_context(ctx, inputs, output):
    _, S, keep_bits, scaling = output
    operands = Operands(*inputs)
    ctx.mark_non_differentiable(S, keep_bits, scaling)
    if operands.seed is None:
        keep_bits = None
    autograd.save(ctx, operands, S, keep_bits, scaling, _Registered(operands.impl))


def _gradient(ctx, dy, *_):
    return autograd.backward(ctx, dy)


torch.library.register_autograd(
    "fused_lora::lora_linear", _gradient, setup_context=_setup_context, lib=_library
)


class _Intercepted(torch.autograd.Function):
    """The operator under a dispatch mode; keeps the same tensors as :mod:`.autograd` does.

    Non-reentrant checkpointing compares them: a mode may be active only while it recomputes, or
    only before.
    """

    @staticmethod
    def forward(ctx, *args):
        operands = Operands(*args)
        x, scaling, impl = operands.x, operands.scaling, operands.impl
        tensor = _on_device(scaling, x)
        _let_counters_count()
        y, S, keep_bits, copy = torch.ops.fused_lora.lora_linear(*operands._replace(scaling=tensor))
        if operands.seed is None:
            keep_bits = None
        S = S.to(autograd.rank_dtype(operands))
        if isinstance(scaling, Tensor):
            scaling = copy
        autograd.save(ctx, operands, S, keep_bits, scaling, _Registered(impl))
        return y

    backward = staticmethod(autograd.backward)


def _let_counters_count() -> None:
    """Give active FLOP counters the operators' formulas.

    Importing their module to register the formulas would import Triton.
    """
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__name__ == "_FlopCounterMode":
            mode.counter.flop_registry |= {
                torch.ops.fused_lora.lora_linear: _forward_flops,
                torch.ops.fused_lora.lora_linear_backward: _backward_flops,
            }


# As counted in eager mode: PyTorch's counter leaves out products accumulated in place.


def _forward_flops(x, weight, lora_A, lora_B, *args, out_val=None) -> int:
    R, K = lora_A.shape
    base = K if weight is not None else R  # with a base, S Bᵀ is a product of its own
    return 2 * (x.numel() // max(1, K)) * (R * K + base * lora_B.shape[0])


def _backward_flops(dy, x, weight, lora_A, lora_B, *args, out_val=None) -> int:
    need_x, need_A, need_B = args[-1]
    R, K = lora_A.shape
    M, N = dy.shape
    G = R * N if need_x or need_A else 0
    dx = K * (R if weight is None else N) if need_x else 0
    return 2 * M * (G + dx + R * K * need_A + R * N * need_B)


def _on_device(scaling: float | Tensor, like: Tensor) -> Tensor:
    """A scale as a tensor, as the operators take it."""
    if isinstance(scaling, Tensor):
        return scaling
    # A product, in which a compiler can keep the number symbolic; scalar_tensor would fix it.
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.ones((), dtype=wide, device=like.device) * scaling


def _on_host(scaling: Tensor) -> float | Tensor:
    """A scale in CPU memory as a number, which ``addmm`` applies as ``alpha`` in one pass."""
    return scaling.item() if scaling.is_cpu else scaling


def _rank_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``S`` is returned: lossless, and the same for every implementation."""
    return x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)


def _no_keep_bits(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=torch.int32)
