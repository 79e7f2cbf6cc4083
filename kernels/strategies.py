"""The layer's two directions as sequences of kernels.

A strategy is "split" (``shrink`` then ``lora_gemm``), "single_pass", or "addmm" (the vendor's
GEMM, ``shrink`` and ``lora_add``). All three save and read one state: ``x``, ``S``, keep bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.constants import constant, scalar
from . import select_config
from .config import MIN_ROWS_PER_RANK, Config, cdiv
from .dropout import dropout_mask
from .interpreter import INTERPRETED
from .lora_add import lora_add
from .lora_gemm import lora_gemm
from .rank_grad import rank_grad
from .shrink import shrink
from .single_pass import single_pass

__all__ = ["INTERPRETED", "backward", "dropout_mask", "forward"]

_VECTOR_BYTES = 16


def forward(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    keep_bits: Tensor | None,
    inv_keep: float,
    strategy: str,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y (M,N)`` in x's dtype and ``S (M,R)`` fp32, from ``x (M,K)``; no dimension is 0.

    With ``base (M,N)`` in place of a weight, ``y`` is ``base`` and the low-rank product, in base's
    dtype.
    """
    x = _inner_contiguous(x)
    target = select_config.target_of(x.device)
    scale = _scale_tensor(scaling, x.device)
    if base is not None:
        S = _shrink(x, lora_A.t(), scale, target, keep_bits, inv_keep)
        y = torch.empty_like(base, memory_format=torch.contiguous_format)
        _add(y, S, lora_B.t(), target, base=_inner_contiguous(base), like=x)
        return y, S
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.contiguous()
    if strategy == "single_pass":
        return _single_pass(x, weight.t(), lora_A.t(), lora_B.t(), scale, target, bias=bias)
    S = _shrink(x, lora_A.t(), scale, target, keep_bits, inv_keep)
    if strategy == "addmm":
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        _add(y, S, lora_B.t(), target, base=y)
    else:
        y = _gemm(x, weight.t(), S, lora_B.t(), target, bias=bias)
    return y, S


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float | Tensor,
    keep_bits: Tensor | None,
    inv_keep: float,
    needs: tuple[bool, bool, bool],
    strategy: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dA, dB)`` from ``dy (M,N)``; None where ``needs`` is false.

    Without a weight, ``dx`` is the adapter's part alone.
    """
    dy = _inner_contiguous(dy)
    target = select_config.target_of(dy.device)
    scale = _scale_tensor(scaling, dy.device)
    G = dx = dA = dB = None
    if needs[0] and weight is None:
        G = _shrink(dy, lora_B, scale, target)
        dx = torch.empty((dy.shape[0], lora_A.shape[1]), dtype=dy.dtype, device=dy.device)
        _add(dx, G, lora_A, target, keep_bits, inv_keep)
    elif needs[0]:
        weight = weight.to(dy.dtype)
        if strategy == "single_pass":
            dx, G = _single_pass(
                dy, weight, lora_B, lora_A, scale, target, keep_bits=keep_bits, inv_keep=inv_keep
            )
        else:
            G = _shrink(dy, lora_B, scale, target)
            if strategy == "addmm":
                dx = torch.mm(dy, weight)
                _add(dx, G, lora_A, target, keep_bits, inv_keep, base=dx)
            else:
                dx = _gemm(dy, weight, G, lora_A, target, keep_bits=keep_bits, inv_keep=inv_keep)
    elif needs[1]:
        G = _shrink(dy, lora_B, scale, target)
    if needs[1]:
        dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        _rank_grad(dA, G, _inner_contiguous(x), target, keep_bits, inv_keep)
    if needs[2]:
        dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        _rank_grad(dB.t(), _inner_contiguous(S), dy, target)
    return dx, dA, dB


def _shrink(p, q, scale, target, keep_bits=None, inv_keep=1.0) -> Tensor:
    M, L = p.shape
    R = q.shape[1]
    u = _rank_matrix(M, R, p.device)
    config = _config(
        select_config.shrink_config, target, p.element_size(), M, L, R, describable=_describable(p)
    )
    shrink(
        u, p, q.to(p.dtype), scale, config,
        keep_bits=keep_bits, inv_keep=inv_keep, input_precision=_precision(p),
    )  # fmt: skip
    return u


def _gemm(p, q, u, v, target, bias=None, keep_bits=None, inv_keep=1.0) -> Tensor:
    q = _one_contiguous(q)
    o = torch.empty((p.shape[0], q.shape[1]), dtype=p.dtype, device=p.device)
    aligned = _describable(p) and _describable(q) and _describable(o)
    config = _config(
        select_config.gemm_config, target, p.element_size(), *o.shape, u.shape[1], aligned=aligned
    )
    lora_gemm(
        o, p, q, u, v, config,
        bias=bias, keep_bits=keep_bits, inv_keep=inv_keep, input_precision=_precision(p),
    )  # fmt: skip
    return o


def _add(o, u, v, target, keep_bits=None, inv_keep=1.0, base=None, like=None) -> None:
    """``like`` has the dtype of the product, o's by default."""
    like = o if like is None else like
    config = _config(select_config.add_config, target, like.element_size(), *o.shape, u.shape[1])
    lora_add(
        o, u, v, config,
        base=base, dot_dtype=like.dtype,
        keep_bits=keep_bits, inv_keep=inv_keep, input_precision=_precision(like),
    )  # fmt: skip


