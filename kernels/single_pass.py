"""``shrink`` and ``lora_gemm`` in one launch, for small M.

    U = P Z        O = P Q + s · D(U V) + bias        P (M,L)   Z (L,R)   U (M,R)
    U = s · P Z    O = P Q + D(U V) + bias

Forward: the first line, with Z = Aᵀ. Backward: the second, with Z = B. The rest as in
:mod:`.lora_gemm`. Every column block computes U again from the tile of P that it has already read;
the first block writes it. There is no mask on P, which every column block would have to unpack
again: a forward with dropout uses other kernels.
"""

import torch
import triton
import triton.language as tl

from .common import (
    TL_DTYPE,
    advance,
    in_vectors,
    keep_entries,
    load_keep_words,
    multiple,
    operand,
    wait_for_previous,
)
from .config import SinglePassConfig, cdiv
from .launch import Arguments, launch


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M"])
def _single_pass(
    o_ptr,
    u_ptr,
    p_ptr,
    q_ptr,
    z_ptr,
    v_ptr,
    keep_bits_ptr,
    bias_ptr,
    scale_ptr,
    inv_keep,
    M,
    N,
    L,
    R,
    stride_om,
    stride_um,
    stride_pm,
    stride_ql,
    stride_qn,
    stride_zl,
    stride_zr,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SCALE_U: tl.constexpr,
    EVEN_L: tl.constexpr,
    ALIGN_O: tl.constexpr,
    ALIGN_P: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_V: tl.constexpr,
    USE_DESC: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    Z_TRANSPOSED: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    if ALIGN_O:
        stride_om = multiple(stride_om, 8)
        N = multiple(N, 8)
    if ALIGN_P:
        stride_pm = multiple(stride_pm, 8)
        L = multiple(L, 8)
    if ALIGN_Q:
        if Q_TRANSPOSED:
            stride_qn = multiple(stride_qn, 8)
        else:
            stride_ql = multiple(stride_ql, 8)
    if ALIGN_Z:
        if Z_TRANSPOSED:
            stride_zr = multiple(stride_zr, 8)
        else:
            stride_zl = multiple(stride_zl, 8)
            R = multiple(R, 8)
    if ALIGN_V:
        if V_TRANSPOSED:
            stride_vn = multiple(stride_vn, 8)
            R = multiple(R, 8)
        else:
            stride_vr = multiple(stride_vr, 8)
    first_m = tl.program_id(0) * BLOCK_M
    first_n = tl.program_id(1) * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.arange(0, BLOCK_R)
    rows = offs_m[:, None] < M
    cols = offs_n[None, :] < N
    if not USE_DESC:
        p_ptrs = p_ptr + offs_m.to(tl.int64)[:, None] * stride_pm + offs_l[None, :]
        if Q_TRANSPOSED:
            q_ptrs = q_ptr + offs_l[:, None] + offs_n.to(tl.int64)[None, :] * stride_qn
        else:
            q_ptrs = q_ptr + offs_l.to(tl.int64)[:, None] * stride_ql + offs_n[None, :]
    z_ptrs = (
        z_ptr + offs_l.to(tl.int64)[:, None] * stride_zl + offs_r.to(tl.int64)[None, :] * stride_zr
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, L, BLOCK_L):
        rest = L - start
        if USE_DESC:
            p = p_ptr.load([first_m, start])
            if Q_TRANSPOSED:
                q = q_ptr.load([first_n, start]).T
            else:
                q = q_ptr.load([start, first_n])
        elif EVEN_L:
            p = tl.load(p_ptrs, mask=rows, other=0.0)
            q = tl.load(q_ptrs, mask=cols, other=0.0)
        else:
            p = tl.load(p_ptrs, mask=rows & (offs_l[None, :] < rest), other=0.0)
            q = tl.load(q_ptrs, mask=(offs_l[:, None] < rest) & cols, other=0.0)
        if EVEN_L:
            z = tl.load(z_ptrs, mask=offs_r[None, :] < R, other=0.0)
        else:
            z = tl.load(z_ptrs, mask=(offs_l[:, None] < rest) & (offs_r[None, :] < R), other=0.0)
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_N)
        acc = tl.dot(p, q, acc, input_precision=INPUT_PRECISION)
        # (BLOCK_M, BLOCK_L) @ (BLOCK_L, BLOCK_R)
        low = tl.dot(p, z, low, input_precision=INPUT_PRECISION)
        if not USE_DESC:
            p_ptrs += BLOCK_L
            if Q_TRANSPOSED:
                q_ptrs += BLOCK_L
            else:
                q_ptrs += advance(BLOCK_L, stride_ql)
        z_ptrs += advance(BLOCK_L, stride_zl)
    scale = tl.load(scale_ptr).to(tl.float32)
    if SCALE_U:
        low *= scale
    # Beyond the rank, an infinite P times the zeros of Z is NaN, which V would spread to every
    # column of O.
    low = tl.where(offs_r[None, :] < R, low, 0.0)
    if tl.program_id(1) == 0:
        u_ptrs = u_ptr + offs_m.to(tl.int64)[:, None] * stride_um + offs_r[None, :]
        tl.store(
            u_ptrs,
            low.to(u_ptr.dtype.element_ty),
            mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
        )
    v_ptrs = (
        v_ptr + offs_r.to(tl.int64)[:, None] * stride_vr + offs_n.to(tl.int64)[None, :] * stride_vn
    )
    v = tl.load(v_ptrs, mask=(offs_r[:, None] < R) & cols, other=0.0)
    # The scale and the mask apply to U V only, so U V has an accumulator of its own.
    # (BLOCK_M, BLOCK_R) @ (BLOCK_R, BLOCK_N)
    up = tl.dot(low.to(DTYPE), v.to(DTYPE), input_precision=INPUT_PRECISION)
    if not SCALE_U:
        up *= scale
    if HAS_DROPOUT:
        words = load_keep_words(keep_bits_ptr, stride_keep_m, first_m, first_n, M, BLOCK_M, BLOCK_N)
        up = keep_entries(up * inv_keep, words, BLOCK_M, BLOCK_N)
    acc += up
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    o_ptrs = o_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :]
    tl.store(o_ptrs, acc.to(DTYPE), mask=rows & cols)


