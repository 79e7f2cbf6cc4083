"""Adapters of experts in bfloat16 on a CPU with AMX: one product instead of one per segment.

    S = own(x A_allᵀ)          A_all (G·R, K); of each row the R columns of its segment
    y += s·spread(S) B_all     B_all (G·R, N); exact zeros in the columns of other segments

and so ``G = own(s·dY B_allᵀ)`` and ``dx += spread(G) A_all``. A product in bfloat16 has a
fixed cost (measured: 20 µs), and a higher one for a number of rows that oneDNN has not cached.
These have ``G`` times the operations, which AMX computes in less time than starting a product per
segment takes. ``dA`` and ``dB`` stay products of a segment: measured as wide ones, they save a
twentieth of a step and cost a tenth more memory.

Nothing passes from one segment to another. ``own`` selects. The zeros of ``spread`` must not
multiply a NaN or an infinity of another segment's matrix: such a segment is computed apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import cpu_gemm, dropout
from .segments import Segments
from .torch_impl import as_dtype, times

_FEWEST_ROWS = 32  # with fewer, casting the matrices of segments without rows costs more
_WIDEST = 256  # most columns, G·R, that were measured
# With another inner size, oneDNN multiplies the first values of the next row by zeros, until its
# issue 5717 is fixed: a NaN there would reach this row.
_INNER = 32


def is_wide(
    tall: Tensor,
    weight: Tensor | None,
    lora_A: Tensor | Sequence[Tensor | None],
    scaling: Sequence[float | Tensor],
    keep_counts: Sequence[int],
) -> bool:
    """Whether this module computes a call, ``tall`` being its ``x`` or ``dY``."""
    if weight is None or weight.dim() == 2 or not isinstance(lora_A, Tensor):
        return False
    columns = lora_A.shape[0] * lora_A.shape[1]
    return (
        tall.is_cpu
        and cpu_gemm.HAS_AMX
        and tall.dtype == torch.bfloat16
        and tall.shape[0] >= _FEWEST_ROWS
        and columns <= _WIDEST
        and not any(inner % _INNER for inner in (columns, *weight.shape[1:]))
        and all(type(s) is float and s == scaling[0] != 0 for s in scaling)
        and all(count == dropout.KEEP_ALL for count in keep_counts)
    )


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    segments: Segments,
) -> tuple[Tensor, list[Tensor]]:
    """``y (M, N)`` and each ``S_g``, unscaled; operands as in :mod:`.segmented_torch`."""
    S = _own(x, as_dtype(lora_A, x.dtype), 1.0, segments)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    y = _base(x, as_dtype(weight, x.dtype).mT, bias, segments)
    _add(y, S, as_dtype(lora_B, x.dtype).mT, scaling, segments)
    return y, list(S.split([b - a for a, b in segments.bounds]))


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Sequence[Tensor],
    scaling: float,
    segments: Segments,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx (M, K)``, ``dA (G, R, K)`` and ``dB (G, N, R)``, those that are needed."""
    dx = dA = dB = None
    G = _own(dy, as_dtype(lora_B, dy.dtype).mT, scaling, segments)

    def down(g: int, a: int, b: int) -> Tensor:
        return torch.mm(G[a:b].float().t(), x[a:b].float())

    def up(g: int, a: int, b: int) -> Tensor:
        rows = dy[a:b]
        _, turned = cpu_gemm.thin_products(rows, lora_B.shape[2], lora_B.dtype, varies=True)
        return times(scaling, rows.float().t(), S[g].float(), turned)

    # Stacks of gradients come last: nothing else is as large as dx and what it is made of.
    if needs[0]:
        dx = _base(dy, as_dtype(weight, dy.dtype), None, segments)
        _add(dx, G, as_dtype(lora_A, dy.dtype), 1.0, segments)
    if needs[1]:
        dA = _each(lora_A, segments, down)
    if needs[2]:
        dB = _each(lora_B, segments, up)
    return dx, dA, dB


def _own(tall: Tensor, matrices: Tensor, factor: float, segments: Segments) -> Tensor:
    """``factor · tall_g M_gᵀ`` of each segment, with ``matrices (G, R, ·)``."""
    blocks = _blocks(segments)
    wide = times(factor, tall[: len(blocks)], matrices.flatten(0, 1).t())
    return wide.view(-1, matrices.shape[1]).index_select(0, blocks)


def _add(y: Tensor, thin: Tensor, matrices: Tensor, factor: float, segments: Segments) -> None:
    """Add ``factor · thin_g M_g`` to each ``y_g``, with ``matrices (G, R, ·)``."""
    G, R, _ = matrices.shape
    apart, finite, inside = [], matrices, thin
    if not math.isfinite(matrices.sum()):
        finite, inside = matrices.clone(), thin.clone()
        for g, (a, b) in enumerate(segments.bounds):
            if not math.isfinite(matrices[g].sum()):
                apart.append((g, a, b))
                finite[g], inside[a:b] = 0, 0
    blocks = _blocks(segments)
    wide = inside.new_zeros((len(blocks) * G, R)).index_copy_(0, blocks, inside)
    y[: len(blocks)].addmm_(wide.view(-1, G * R), finite.flatten(0, 1), alpha=factor)
    for g, a, b in apart:
        y[a:b].addmm_(thin[a:b], matrices[g], alpha=factor)


def _blocks(segments: Segments) -> Tensor:
    """Where each row's own block is among the ``rows·G`` of a wide matrix."""
    rows = segments.bounds[-1][1]  # those of no segment come after
    return torch.arange(rows) * len(segments) + segments.owners(rows)


def _base(x: Tensor, matrices: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    """``x_g M_g + bias_g``, with ``matrices (G, K, N)``; zeros in rows of no segment."""
    y = x.new_empty((x.shape[0], matrices.shape[2]))
    y[segments.bounds[-1][1] :] = 0
    for g, (a, b) in enumerate(segments.bounds):
        if a == b:
            continue
        if bias is None:
            torch.mm(x[a:b], matrices[g], out=y[a:b])
        else:
            own = bias if bias.dim() == 1 else bias[g]
            torch.addmm(own, x[a:b], matrices[g], out=y[a:b])
    return y


def _each(like: Tensor, segments: Segments, product: Callable[[int, int, int], Tensor]) -> Tensor:
    """A stack of ``product(g, first row, last row + 1)``; zeros of segments without rows."""
    found = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for g, (a, b) in enumerate(segments.bounds):
        if a < b:
            found[g] = product(g, a, b)
    return found
