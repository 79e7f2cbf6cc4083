"""Rows sorted into segments, each with an adapter of its own: what a call says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import dropout

Bounds = Sequence[tuple[int, int]]  # the first row of each segment, and the one after its last


class Segments:
    """Rows sorted into ``G`` segments: segment ``g`` ends before row ``offsets[g]``.

    Such as the tokens of each expert of a mixture, or the samples of each adapter of a batch. Make
    one per batch and share it between layers; within a CUDA graph, make it there. Both tensors are
    copied.

    Args:
        offsets: ``(G,)`` int32 or int64, the end of each segment: not negative and not falling, as
            ``torch.nn.functional.grouped_mm`` takes them. A segment may be empty. Rows from
            ``offsets[-1]`` on belong to none.
        rows: ``(M,)`` int64, a permutation: the place that each row had before it was sorted.
            Dropout's mask belongs to that place, so it does not depend on the order. Default: the
            rows are in their order.
        whole: whether every row belongs to a segment, so that on a GPU no pass over the output
            writes the others' zeros. Not checked there.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions or no segment; on a CPU also offsets that fall and
            ``rows`` that are no permutation. A GPU's values are not read here.
    """

    def __init__(self, offsets: Tensor, rows: Tensor | None = None, *, whole: bool = False):
        _check_integers("offsets", offsets, (torch.int32, torch.int64))
        if not offsets.numel():
            raise ValueError("expected offsets of at least one segment, got none")
        self.offsets = offsets.to(torch.int64, copy=True)
        self.whole = whole
        self._bounds: Bounds | None = None
        self._made: dict[tuple, object] = {}
        self.rows = None
        if offsets.is_cpu:
            ends = [last for _, last in self.bounds]
            if ends[0] < 0 or any(b < a for a, b in pairwise(ends)):
                raise ValueError(f"expected offsets from 0 on that do not fall, got {ends}")
        if rows is None:
            return
        _check_integers("rows", rows, (torch.int64,))
        if rows.device != offsets.device:
            raise ValueError(
                f"expected rows on offsets' device {offsets.device}, got {rows.device}"
            )
        if rows.is_cpu and not torch.equal(
            rows.sort().values, torch.arange(len(rows), device=rows.device)
        ):
            raise ValueError(f"expected rows to be a permutation of 0 to {len(rows) - 1}")
        self.rows = rows.clone()

    @classmethod
    def of_ends(cls, ends: Sequence[int], device: torch.device) -> Segments:
        """Segments whose ends are known on the host: nothing waits for a GPU."""
        found = cls(torch.tensor(ends, device=device))
        found._bounds = list(zip([0, *ends], ends, strict=False))
        return found

    @property
    def bounds(self) -> Bounds:
        """The first row of each segment, and the one after its last; waits for a GPU once."""
        if self._bounds is None:
            ends = self.offsets.tolist()
            self._bounds = list(zip([0, *ends], ends, strict=False))
        return self._bounds

    def covers(self, rows: int) -> bool:
        """Whether it is known that each of ``rows`` rows belongs to a segment."""
        return self.whole or (self._bounds is not None and self._bounds[-1][1] == rows)

    def owners(self, rows: int) -> Tensor:
        """int64 ``(rows,)``: the segment of each row, ``G`` for one of none."""
        return self._once(_owners, rows)

    def table(self, rows: int):
        """What the kernels read; see :class:`fused_lora.kernels.segments.Segments`."""
        from ..kernels.segments import Segments as Table

        return self._once(Table, rows)

    def _once(self, make: Callable, rows: int):
        stream = None
        if self.offsets.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # what a capture makes is its graph's own
                return make(self.offsets, rows)
            stream = torch.cuda.current_stream(self.offsets.device).cuda_stream
        key = make, rows, stream
        if key not in self._made:
            self._made[key] = make(self.offsets, rows)
        return self._made[key]

    def __len__(self) -> int:
        return self.offsets.shape[0]

    def __repr__(self) -> str:
        return f"Segments({len(self)} on {self.offsets.device})"


def ranks_of(lora_A: Tensor | Sequence[Tensor | None]) -> list[int | None]:
    """The rank of each segment's adapter, None where it has none, of a stack or a sequence."""
    if isinstance(lora_A, Tensor):
        return [lora_A.shape[1]] * lora_A.shape[0]
    return [None if A is None else A.shape[0] for A in lora_A]


def _owners(offsets: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True)


def keep_bits_of(
    seed: Tensor, segments: Segments, rows: int, columns: int, keep_counts: Sequence[int]
) -> Tensor:
    """Keep bits ``int32 (M, words)`` of sorted rows; those of a row depend on its place before.

    Rows of segments without dropout have any bits.
    """
    made = {}
    for count in dict.fromkeys(keep_counts):
        if count < dropout.KEEP_ALL:
            bits = dropout.make_keep_bits(seed, rows, columns, count)
            made[count] = bits if segments.rows is None else bits[segments.rows]
    keep_bits, *others = made.values()
    if others:
        for (first, last), count in zip(segments.bounds, keep_counts, strict=True):
            if count in made:
                keep_bits[first:last] = made[count][first:last]
    return keep_bits


def _check_integers(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"expected {name} in {kinds}, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"expected {name} of one dimension, got shape {tuple(tensor.shape)}")
