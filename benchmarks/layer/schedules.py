"""Ways to order the layer's products that no library offers as a module: autograd Functions.

addmm     every product is the vendor's, the adapter's accumulated onto the base's
forced    this library's kernels with a strategy that is prescribed and not chosen
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_lora.kernels.config import DIGITS


class Addmm(torch.autograd.Function):
    """The schedule of the fast paths of LoRA trainers; keeps the dropped x and a bool mask."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, p):
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        S = dropped @ lora_A.t()
        y = F.linear(x, weight, bias).addmm_(S, lora_B.t(), alpha=scaling)
        ctx.save_for_backward(dropped, mask, weight, lora_A, lora_B, S)
        ctx.scaling, ctx.inv_keep = scaling, 1 / (1 - p)
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, weight, lora_A, lora_B, S = ctx.saved_tensors
        G = dy @ lora_B
        dx = dy @ weight
        if mask is None:
            dx.addmm_(G, lora_A, alpha=ctx.scaling)
        else:
            dx.addcmul_(G @ lora_A, mask, value=ctx.scaling * ctx.inv_keep)
        dA = (G.t() @ dropped).mul_(ctx.scaling)
        dB = (dy.t() @ S).mul_(ctx.scaling)
        return dx, None, None, dA, dB, None, None


class Forced(torch.autograd.Function):
    """``fused_lora.kernels.strategies`` with one strategy, "split" or "single_pass", both ways."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, p, strategy):
        from fused_lora.kernels import strategies
        from fused_lora.ops import dropout

        keep = dropout.keep_count(p)
        ctx.inv_keep = dropout.KEEP_ALL / keep
        keep_bits = None
        if keep != dropout.KEEP_ALL:
            keep_bits = dropout.empty_keep_bits(*x.shape, x.device)
            strategies.dropout_mask(keep_bits, dropout.draw_seed(x.device), keep, DIGITS)
        y, S = strategies.forward(
            x, weight, lora_A, lora_B, bias, scaling, keep_bits, ctx.inv_keep, strategy
        )
        ctx.save_for_backward(x, weight, lora_A, lora_B, S, keep_bits)
        ctx.scaling, ctx.strategy = scaling, strategy
        return y

    @staticmethod
    def backward(ctx, dy):
        from fused_lora.kernels import strategies

        x, weight, lora_A, lora_B, S, keep_bits = ctx.saved_tensors
        dx, dA, dB = strategies.backward(
            dy, x, weight, lora_A, lora_B, S, ctx.scaling, keep_bits, ctx.inv_keep,
            (True, True, True), ctx.strategy,
        )  # fmt: skip
        return dx, None, None, dA, dB, None, None, None
