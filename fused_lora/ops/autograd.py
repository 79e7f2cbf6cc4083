"""The layer as an autograd Function; :mod:`.dispatch` selects what computes each direction.

Saved for backward: the adapter, and each of ``x``, ``weight``, ``S`` and the keep bits that a
gradient needs. The dropped ``x`` is not saved: backward computes it again from ``x`` and the bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C import _current_autograd_node, _will_engine_execute_node
from torch.compiler import is_dynamo_compiling

from ..distributed.sharding import ready
from ..kernels.operands import pack_backward, pack_forward
from . import dispatch, dropout, reference
from .modes import autocasts
from .operands import Operands, pack

# Elements of dy from which on dx costs more than the check whether it is wanted: 1 µs.
_WORTH_CHECKING = 512


def lora_linear(operands: Operands) -> Tensor:
    """``y (..., N)``, differentiable twice."""
    x, _, lora_A, lora_B, bias, _, _, _, _, base = operands
    if type(x) is not Tensor and (waited := ready(x)) is not x:
        x = waited
        operands = operands._replace(x=x)
    if base is not None and (waited := ready(base)) is not base:
        base = waited
        operands = operands._replace(base=base)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or (bias is not None and bias.requires_grad)
        or (base is not None and base.requires_grad)
    ):
        return _LoRALinear.apply(*operands)
    return forward(operands)[0]


def forward(operands: Operands):
    """``y (..., N)``, ``S (M,R)``, the keep bits or None, and the implementation that ran."""
    x, weight, lora_A, lora_B, bias, scaling, seed, keep_count, impl, base = operands
    flat = x if x.dim() == 2 else _flatten(x)
    if base is not None:
        base = _flatten(base)
    runner = dispatch.choose(flat, weight, lora_B, impl, seed is not None, base)
    y, S, keep_bits = runner.forward(
        pack_forward((flat, weight, lora_A, lora_B, bias, scaling, seed, keep_count, base))
    )
    if x.dim() != 2:
        # Not ``view``: autograd forbids in-place changes to a view that a Function returns.
        y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return y, S, keep_bits, runner


def rank_dtype(operands: Operands) -> torch.dtype:
    """The dtype of the ``S`` that :func:`forward` returns."""
    x, weight, lora_A, lora_B, _, _, seed, _, impl, base = operands
    flat = _flatten(x)
    runner = dispatch.choose(
        flat, weight, lora_B, impl, seed is not None, None if base is None else _flatten(base)
    )
    return runner.rank_dtype(flat, lora_A)


def save(ctx, operands: Operands, S: Tensor, keep_bits: Tensor | None, scaling, runner) -> None:
    """Keep for backward what the gradients of ``operands`` need.

    Args:
        scaling: the scale that backward reads; a tensor must keep its value until then.
        runner: an object whose ``backward`` takes ``kernels.operands.BackwardOperands``.
    """
    x, weight, lora_A, lora_B, bias, _, _, keep_count, *_ = operands
    need_x, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    is_tensor = isinstance(scaling, Tensor)
    number = None if is_tensor else scaling
    bias_dtype = bias.dtype if need_bias else None
    ctx.call = runner, number, dropout.KEEP_ALL / keep_count, x.shape, x.dtype, bias_dtype
    ctx.save_for_backward(
        x if need_A else None,
        weight if need_x else None,
        lora_A,
        lora_B,
        S if need_B else None,
        keep_bits if need_x or need_A else None,
        scaling if is_tensor else None,
    )


def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of :func:`forward`; differentiable under ``create_graph``."""
    # The saved tensors already have the dtypes that autocast chose in forward.
    if autocasts(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)
    wanted = ctx.needs_input_grad
    # Without dx little can be saved. Compiled autograd runs without the engine.
    if wanted[0] and not is_dynamo_compiling():
        size = dy.numel()
        if type(size) is not int or size >= _WORTH_CHECKING:
            wanted = _wanted(ctx)
    need_x, _, need_A, need_B, need_bias, *_, need_base = wanted
    x, weight, lora_A, lora_B, S, keep_bits, scaling = ctx.saved_tensors
    runner, number, inv_keep, x_shape, dtype, bias_dtype = ctx.call
    twice = torch.is_grad_enabled()  # in backward: only under ``create_graph``
    if type(dy) is not Tensor:
        dy = ready(dy)
    flat_dy = dy if dy.dim() == 2 else _flatten(dy)
    if flat_dy.dtype != dtype:  # dy has the dtype of the base output
        flat_dy = flat_dy.to(dtype)
    if x is not None and x.dim() != 2:
        x = _flatten(x)
    if scaling is None:
        scaling = number
    needs = need_x, need_A, need_B
    dx, dA, dB = (reference if twice else runner).backward(
        pack_backward((flat_dy, x, weight, lora_A, lora_B, S, scaling, keep_bits, inv_keep, needs))
    )
    if twice and need_B and x is None and ctx.needs_input_grad[0]:
        dB = _OnceDifferentiable.apply(dB)
    db = None
    if need_bias:
        wide = torch.promote_types(dy.dtype, torch.float32)
        db = flat_dy.sum(0, dtype=wide).to(bias_dtype)
    if need_x and len(x_shape) != 2:
        dx = dx.view(x_shape)
    return dx, None, dA, dB, db, None, None, None, None, dy if need_base else None


def _wanted(ctx) -> tuple[bool, ...]:
    """``ctx.needs_input_grad`` without the gradients that this pass of the engine discards.

    That tuple says what requires grad; ``torch.autograd.grad(loss, [lora_A, lora_B])`` needs less.
    Called only if ``x`` requires grad.
    """
    needs = ctx.needs_input_grad
    edges = ctx.next_functions  # one per tensor: of x; of the weight, if given; of lora_A and so on
    node = edges[2][0]  # of lora_A or lora_B
    try:
        # An ordinary pass runs all nodes; two checks suffice to recognise one, and each costs time.
        if _will_engine_execute_node(edges[0][0]) and (
            node is not None and _will_engine_execute_node(node)
        ):
            return needs
    except RuntimeError:
        pass  # no pass of the engine, or a leaf: see _runs
    if _current_autograd_node() is not ctx:  # called by hand, maybe within another pass
        return needs
    nodes = iter([node for node, _ in edges if node is not None])
    return tuple([need and _runs(next(nodes)) for need in needs])


def _runs(node) -> bool:
    """Whether the engine needs the gradient that flows into ``node``."""
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was given
        return True


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        operands = pack(args)
        y, S, keep_bits, runner = forward(operands)
        scaling = operands.scaling
        if isinstance(scaling, Tensor):  # it may be written in place before backward
            scaling = scaling.clone()
        save(ctx, operands, S, keep_bits, scaling, runner)
        return y

    backward = staticmethod(backward)


class _OnceDifferentiable(torch.autograd.Function):
    """Returns ``dB``; its derivative raises, since ``x`` is not saved for a frozen ``lora_A``."""

    @staticmethod
    def forward(ctx, dB):
        return dB.view_as(dB)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "expected lora_A to require grad: the derivative of lora_B's gradient needs x, which is"
            " not saved for a frozen lora_A; impl='reference' saves it"
        )


def _flatten(t: Tensor) -> Tensor:
    """``(..., n)`` as ``(M, n)``; a matrix is returned as it is, with its strides."""
    # Size.numel() would specialise a symbolic number to a constant.
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
