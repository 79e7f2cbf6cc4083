"""Schedules of the layer's products that no library offers as a module, as autograd Functions.

addmm     every product by the vendor's GEMM; the adapter's output accumulates into the base output
forced    this library's kernels with a prescribed strategy
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_lora.kernels.operands import BackwardOperands, ForwardOperands


class Addmm(torch.autograd.Function):
    """The schedule of the fast paths of LoRA trainers; saves the dropped x and a bool mask."""

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
    """``fused_lora.kernels.strategies`` with "split" or "single_pass" in both directions."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, p, strategy):
        from fused_lora.kernels import strategies
        from fused_lora.ops import dropout
        from fused_lora.ops.constants import constant, scalar

        keep_count = dropout.keep_count(p)
        ctx.inv_keep = dropout.KEEP_ALL / keep_count
        seed, keep_bits = None, None
        if keep_count != dropout.KEEP_ALL:
            seed = dropout.draw_seed(x.device)
            keep_bits = dropout.empty_keep_bits(*x.shape, x.device)
        scale = constant(scalar, float(scaling), x.device)
        operands = ForwardOperands(x, weight, lora_A, lora_B, bias, scale, seed, keep_count)
        y, S = strategies.forward(operands, strategy, keep_bits)
        ctx.save_for_backward(x, weight, lora_A, lora_B, S, scale, keep_bits)
        ctx.strategy = strategy
        return y

    @staticmethod
    def backward(ctx, dy):
        from fused_lora.kernels import strategies

        operands = BackwardOperands(dy, *ctx.saved_tensors, ctx.inv_keep)
        dx, dA, dB = strategies.backward(operands, ctx.strategy)
        return dx, None, None, dA, dB, None, None, None
