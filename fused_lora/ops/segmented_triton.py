"""The layer over rows sorted into segments, by the kernels: the parts of :mod:`.segmented`.

The host reads no size of a segment: the kernels find their rows in a table made on the device. With
the strategy "addmm" the base product is torch's grouped GEMM, to which they add; with "split" they
compute it too, in the launch that adds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.config import VECTOR_BYTES
from . import dropout
from .constants import constant, scalar
from .segments import Segments
from .torch_impl import as_dtype

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor | None],
    lora_B: Tensor | Sequence[Tensor | None],
    bias: Tensor | None,
    scaling: Sequence[float | Tensor],
    segments: Segments,
    seed: Tensor | None,
    keep_counts: Sequence[int],
    strategy: str = "addmm",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y (M, N)``, ``S (M, R)`` and the keep bits; see :class:`.segmented.SegmentedOperands`.

    Segments with dropout must have the same.

    Args:
        strategy: "split" or "addmm". With "split", and one weight for all, every row must belong to
            a segment.
    """
    from ..kernels import segments as kernels

    table = segments.table(x.shape[0])
    y = None if strategy == "split" else _base(x, weight, bias, segments)
    S, keep_bits = kernels.shrink_segments(
        x, _stacked(lora_A, 0, x.dtype), table,
        seed=seed, keep_count=min(keep_counts), rows=segments.rows,
    )  # fmt: skip
    scales = _scales(scaling, x.device)
    if strategy == "split":
        weight, y = as_dtype(weight, x.dtype), _empty(x, weight.shape[-2], segments)
        B = _as_stack(lora_B, 1, x.dtype)
        kernels.gemm_segments(y, x, weight.mT, S, B.mT, table, scales, bias=bias)
    else:
        kernels.add_segments(y, S, _stacked(lora_B, 1, x.dtype), table, scales)
    return y, S, keep_bits


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | Sequence[Tensor | None],
    lora_B: Tensor | Sequence[Tensor | None],
    S: Tensor,
    scaling: Sequence[float | Tensor],
    segments: Segments,
    keep_bits: Tensor | None,
    keep_counts: Sequence[int],
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
    strategy: str = "addmm",
) -> tuple[Tensor | None, Tensor | list | None, Tensor | list | None]:
    """``dx (M, K)``, and ``dA`` and ``dB`` as the adapters are given; ``strategy`` as forward's."""
    from ..kernels import segments as kernels

    need_x, need_A, need_B = needs[0], any(needs[1]), any(needs[2])
    table, dx, dA, G, dB = segments.table(dy.shape[0]), None, None, None, None
    if need_x or need_A or need_B:
        B = _stacked(lora_B, 1, dy.dtype)
        G, dB = kernels.thin_gradients_segments(
            dy, B, S, table, _scales(scaling, dy.device), (need_x or need_A, need_B),
            _gradient_like(lora_B, B),
        )  # fmt: skip
    is_split, inv_keep = strategy == "split", dropout.KEEP_ALL / min(keep_counts)
    if need_x or need_A:
        A = (_stacked if need_x and not is_split else _as_stack)(lora_A, 0, dy.dtype)
    if need_x and is_split:
        weight, dx = as_dtype(weight, dy.dtype), _empty(dy, weight.shape[-1], segments)
        mask = {"keep_bits": keep_bits, "inv_keep": inv_keep}
        kernels.gemm_segments(dx, dy, weight, G, A, table, **mask)
    elif need_x:
        dx = _base(dy, weight.mT, None, segments)
    if need_A or (need_x and not is_split):
        dA = kernels.input_gradients_segments(
            x, None if is_split else dx, A, G, table, keep_bits, inv_keep, need_A, _widest(lora_A)
        )
    return dx, _as_given(dA, lora_A, 0, segments), _as_given(dB, lora_B, 1, segments)


