"""The functional form: validate, apply autocast's rule, draw the seed, run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.sharding import is_shard
from . import custom_ops, dropout, reference
from .autograd import lora_linear
from .modes import autocasts, is_exporting, is_observed, is_traced, is_transformed
from .validation import check_base, check_dropout, check_impl, check_same_dtype, check_tensors


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
) -> Tensor:
    """``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``: a frozen linear layer with a low-rank adapter.

    Differentiable in ``x``, ``lora_A``, ``lora_B``, and ``bias`` where it requires grad; twice. A
    gradient has the shape and dtype of its tensor. DTensors give a DTensor (:mod:`.dtensor`).

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; any leading dimensions and strides.
        weight: ``(out, in)`` in x's dtype (any under autocast); must not require grad.
        lora_A: ``(rank, in)``, any of the dtypes above; cast to x's for the products, to float32
            for those of few rows on a CPU, and for all where that has no instructions for x's.
        lora_B: ``(out, rank)``, likewise.
        bias: ``(out,)`` or None.
        scaling: ``s``, a float or a constant 0-d tensor on x's device.
        dropout_p: probability that ``D`` drops an entry of ``x`` on the adapter's way only; kept
            entries are divided by ``1 - dropout_p``. Rounded to a multiple of 2⁻¹⁶.
        training: ``D`` is the identity when False.
        impl: "auto" (Triton on a GPU that can run it, else PyTorch), "triton", "torch", or
            "reference" (eager autograd); "triton:split", "triton:addmm" and "triton:single_pass"
            name the strategy too. See :func:`fused_lora.explain`.

    Returns:
        ``(..., out)`` in x's dtype; under autocast, in autocast's.

    Raises:
        TypeError: a dtype that cannot be used.
        ValueError: shapes, devices or values that do not fit; a weight that requires grad; an
            explicit ``impl`` that cannot run here.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3;
    dropout as in PEFT.
    """
    check_impl(impl)
    check_dropout(dropout_p)
    usual = check_tensors(x, weight, lora_A, lora_B, bias, scaling)
    p = dropout_p if training else 0.0
    if usual and impl != "reference" and not is_observed():
        # Where the answers to all that is asked below are known.
        seed, keep = _draw(p, x.device) if p else (None, dropout.KEEP_ALL)
        return lora_linear(x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl)
    return _run(x, weight, lora_A, lora_B, bias, scaling, p, impl)


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
    """``y = base + s·D(x) Aᵀ Bᵀ``: an adapter beside a layer that computes its own product.

    For quantised, sharded or otherwise special base layers: ``fused_lora_add(layer(x), x, A, B)``.
    Differentiable in ``base``, ``x``, ``lora_A`` and ``lora_B``; twice.

    Args:
        base: ``(..., out)``, the layer's output: float16, bfloat16, float32 or float64.
        x: ``(..., in)``, the layer's input, any of these dtypes.
        lora_A: ``(rank, in)``, any of the dtypes; cast as in :func:`fused_lora_linear`.
        lora_B: ``(out, rank)``, likewise.
        scaling, dropout_p, training, impl: as in :func:`fused_lora_linear`.

    Returns:
        ``(..., out)``, a new tensor in base's dtype.

    Raises:
        TypeError: a dtype that cannot be used.
        ValueError: shapes, devices or values that do not fit; an explicit ``impl`` that cannot run
            here.
    """
    check_impl(impl)
    check_dropout(dropout_p)
    check_base(base, x, lora_A, lora_B, scaling)
    p = dropout_p if training else 0.0
    return _run(x, None, lora_A, lora_B, None, scaling, p, impl, base)


def _run(x, weight, lora_A, lora_B, bias, scaling, p, impl, base=None) -> Tensor:
    """Autocast's rule, then the layer."""
    if autocasts(x) and x.dtype != torch.float64:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _compute(x, weight, lora_A, lora_B, bias, scaling, p, impl, base)
    if weight is not None:
        check_same_dtype(x, weight)
    return _compute(x, weight, lora_A, lora_B, bias, scaling, p, impl, base)


def _compute(x, weight, lora_A, lora_B, bias, scaling, p, impl, base) -> Tensor:
    if is_exporting():
        return custom_ops.exported(x, weight, lora_A, lora_B, bias, scaling, p, base)
    seed, keep = _draw(p, x.device) if p else (None, dropout.KEEP_ALL)
    args = (x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl, base)
    if is_shard(x, lora_A, weight if base is None else base):
        from ..distributed.dtensor import on_shards  # and with it torch.distributed

        return on_shards(_products, *args)
    return _products(*args)


def _draw(p: float, device: torch.device) -> tuple[Tensor | None, int]:
    """The seed, or None if nothing is dropped, and the keep probability in units of 2⁻¹⁶."""
    keep = dropout.keep_count(p)
    return None if keep == dropout.KEEP_ALL else dropout.draw_seed(device), keep


def _products(x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl, base) -> Tensor:
    """``y`` from plain tensors; the only random number is the seed."""
    if is_transformed():
        if impl.startswith("triton"):
            raise ValueError(
                f"impl={impl!r} cannot run here: expected no torch.func transform or forward-mode"
                " differentiation, which take impl='auto', 'torch' or 'reference'"
            )
        impl = "reference"
    if impl != "reference":
        run = custom_ops.lora_linear if is_traced() else lora_linear
        return run(x, weight, lora_A, lora_B, bias, scaling, seed, keep, impl, base)
    mask = None
    if seed is not None:
        K = x.shape[-1]
        keep_bits = dropout.make_keep_bits(seed, x.numel() // max(1, K), K, keep)
        mask = dropout.keep_mask(keep_bits, K, x.dtype) * (dropout.KEEP_ALL / keep)
    return reference.lora_linear(x, weight, lora_A, lora_B, bias, scaling, mask, base)