def single_pass(
    o: torch.Tensor,
    u: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    z: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    config: SinglePassConfig,
    *,
    scale_u: bool = False,
    bias: torch.Tensor | None = None,
    keep_bits: torch.Tensor | None = None,
    inv_keep: float = 1.0,
    input_precision: str = "ieee",
) -> None:
    """Write ``u`` and ``o`` as above: ``scale`` multiplies ``D(u v)`` or, with ``scale_u``, ``u``.

    Args:
        o: ``(M, N)`` in p's dtype, inner stride 1.
        u: ``(M, R)``, inner stride 1, any floating dtype; ``R`` at most
            :data:`.config.SINGLE_PASS_MAX_RANK`.
        p: ``(M, L)``, inner stride 1.
        q: ``(L, N)`` in p's dtype, one of its strides 1.
        z: ``(L, R)`` in p's dtype, any strides.
        v: ``(R, N)``, any strides and floating dtype; cast to p's.
        scale: 0-d tensor, read on the device.
        bias: ``(N,)``, contiguous, any floating dtype, or None.
        keep_bits: packed mask of ``u v``, int32 ``(M, words)``, or None.
        inv_keep: factor of the kept entries of ``u v``.
        input_precision: of fp32 products, "ieee" or "tf32".
    """
    tensors = o, u, p, q, z, v, keep_bits, bias, scale
    flags = scale_u, input_precision
    launch(_single_pass, _arguments, config, tensors, (float(inv_keep),), *flags)


def _arguments(
    config, o, u, p, q, z, v, keep_bits, bias, scale, scale_u: bool, input_precision: str
) -> Arguments:
    (M, L), N, R = p.shape, q.shape[1], u.shape[1]
    transposed = q.stride(0) == 1 and q.stride(1) != 1
    block_m, block_n, block_l = config.block_m, config.block_n, config.block_l
    block_q = (block_n, block_l) if transposed else (block_l, block_n)
    return Arguments(
        grid=(cdiv(M, block_m), cdiv(N, block_n)),
        operands=(
            o,
            u,
            operand(config, p, (block_m, block_l)),
            operand(config, q, block_q, transposed),
            z,
            v,
            u if keep_bits is None else keep_bits,
            u if bias is None else bias,
            scale,
        ),
        numbers=(
            M,
            N,
            L,
            R,
            o.stride(0),
            u.stride(0),
            p.stride(0),
            *q.stride(),
            *z.stride(),
            *v.stride(),
            0 if keep_bits is None else keep_bits.stride(0),
        ),
        constants={
            "DTYPE": TL_DTYPE[p.dtype],
            "HAS_BIAS": bias is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "SCALE_U": scale_u,
            "EVEN_L": L % block_l == 0,
            "ALIGN_O": in_vectors(o),
            "ALIGN_P": in_vectors(p),
            "ALIGN_Q": in_vectors(q),
            "ALIGN_Z": in_vectors(z),
            "ALIGN_V": in_vectors(v),
            "USE_DESC": config.descriptors,
            "Q_TRANSPOSED": transposed,
            "Z_TRANSPOSED": z.stride(1) != 1,
            "V_TRANSPOSED": v.stride(1) != 1,
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_L": block_l,
            "BLOCK_R": config.block_r(R),
            "PDL": config.pdl,
        },
        options=config.options,
    )
