"""The activation of a gated MLP, and its gradient.

    h     = act(gate) · up
    dh'   = dh + s · D(U V)             U (M,R)   V (R,I)   the others (M,I)
    dup   = dh' · act(gate)
    dgate = dh' · up · act'(gate)

U = G and V = A of the down projection's adapter: ``D(G A)``, its part of ``dh``, thus needs no pass
of its own. Backward makes ``h`` again, from which the down projection's ``dA`` is computed, so that
it does not have to be kept. All arithmetic is in fp32, and every result is rounded once. The
kernels are bound by memory bandwidth: one read of each operand, one write of each result.
"""

import math

import torch
import triton
import triton.language as tl

from .common import (
    TL_DTYPE,
    add_low_rank,
    in_vectors,
    keep_entries,
    load_keep_words,
    multiple,
    vector_of,
    wait_for_previous,
)
from .config import GatedConfig, cdiv
from .launch import Arguments, launch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# As in aten/src/ATen/native/cuda/ActivationGeluKernel.cu
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0 = tl.constexpr(math.sqrt(0.5 / math.pi))
_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBE = tl.constexpr(0.044715)
_THREE_CUBE = tl.constexpr(3 * 0.044715)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _half_of_gelu_tanh(x):
    """``(1 + tanh(y)) / 2``, as ``sigmoid(2y)``: where it is small, the sum would cancel."""
    return _sigmoid((x + x * x * x * _CUBE) * _SLOPE)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """``act(x)``, by PyTorch's formulas; NaN and infinity give what they give there."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = x * (0.5 * (1 + tl.erf(x * _SQRT_HALF)))
    elif ACTIVATION == "gelu_tanh":
        y = x * _half_of_gelu_tanh(x)
    else:
        tl.static_assert(ACTIVATION == "relu", "expected a name of ACTIVATIONS")
        y = tl.where(x <= 0, 0.0, x)
    return y


@triton.jit
def _activate_backward(x, dy, ACTIVATION: tl.constexpr):
    """``dy · act'(x)``, by PyTorch's formulas."""
    if ACTIVATION == "silu":
        s = _sigmoid(x)
        dx = dy * (s * (1 + x * (1 - s)))
    elif ACTIVATION == "gelu":
        normal = 0.5 * (1 + tl.erf(x * _SQRT_HALF))
        dx = dy * (normal + x * (tl.exp(x * x * -0.5) * _DENSITY_AT_0))
    elif ACTIVATION == "gelu_tanh":
        s = _half_of_gelu_tanh(x)
        dx = dy * (s + x * s * (1 - s) * ((1 + x * x * _THREE_CUBE) * _SLOPE))
    else:
        tl.static_assert(ACTIVATION == "relu", "expected a name of ACTIVATIONS")
        dx = tl.where(x <= 0, 0.0, dy)
    return dx


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M"])
def _gated(
    gate_ptr,
    up_ptr,
    h_ptr,
    M,
    N,
    stride_gm,
    stride_um,
    stride_hm,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    if ALIGN:
        N = multiple(N, 8)
        stride_gm = multiple(stride_gm, 8)
        stride_um = multiple(stride_um, 8)
        stride_hm = multiple(stride_hm, 8)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    # Offsets of rows are 64-bit: M times a row stride may exceed 2³¹ elements.
    rows = offs_m.to(tl.int64)[:, None]
    inside = (offs_m[:, None] < M) & (offs_n < N)
    gate = tl.load(gate_ptr + rows * stride_gm + offs_n, mask=inside, other=0.0)
    up = tl.load(up_ptr + rows * stride_um + offs_n, mask=inside, other=0.0)
    h = _activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32)
    tl.store(h_ptr + rows * stride_hm + offs_n, h.to(h_ptr.dtype.element_ty), mask=inside)


# M varies between calls; specialising it would compile the kernel again.
@triton.jit(do_not_specialize=["M"])
def _gated_backward(
    gate_ptr,
    up_ptr,
    dh_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    u_ptr,
    v_ptr,
    keep_bits_ptr,
    scale_ptr,
    inv_keep,
    M,
    N,
    R,
    stride_gm,
    stride_upm,
    stride_dhm,
    stride_dgm,
    stride_dum,
    stride_hm,
    stride_um,
    stride_vr,
    stride_vn,
    stride_keep_m,
    DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_V: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    if ALIGN:
        N = multiple(N, 8)
        stride_gm = multiple(stride_gm, 8)
        stride_upm = multiple(stride_upm, 8)
        stride_dhm = multiple(stride_dhm, 8)
        stride_dgm = multiple(stride_dgm, 8)
        stride_dum = multiple(stride_dum, 8)
        stride_hm = multiple(stride_hm, 8)
    first_m = tl.program_id(0) * BLOCK_M
    first_n = tl.program_id(1) * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    # Offsets of rows are 64-bit: M times a row stride may exceed 2³¹ elements.
    rows = offs_m.to(tl.int64)[:, None]
    cols = offs_n[None, :]
    inside = (offs_m[:, None] < M) & (cols < N)
    gate_ptrs = gate_ptr + rows * stride_gm + cols
    up_ptrs = up_ptr + rows * stride_upm + cols
    dh_ptrs = dh_ptr + rows * stride_dhm + cols
    # Loaded before the product, as in lora_add; what is not read in vectors takes too many
    # registers for that.
    if ALIGN:
        gate = tl.load(gate_ptrs, mask=inside, other=0.0)
        up = tl.load(up_ptrs, mask=inside, other=0.0)
        dh = tl.load(dh_ptrs, mask=inside, other=0.0)
    if HAS_LOW_RANK:
        if HAS_DROPOUT:
            words = load_keep_words(
                keep_bits_ptr, stride_keep_m, first_m, first_n, M, BLOCK_M, BLOCK_N
            )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = add_low_rank(
            acc, u_ptr, v_ptr, offs_m, offs_n, M, N, R, stride_um, stride_vr, stride_vn,
            DTYPE, BLOCK_R, CHUNKS, ALIGN_U, ALIGN_V, V_TRANSPOSED, INPUT_PRECISION,
        )  # fmt: skip
        if HAS_SCALE:
            acc *= tl.load(scale_ptr).to(tl.float32)
        if HAS_DROPOUT:
            acc = keep_entries(acc * inv_keep, words, BLOCK_M, BLOCK_N)
    if not ALIGN:
        gate = tl.load(gate_ptrs, mask=inside, other=0.0)
        up = tl.load(up_ptrs, mask=inside, other=0.0)
        dh = tl.load(dh_ptrs, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    dh = dh.to(tl.float32)
    if HAS_LOW_RANK:
        dh += acc
    active = _activate(gate, ACTIVATION)
    dgate = _activate_backward(gate, dh * up, ACTIVATION)
    tl.store(
        dgate_ptr + rows * stride_dgm + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=inside
    )
    dup = dh * active
    tl.store(dup_ptr + rows * stride_dum + cols, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    h = active * up
    tl.store(h_ptr + rows * stride_hm + cols, h.to(h_ptr.dtype.element_ty), mask=inside)


def gated(
    h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    config: GatedConfig,
    *,
    activation: str,
) -> None:
    """Write ``h = act(gate) · up``.

    Args:
        h, gate, up: ``(M, I)``, inner stride 1, any floating dtype; ``h`` may be one of the others.
        activation: of :data:`ACTIVATIONS`.
    """
    launch(_gated, _gated_arguments, config, (h, gate, up), (), activation)


def _gated_arguments(config, h, gate, up, activation: str) -> Arguments:
    M, N = h.shape
    return Arguments(
        grid=(cdiv(M, config.block_m), cdiv(N, config.block_n)),
        operands=(gate, up, h),
        numbers=(M, N, gate.stride(0), up.stride(0), h.stride(0)),
        constants={
            "ACTIVATION": activation,
            "ALIGN": all(map(in_vectors, (h, gate, up))),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PDL": config.pdl,
        },
        options=config.options,
    )


def gated_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    dh: torch.Tensor,
    config: GatedConfig,
    *,
    activation: str,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    u: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    keep_bits: torch.Tensor | None = None,
    inv_keep: float = 1.0,
    input_precision: str = "ieee",
) -> None:
    """Write ``dgate``, ``dup`` and ``h`` as above; by default over ``gate``, ``up`` and ``dh``.

    Args:
        gate, up, dh: ``(M, I)``, inner stride 1, any floating dtype.
        activation: of :data:`ACTIVATIONS`.
        dgate, dup, h: the results, like the operands; None: written over the operand of the same
            place.
        u: ``(M, R)``, inner stride 1, any floating dtype; cast to dh's; None: dh' = dh.
        v: ``(R, I)``, any strides and floating dtype; cast to dh's.
        scale: 0-d tensor, read on the device, or None for 1.
        keep_bits: packed mask of ``u v``, int32 ``(M, words)``, or None.
        inv_keep: factor of the kept entries of ``u v``.
        input_precision: of fp32 products, "ieee" or "tf32".
    """
    tensors = gate, up, dh, dgate, dup, h, u, v, keep_bits, scale
    flags = activation, input_precision
    launch(_gated_backward, _arguments, config, tensors, (float(inv_keep),), *flags)


def _arguments(
    config, gate, up, dh, dgate, dup, h, u, v, keep_bits, scale, activation, input_precision: str
) -> Arguments:
    (M, N), R = gate.shape, 0 if u is None else u.shape[1]
    block_r, chunks = config.rank_blocks(R)
    dgate = gate if dgate is None else dgate
    dup = up if dup is None else dup
    h = dh if h is None else h
    matrices = gate, up, dh, dgate, dup, h
    return Arguments(
        grid=(cdiv(M, config.block_m), cdiv(N, config.block_n)),
        operands=(
            *matrices,
            gate if u is None else u,
            gate if v is None else v,
            gate if keep_bits is None else keep_bits,
            gate if scale is None else scale,
        ),
        numbers=(
            M,
            N,
            R,
            *(matrix.stride(0) for matrix in matrices),
            0 if u is None else u.stride(0),
            *((0, 0) if v is None else v.stride()),
            0 if keep_bits is None else keep_bits.stride(0),
        ),
        constants={
            "DTYPE": TL_DTYPE[dh.dtype],
            "ACTIVATION": activation,
            "HAS_LOW_RANK": u is not None,
            "HAS_DROPOUT": keep_bits is not None,
            "HAS_SCALE": scale is not None,
            "ALIGN": all(map(in_vectors, matrices)),
            "ALIGN_U": 1 if u is None else vector_of(u),
            "ALIGN_V": v is not None and in_vectors(v),
            "V_TRANSPOSED": v is not None and v.stride(1) != 1,
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": block_r,
            "CHUNKS": chunks,
            "PDL": config.pdl,
        },
        options=config.options,
    )
