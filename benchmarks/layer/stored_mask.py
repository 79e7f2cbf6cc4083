"""LoRAFusion's schedule, reimplemented: split at S, with a stored dropped x and bool mask.

    forward    x̂, mask = D(x)    S = s·x̂ Aᵀ     y  = x Wᵀ + b + S Bᵀ        one kernel for y
    backward   G = s·dy B        dB = dyᵀ S     dx = dy W + mask·(G A)      one kernel for dx
                                                dA = Gᵀ x̂

    O = P Q + mask·(U V)·inv_keep + bias       P (M,L)   Q (L,N)   U (M,R)   V (R,N)

Zhu et al., "LoRAFusion: Efficient LoRA Fine-Tuning for LLMs", 2025. The tiles here are not tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_lora.kernels.common import grouped_tile
from fused_lora.kernels.config import MIN_BLOCK_R, cdiv

MAX_RANK = 64  # U V is a single dot


@triton.jit(do_not_specialize=["M"])
def _gemm(
    o_ptr,
    p_ptr,
    q_ptr,
    u_ptr,
    v_ptr,
    mask_ptr,
    bias_ptr,
    inv_keep,
    M,
    N,
    L,
    R,
    stride_pm,
    stride_ql,
    stride_qn,
    stride_um,
    stride_vr,
    stride_vn,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.arange(0, BLOCK_R)
    rows, cols = offs_m < M, offs_n < N
    u_ptrs = u_ptr + offs_m * stride_um + offs_r[None, :]
    v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_n * stride_vn
    u = tl.load(u_ptrs, mask=rows & (offs_r[None, :] < R), other=0.0)
    v = tl.load(v_ptrs, mask=(offs_r[:, None] < R) & cols, other=0.0)
    acc = tl.dot(u, v, input_precision="ieee")  # (BLOCK_M, BLOCK_R) @ (BLOCK_R, BLOCK_N)
    if HAS_MASK:
        kept = tl.load(mask_ptr + offs_m * N + offs_n, mask=rows & cols, other=0)
        acc = tl.where(kept != 0, acc * inv_keep, 0.0)
    p_ptrs = p_ptr + offs_m * stride_pm + offs_l[None, :]
    q_ptrs = q_ptr + offs_l.to(tl.int64)[:, None] * stride_ql + offs_n * stride_qn
    for start in range(0, L, BLOCK_L):
        rest = L - start
        p = tl.load(p_ptrs, mask=rows & (offs_l[None, :] < rest), other=0.0)
        q = tl.load(q_ptrs, mask=(offs_l[:, None] < rest) & cols, other=0.0)
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_N)
        acc = tl.dot(p, q, acc, input_precision="ieee")
        p_ptrs += BLOCK_L
        q_ptrs += BLOCK_L * stride_ql
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=cols, other=0.0).to(tl.float32)
    tl.store(o_ptr + offs_m * N + offs_n, acc.to(o_ptr.dtype.element_ty), mask=rows & cols)


def _launch(p, q, u, v, mask=None, inv_keep=1.0, bias=None) -> torch.Tensor:
    """``P Q + mask·(U V)·inv_keep + bias``; one dtype, the rows of P and U contiguous."""
    (M, L), N, R = p.shape, q.shape[1], u.shape[1]
    o = torch.empty((M, N), dtype=p.dtype, device=p.device)
    half = p.element_size() == 2
    block_m, block_n, block_l, warps, stages = (128, 128, 64, 8, 3) if half else (64, 64, 32, 4, 2)
    _gemm[(cdiv(M, block_m) * cdiv(N, block_n),)](
        o,
        p,
        q,
        u,
        v,
        mask,
        bias,
        inv_keep,
        M,
        N,
        L,
        R,
        p.stride(0),
        *q.stride(),
        u.stride(0),
        *v.stride(),
        HAS_MASK=mask is not None,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_L=block_l,
        BLOCK_R=max(MIN_BLOCK_R, triton.next_power_of_2(R)),
        GROUP_M=8,
        num_warps=warps,
        num_stages=stages,
    )
    return o


class StoredMask(torch.autograd.Function):
    """``x (M,K)`` to ``y (M,N)``, all of one dtype; rank at most MAX_RANK."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, p):
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        S = (dropped @ lora_A.t()).mul_(scaling)
        ctx.save_for_backward(dropped, mask, weight, lora_A, lora_B, S)
        ctx.scaling, ctx.inv_keep = scaling, 1 / (1 - p)
        return _launch(x, weight.t(), S, lora_B.t(), bias=bias)

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, weight, lora_A, lora_B, S = ctx.saved_tensors
        G = (dy @ lora_B).mul_(ctx.scaling)
        dx = _launch(dy, weight, G, lora_A, mask, ctx.inv_keep)
        return dx, None, None, G.t() @ dropped, dy.t() @ S, None, None