def _empty(x: Tensor, columns: int, segments: Segments) -> Tensor:
    """A result of one row per row of ``x``; 0 where rows may belong to no segment."""
    make = x.new_empty if segments.covers(len(x)) else x.new_zeros
    return make((len(x), columns))


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    """``x_g W_gᵀ + bias_g``; 0 in rows of no segment, unless the weight is common to all."""
    weight = as_dtype(weight, x.dtype)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    widths = x.shape[1], weight.shape[-2]  # of a contiguous x, and of y
    if weight.dim() == 2:
        y = F.linear(x, weight, bias if bias is None or bias.dim() == 1 else None)
    elif _is_groupable(weight) and not any(n * x.element_size() % VECTOR_BYTES for n in widths):
        rows = x if _is_groupable(x) else x.clone(memory_format=torch.contiguous_format)
        y = _grouped_mm(rows, weight.mT, offs=segments.offsets.int())
    else:
        y = x.new_zeros((x.shape[0], weight.shape[1]))
        for (a, b), own in zip(segments.bounds, weight, strict=True):
            torch.mm(x[a:b], own.t(), out=y[a:b])
    if bias is not None and bias.dim() == 2:
        y += F.pad(bias, (0, 0, 0, 1))[segments.owners(len(x))]  # the last row: of no segment
    elif bias is not None and weight.dim() == 3:
        y += bias
    if weight.dim() == 3 and not segments.covers(len(x)):
        y.masked_fill_((segments.owners(len(x)) == len(segments)).unsqueeze(1), 0)
    return y


def _is_groupable(t: Tensor) -> bool:
    """Whether torch's grouped GEMM can read a matrix, or a stack of them."""
    *_, rows, columns = t.shape
    pitch, inner = t.stride()[-2:]
    if inner != 1:
        pitch, inner, columns = inner, pitch, rows
    strides = [pitch, *t.stride()[:-2]]
    return (
        inner == 1
        and pitch >= columns
        and t.data_ptr() % VECTOR_BYTES == 0
        and all(stride * t.element_size() % VECTOR_BYTES == 0 for stride in strides)
    )


def _widest(adapters: Tensor | Sequence[Tensor | None]) -> torch.dtype:
    """The dtype of a stack of gradients."""
    if isinstance(adapters, Tensor):
        return adapters.dtype
    return functools.reduce(torch.promote_types, [t.dtype for t in adapters if t is not None])


def _stacked(adapters: Tensor | Sequence[Tensor | None], ranks: int, dtype: torch.dtype) -> Tensor:
    """Adapters as a contiguous stack in ``dtype``, padded with zeros to the largest rank.

    Args:
        ranks: the dimension of a matrix that is the rank.
    """
    if isinstance(adapters, Tensor):
        return adapters.to(dtype, memory_format=torch.contiguous_format).contiguous()
    present = [t for t in adapters if t is not None]
    shape = list(present[0].shape)
    shape[ranks] = max(t.shape[ranks] for t in present)
    stack = present[0].new_zeros((len(adapters), *shape), dtype=dtype)
    for one, t in zip(stack, adapters, strict=True):
        if t is not None:
            one.narrow(ranks, 0, t.shape[ranks]).copy_(t)
    return stack


def _as_stack(adapters: Tensor | Sequence[Tensor | None], ranks: int, dtype: torch.dtype) -> Tensor:
    """A stack as it is, for kernels that read any strides and dtype; else as :func:`_stacked`."""
    return adapters if isinstance(adapters, Tensor) else _stacked(adapters, ranks, dtype)


def _gradient_like(adapters: Tensor | Sequence[Tensor | None], stack: Tensor) -> Tensor:
    """What has the dtype and the strides of a stack of gradients.

    Those of a stack of adapters: then autograd need not copy the gradient into the order of PEFT's
    Parameter, in which the segment is the fastest.
    """
    if isinstance(adapters, Tensor):
        return adapters
    return torch.empty_like(stack, dtype=_widest(adapters), device="meta")


def _as_given(gradient: Tensor | None, adapters, ranks: int, segments: Segments):
    """A stack of gradients, each cut to its adapter's rank and in its dtype."""
    if gradient is None or isinstance(adapters, Tensor):
        return gradient
    found = []
    for g, (t, (a, b)) in enumerate(zip(adapters, segments.bounds, strict=True)):
        is_absent = t is None or a == b
        part = None if is_absent else gradient[g].narrow(ranks, 0, t.shape[ranks])
        # A copy: a view would keep the whole stack.
        found.append(None if part is None else part.to(t.dtype, copy=True))
    return found


def _scales(scaling: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """The scales ``(G,)`` in float32."""
    if not any(isinstance(s, Tensor) for s in scaling) and len(set(scaling)) == 1:
        return constant(_filled, scaling[0], len(scaling), device)
    # Each number is a constant on the device, of which there are few; not each combination.
    each = (s if isinstance(s, Tensor) else constant(scalar, s, device) for s in scaling)
    return torch.stack([s.float() for s in each])


def _filled(value: float, count: int, device: torch.device) -> Tensor:
    """Filled on the device: CUDA graphs cannot capture a copy from the host."""
    return torch.full((count,), value, dtype=torch.float32, device=device)