def _single_pass(p, q, z, v, scale, target, bias=None, keep_bits=None, inv_keep=1.0):
    q = _one_contiguous(q)
    o = torch.empty((p.shape[0], q.shape[1]), dtype=p.dtype, device=p.device)
    u = _rank_matrix(p.shape[0], z.shape[1], p.device)
    config = _config(
        select_config.single_pass_config,
        target,
        p.element_size(),
        *o.shape,
        u.shape[1],
        describable=_describable(p) and _describable(q),
    )
    single_pass(
        o, u, p, q, z.to(p.dtype), v, scale, config,
        bias=bias, keep_bits=keep_bits, inv_keep=inv_keep, input_precision=_precision(p),
    )  # fmt: skip
    return o, u


def _rank_grad(o, u, p, target, keep_bits=None, inv_keep=1.0) -> None:
    (M, L), R = p.shape, u.shape[1]
    if keep_bits is None and M < MIN_ROWS_PER_RANK * R:
        o.copy_(torch.mm(u.to(p.dtype).t(), p))
        return
    config = _config(
        select_config.rank_grad_config,
        target,
        p.element_size(),
        M,
        L,
        R,
        describable=_describable(p),
    )
    rank_grad(
        o, u, p, config, keep_bits=keep_bits, inv_keep=inv_keep, input_precision=_precision(p)
    )


@lru_cache(maxsize=4096)
def _config(choose, *args, **kwargs) -> Config:
    """``choose(*args, **kwargs)``, the same object each time: launches are kept by it."""
    return choose(*args, **kwargs)


def _rank_matrix(M: int, R: int, device: torch.device) -> Tensor:
    """An uninitialised fp32 ``(M, R)`` whose rows start on a vector."""
    pitch = cdiv(R * 4, _VECTOR_BYTES) * _VECTOR_BYTES // 4
    return torch.empty((M, pitch), dtype=torch.float32, device=device)[:, :R]


def _inner_contiguous(t: Tensor) -> Tensor:
    """``t`` with inner stride 1; rows may lie anywhere, even on top of each other."""
    if t.stride(1) == 1:
        return t
    if t.shape[1] == 1:  # its stride means nothing, and ``contiguous`` leaves it
        return t.as_strided(t.shape, (t.stride(0), 1))
    return t.contiguous()


def _one_contiguous(t: Tensor) -> Tensor:
    return t if 1 in t.stride() else t.contiguous()


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor (or a 16-byte copy) can address the rows of ``t`` or ``tᵀ``."""
    if t.stride(1) != 1 and t.stride(0) == 1:
        t = t.t()
    return (
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % _VECTOR_BYTES == 0
        and t.data_ptr() % _VECTOR_BYTES == 0
    )


def _scale_tensor(scaling: float | Tensor, device: torch.device) -> Tensor:
    return scaling if isinstance(scaling, Tensor) else constant(scalar, float(scaling), device)


def _precision(t: Tensor) -> str:
    """TF32 only where the user allowed it to torch."""
    allowed = t.dtype == torch.float32 and t.is_cuda and not torch.version.hip
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
