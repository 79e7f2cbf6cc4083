"""Products over rows that are sorted into segments, each with its own adapter.

    forward    S_g  = D(x_g) A_gᵀ          y_g  = base_g + s_g·S_g B_gᵀ
    backward   G_g  = s_g·dy_g B_g         dB_g = s_g·dy_gᵀ S_g
               dA_g = G_gᵀ D(x_g)          dx_g = base_g + D(G_g A_g)

The base is given, and added to in place (*addmm*); or ``gemm_segments`` computes it in the same
launch, ``x_g W_gᵀ + bias_g`` and ``dy_g W_g``, from one weight or one per segment (*split*).

The rows of segment g are those from offset g - 1 (0 for the first) to offset g. Each product is one
launch for all segments. Its programs read their rows from a table, which is made on the device from
the offsets: the host waits for nothing, and a CUDA graph captures it all, for any offsets.

* Rows beyond the last offset belong to no segment. They are neither read nor written.
* A segment's results depend on its own rows and adapter only, NaN included.
* Dropout's mask is that of each row's number in another order, so it does not depend on the sort.

``G`` segments, ``M`` rows in all, ``K`` in_features, ``N`` out_features, ``R`` rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import select_config
from .common import BLOCK_ENTRY, ITEM_ENTRY
from .config import DIGITS, MASK_VECTOR, SEGMENT_ROWS, cdiv
from .strategies import (
    inner_contiguous,
    inner_dense,
    run_add,
    run_gemm,
    run_rank_grad,
    run_shrink,
)

__all__ = [
    "Segments",
    "add_segments",
    "gemm_segments",
    "input_gradients_segments",
    "shrink_segments",
    "thin_gradients_segments",
]


class Segments:
    """Which rows belong to which segment. Its tables are made once: share it between calls.

    Args:
        offsets: int32 or int64 ``(G,)``, the end of each segment: not falling, at most ``rows``.
            Not checked, since the host does not read them.
        rows: ``M``, with those of no segment.
    """

    def __init__(self, offsets: Tensor, rows: int):
        self.count, self.rows = offsets.shape[0], rows
        self._ends = offsets.long()
        self._starts = F.pad(self._ends[:-1], (1, 0))
        self._tables: dict[int, Tensor] = {}

    def blocks(self, size: int) -> Tensor:
        """int32 ``(rows // size + G, BLOCK_ENTRY)``: segment, first row, end of the segment.

        A segment has a block for each ``size`` of its rows, the last one for the rest. In entries
        that are not needed the first row is not before the end.
        """
        if size not in self._tables:
            segment, nth, _ = self._divided(size, least=0)
            first = self._starts[segment] + nth * size
            self._tables[size] = _table(BLOCK_ENTRY, segment, first, self._ends[segment])
        return self._tables[size]

    def items(self) -> Tensor:
        """int32 ``(rows // SEGMENT_ROWS + G, ITEM_ENTRY)``, as for :func:`.rank_grad.rank_grad`.

        Segment, first row, end; number of items of the segment (0 in an entry that is not needed),
        the item's number among them, and the partial sums of all segments before. A segment without
        rows has an empty item; one with a single item has no partial sums.
        """
        if 0 not in self._tables:
            segment, nth, count = self._divided(SEGMENT_ROWS, least=1)
            first = self._starts[segment] + nth * SEGMENT_ROWS
            end = torch.minimum(first + SEGMENT_ROWS, self._ends[segment])
            parts = torch.where(count > 1, count, 0)
            before = parts.cumsum(0) - parts
            number = torch.where(nth < count[segment], count[segment], 0)
            self._tables[0] = _table(ITEM_ENTRY, segment, first, end, number, nth, before[segment])
        return self._tables[0]

    def _divided(self, size: int, least: int) -> tuple[Tensor, Tensor, Tensor]:
        """The segment of each piece, its number among the segment's, and their count ``(G,)``.

        There are as many pieces as can be needed; those that are not continue the last segment.
        """
        count = torch.div(self._ends - self._starts + size - 1, size, rounding_mode="floor")
        count = count.clamp(min=least)
        ends = count.cumsum(0)
        piece = torch.arange(self.rows // size + self.count, device=ends.device)
        segment = torch.searchsorted(ends, piece, right=True).clamp(max=self.count - 1)
        return segment, piece - (ends - count)[segment], count


def shrink_segments(
    x: Tensor,
    lora_A: Tensor,
    offsets: Tensor | Segments,
    scale: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    keep_count: int = 1 << DIGITS,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The unscaled ``S (M, R)`` in x's dtype, and the keep bits int32 ``(M, words)``, if any.

    In rows of no segment both are uninitialised.

    Args:
        x: ``(M, K)``, sorted; no dimension may be 0.
        lora_A: ``(G, R, K)``, any strides and floating dtype.
        offsets: as in :class:`Segments`, or a :class:`Segments`.
        scale: any floating ``(G,)``; the kernel reads it, but ``S`` is unscaled. None: made here.
        seed: of dropout, a 0-d int64 tensor, or None.
        keep_count: the probability that an entry is kept, in units of ``2**-DIGITS``.
        rows: int64 ``(M,)``, below 2³¹: the row of the mask that each row of x has; None: its own.
    """
    x = inner_contiguous(x)
    M, K = x.shape
    segments, target = _segments(offsets, M), select_config.target_of(x.device)
    scale = x.new_ones(segments.count, dtype=torch.float32) if scale is None else scale
    masking = {}
    if seed is not None:
        words = cdiv(K, MASK_VECTOR) * (MASK_VECTOR // 32)
        bits = torch.empty((M, words), dtype=torch.int32, device=x.device)
        rows = None if rows is None else rows.contiguous()
        masking = {"keep_bits": bits, "seed": seed, "keep_count": keep_count, "rows": rows}
    q = inner_dense(lora_A).transpose(1, 2)
    S = run_shrink(x, q, scale.contiguous(), target, scale_u=False, segments=segments, **masking)
    return S, masking.get("keep_bits")


def add_segments(
    base: Tensor, S: Tensor, lora_B: Tensor, offsets: Tensor | Segments, scale: Tensor
) -> None:
    """Add ``s_g · S_g B_gᵀ`` to each segment of ``base``, in place.

    Args:
        base: ``(M, N)``, inner stride 1, sorted; of no segment: unchanged.
        S: ``(M, R)``, cast to base's dtype for the product.
        lora_B: ``(G, N, R)``, any strides and floating dtype.
        offsets: as in :class:`Segments`, or a :class:`Segments`.
        scale: any floating ``(G,)``.
    """
    run_add(
        base, inner_contiguous(S), inner_dense(lora_B).transpose(1, 2), scale.contiguous(),
        select_config.target_of(base.device), base=base, segments=_segments(offsets, base.shape[0]),
    )  # fmt: skip


def gemm_segments(
    o: Tensor,
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    offsets: Tensor | Segments,
    scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    keep_bits: Tensor | None = None,
    inv_keep: float = 1.0,
) -> None:
    """Write ``o_g = p_g q_g + s_g · D(u_g v_g) + bias_g``, in the notation of ``lora_gemm.py``.

    ``y`` from x, Wᵀ, S and Bᵀ; ``dx`` from dy, W, G, A and the keep bits, without a scale.

    Args:
        o: ``(M, N)`` in p's dtype, inner stride 1; rows of no segment are not written.
        p: ``(M, L)``, sorted.
        q: ``(L, N)``, or a stack ``(G, L, N)``, in p's dtype, any strides.
        u: ``(M, R)``, cast to p's dtype.
        v: ``(G, R, N)``, any strides and floating dtype; cast to p's.
        offsets: as in :class:`Segments`, or a :class:`Segments`.
        scale: any floating ``(G,)``, or None for 1.
        bias: any floating ``(N,)`` or ``(G, N)``, or None.
        keep_bits: as returned by :func:`shrink_segments`.
        inv_keep: factor of the kept entries; not used without keep bits.
    """
    run_gemm(
        inner_contiguous(p), q, inner_contiguous(u), v,
        None if scale is None else scale.contiguous(), select_config.target_of(p.device),
        None if bias is None else bias.contiguous(), keep_bits,
        1.0 if keep_bits is None else inv_keep, o, _segments(offsets, p.shape[0]),
    )  # fmt: skip


def thin_gradients_segments(
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    offsets: Tensor | Segments,
    scale: Tensor,
    needs: tuple[bool, bool] = (True, True),
    like: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``G_g = s_g · dy_g B_g (M, R)`` in dy's dtype and ``dB_g = s_g · dy_gᵀ S_g``.

    In rows of no segment ``G`` is uninitialised. ``dB (G, N, R)`` is 0 for a segment without rows.

    Args:
        dy: ``(M, N)``, sorted.
        lora_B: ``(G, N, R)``, any strides and floating dtype.
        S: ``(M, R)``; None if ``dB`` is not needed.
        offsets: as in :class:`Segments`, or a :class:`Segments`.
        scale: any floating ``(G,)``.
        needs: whether ``G`` and ``dB`` are needed; the other is None.
        like: the tensor whose dtype and order of strides ``dB`` gets; by default lora_B.
    """
    dy, scale = inner_contiguous(dy), scale.contiguous()
    segments, target = _segments(offsets, dy.shape[0]), select_config.target_of(dy.device)
    G = dB = None
    if needs[1]:
        dB = torch.empty_like(lora_B if like is None else like, device=dy.device)
        o = dB.transpose(1, 2)
        run_rank_grad(o, inner_contiguous(S), dy, scale, target, None, segments=segments)
    if needs[0]:
        G = run_shrink(dy, inner_dense(lora_B), scale, target, segments=segments)
    return G, dB


def input_gradients_segments(
    x: Tensor | None,
    dx: Tensor | None,
    lora_A: Tensor,
    G: Tensor,
    offsets: Tensor | Segments,
    keep_bits: Tensor | None = None,
    inv_keep: float = 1.0,
    needs_A: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """``dA_g = G_gᵀ D(x_g)``; then ``D(G_g A_g)`` is added to ``dx`` in place.

    ``dA (G, R, K)`` is contiguous, 0 for a segment without rows. Rows of dx of no segment are
    unchanged.

    Args:
        x: ``(M, K)``, sorted; None if ``dA`` is not needed.
        dx: ``(M, K)``, inner stride 1; None if it is not needed.
        lora_A: ``(G, R, K)``, any strides and floating dtype.
        G: ``(M, R)`` in x's dtype, as of :func:`thin_gradients_segments`.
        offsets: as in :class:`Segments`, or a :class:`Segments`.
        keep_bits: as returned by :func:`shrink_segments`.
        inv_keep: factor of the kept entries; not used without keep bits.
        needs_A: whether ``dA`` is needed; else it is None.
        dtype: of ``dA``; by default lora_A's.
    """
    G = inner_contiguous(G)
    segments, target = _segments(offsets, G.shape[0]), select_config.target_of(G.device)
    masking = {} if keep_bits is None else {"keep_bits": keep_bits, "inv_keep": inv_keep}
    dA = None
    if needs_A:
        dA = torch.empty(lora_A.shape, dtype=dtype or lora_A.dtype, device=G.device)
        x = inner_contiguous(x)
        run_rank_grad(dA, G, x, None, target, None, segments=segments, **masking)
    if dx is not None:
        v = inner_dense(lora_A)
        run_add(dx, G, v, None, target, base=dx, segments=segments, **masking)
    return dA


def _segments(offsets: Tensor | Segments, rows: int) -> Segments:
    return offsets if isinstance(offsets, Segments) else Segments(offsets, rows)


def _table(columns: int, *entries: Tensor) -> Tensor:
    table = torch.stack(entries, dim=1).int()
    assert table.shape[1] == columns
    return table
