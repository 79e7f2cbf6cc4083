"""The functional API: validation, then one routing function for all modes and implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.sharding import is_shard
from . import autograd, custom_ops, reference, segmented
from .dropout import KEEP_ALL, draw_seed, keep_count
from .modes import (
    autocasts,
    is_exporting,
    is_observed,
    is_traced,
    is_transformed,
    outside_graphs,
    without_autocast,
)
from .operands import Operands, pack
from .segments import Segments, ranks_of
from .shared_input import flatten
from .validation import (
    IMPLEMENTATIONS,
    check_base,
    check_options,
    check_passes_gradient,
    check_same_dtype,
    check_segmented,
    check_tensors,
    multiplies_itself,
)


def fused_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    impl: str = "auto",
    segments: Segments | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``: a frozen linear layer with a low-rank adapter.

    Twice differentiable in ``x``, ``lora_A``, ``lora_B`` and ``bias``. A gradient has the shape and
    dtype of its tensor. DTensors give a DTensor, see :mod:`fused_lora.distributed.dtensor`.

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; any leading dimensions and strides.
            A jagged nested tensor gives one with the same offsets.
        weight: ``(out, in)`` in x's dtype (any under autocast); must not require grad.
        lora_A: ``(rank, in)``, any of the dtypes above; cast to x's for the products. A CPU casts
            to float32 instead if there are few rows, or if it has no instructions for x's dtype.
        lora_B: ``(out, rank)``, otherwise as ``lora_A``.
        bias: ``(out,)`` or None.
        scaling: ``s``, a float or a constant 0-d tensor on x's device.
        dropout_p: probability that ``D`` drops an entry of ``x``, in the adapter's branch only;
            kept entries are divided by ``1 - dropout_p``. Rounded to a multiple of 2⁻¹⁶.
        training: if False, ``D`` is the identity.
        impl: "auto" (Triton on a GPU that can run it, else PyTorch), "triton", "torch", or
            "reference" (eager autograd); "triton:split", "triton:seeded", "triton:addmm" and
            "triton:single_pass" prescribe the strategy too. See :func:`fused_lora.explain`.
        segments: the rows of ``x`` are sorted into ``G`` segments, each with an adapter of its own.
            ``lora_A`` and ``lora_B`` are then ``(G, rank, in)`` and ``(G, out, rank)``, or
            sequences of matrices whose ranks may differ, None for a segment without an adapter;
            ``scaling`` and ``dropout_p`` may be sequences too, ``scaling`` also ``(G,)``. The
            weight may be one for all or ``(G, out, in)``, the bias likewise. Rows of no segment get
            the base output of a common weight, else zeros. A segment's adapter without rows has no
            gradient in a sequence, zeros in a stack. The strategies are "triton:addmm" and, unless
            there may be rows of no segment beside a common weight, "triton:split".

    Returns:
        ``(..., out)`` in x's dtype; under autocast, in autocast's.

    Raises:
        TypeError: a dtype that cannot be used.
        ValueError: shapes, devices or values that do not fit; a weight that requires grad; an
            explicit ``impl`` that cannot run here.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3;
    dropout as in PEFT.
    """
    if segments is not None:
        return _segmented(
            x, weight, lora_A, lora_B, bias, scaling, dropout_p if training else 0.0, impl, segments
        )
    return linear(
        x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, impl, is_observed()
    )


@outside_graphs  # the sizes of the segments are data
def _segmented(x, weight, lora_A, lora_B, bias, scaling, dropout_p, impl, segments) -> Tensor:
    """:func:`fused_lora_linear` over segments, in every mode."""
    lora_A, lora_B, scaling, dropouts = check_segmented(
        x, weight, lora_A, lora_B, bias, scaling, dropout_p, impl, segments
    )
    if autocasts(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    else:
        check_same_dtype(x, weight)
    each = zip(ranks_of(lora_A), dropouts, strict=True)
    counts = [KEEP_ALL if rank is None else keep_count(p) for rank, p in each]
    seed = draw_seed(x.device) if min(counts) < KEEP_ALL else None
    if x.is_meta:
        return x.new_empty((*x.shape[:-1], weight.shape[-2]))
    flat = flatten(x)
    operands = segmented.SegmentedOperands(
        flat, weight, lora_A, lora_B, bias, scaling, segments, seed, tuple(counts), impl
    )
    _check_untransformed(impl)
    plain = impl == "reference" or is_transformed() or is_traced()
    with without_autocast(x):
        y = (reference.segmented if plain else segmented.segmented_linear)(operands)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    training: bool,
    impl: str,
    observed: bool,
) -> Tensor:
    """As :func:`fused_lora_linear`; ``observed`` is the result of :func:`.modes.is_observed`."""
    # The condition of check_options, whose call costs host time.
    if impl not in IMPLEMENTATIONS or type(dropout_p) is not float or not 0.0 <= dropout_p < 1.0:
        check_options(impl, dropout_p)
    is_plain = check_tensors(x, weight, lora_A, lora_B, bias, scaling)
    operands = pack((x, weight, lora_A, lora_B, bias, scaling, None, KEEP_ALL, impl, None))
    if not training:
        dropout_p = 0.0
    if is_plain and not observed and impl != "reference":
        # Fast path: plain tensors in eager mode, no autocast. No special case of _route applies.
        return autograd.lora_linear(operands.with_dropout(dropout_p) if dropout_p else operands)
    return _route(operands, dropout_p)


def fused_lora_add(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """``y = base + s·D(x) Aᵀ Bᵀ``: an adapter for a layer that computes its own product.

    For quantised, sharded or otherwise special base layers: ``fused_lora_add(layer(x), x, A, B)``.
    Twice differentiable in ``base``, ``x``, ``lora_A`` and ``lora_B``.

    Args:
        base: ``(..., out)``, the layer's output: float16, bfloat16, float32 or float64.
        x: ``(..., in)``, the layer's input, any of these dtypes.
        lora_A: ``(rank, in)``, any of the dtypes; cast as in :func:`fused_lora_linear`.
        lora_B: ``(out, rank)``, otherwise as ``lora_A``.
        scaling, dropout_p, training, impl: as in :func:`fused_lora_linear`.

    Returns:
        ``(..., out)``, a new tensor in base's dtype.

    Raises:
        TypeError: a dtype that cannot be used.
        ValueError: shapes, devices or values that do not fit; an explicit ``impl`` that cannot run
            here.
    """
    check_options(impl, dropout_p)
    check_base(base, x, lora_A, lora_B, scaling)
    operands = pack((x, None, lora_A, lora_B, None, scaling, None, KEEP_ALL, impl, base))
    return _route(operands, dropout_p if training else 0.0)


def _route(operands: Operands, dropout_p: float) -> Tensor:
    """Compute ``y`` from validated operands, in every mode."""
    x, weight = operands.x, operands.weight
    if x.is_nested:
        return _on_values(operands, dropout_p)
    if weight is not None and multiplies_itself(weight):
        # A quantised weight, for example, supports this product and its backward, but no other.
        base = F.linear(x, weight, operands.bias)
        check_passes_gradient(x, base, type(weight).__name__)
        x, _, lora_A, lora_B, _, *rest, _ = operands
        return _route(pack((x, None, lora_A, lora_B, None, *rest, base)), dropout_p)
    if autocasts(x) and x.dtype != torch.float64:
        device = x.device.type
        operands = pack((x.to(torch.get_autocast_dtype(device)), *operands[1:]))
        with torch.autocast(device, enabled=False):
            return _select(operands, dropout_p)
    if weight is not None:
        check_same_dtype(x, weight)
    return _select(operands, dropout_p)


def _check_untransformed(impl: str) -> None:
    """Refuse the kernels under a transform.

    Raises:
        ValueError: ``impl`` prescribes them.
    """
    if impl.startswith("triton") and is_transformed():
        raise ValueError(
            f"impl={impl!r} cannot run here: expected no torch.func transform or forward-mode"
            " differentiation, which need impl='auto', 'torch' or 'reference'"
        )


def _on_values(operands: Operands, dropout_p: float) -> Tensor:
    """The layer on the values of a jagged ``x``: one row per token, as in a dense tensor."""
    x, base = operands.x, operands.base
    if x.lengths() is not None:
        raise ValueError(
            "expected a contiguous jagged x, got one with unused rows between its sequences: pass"
            " x.contiguous()"
        )
    if base is not None:
        base = base.values()
    y = _route(operands._replace(x=x.values(), base=base), dropout_p)
    return torch.nested.nested_tensor_from_jagged(
        y,
        x.offsets(),
        jagged_dim=x._ragged_idx,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )


def _select(operands: Operands, dropout_p: float) -> Tensor:
    """Select what the mode needs: an exporter, a compiler, a mesh, a transform or eager mode."""
    if is_exporting():
        return custom_ops.exported(operands, dropout_p)
    if dropout_p:
        operands = operands.with_dropout(dropout_p)
    join = None
    x, weight, lora_A, _, _, _, _, _, impl, base = operands
    if is_shard(x, lora_A, weight if base is None else base):
        from ..distributed.dtensor import local_operands  # imports torch.distributed

        operands, join = local_operands(operands)
    _check_untransformed(impl)
    if is_transformed():
        impl = "reference"
    if impl == "reference":
        y = reference.forward(operands)
    elif is_traced():
        y = custom_ops.lora_linear(operands)
    else:
        y = autograd.lora_linear(operands)
    return y if join is None else join(y)
