"""Sequences of kernels for projections that share their input, and for the gated MLP.

    S_i = D_i(x) A_iᵀ        y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ
    G_i = s_i dy_i B_i       dx  = Σ dy_i W_i + Σ D_i(G_i A_i)        dA_i = G_iᵀ D_i(x)

Each thin product of x is one launch for all members that can share it, so x is read once, and dx is
read and written once:

* members without dropout are one adapter, whose rank is the sum of theirs;
* members that keep entries with the same probability are the members of one launch, each with its
  own mask. Their ranks are padded with zeros to the largest.

``y_i``, ``G_i`` and ``dB_i`` are products of each member's own. Results have a fixed order of sums:
the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gated as gated_kernels
from . import select_config
from .config import MASK_VECTOR, MIN_SPLIT_ROWS, TICKETS, VECTOR_BYTES, cdiv
from .strategies import (
    cached_config,
    expand,
    inner_contiguous,
    is_describable,
    precision_of,
    run_add,
    run_rank_grad,
    run_shrink,
    run_thin_pair,
)

__all__ = [
    "expand",
    "gated",
    "gated_backward",
    "input_gradients",
    "shrink_shared",
    "thin_gradients",
]


def shrink_shared(
    x: Tensor,
    adapters: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    keep_counts: Sequence[int],
    scale: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The unscaled ``S_i (M, R_i)`` in x's dtype, and the keep bits of each member.

    Both are views of what members share: rows of one ``S_i`` are not contiguous.

    Args:
        x: ``(M, K)``; no dimension may be 0.
        adapters: ``A_i (R_i, K)``, any floating dtype.
        seeds: of dropout, 0-d int64 tensors; None for a member without dropout.
        keep_counts: the probabilities that an entry is kept, in units of ``2**-DIGITS``; not used
            without a seed.
        scale: any 0-d floating tensor; the kernel reads it, but ``S`` is unscaled. None: made here.
    """
    x = inner_contiguous(x)
    (M, K), target = x.shape, select_config.target_of(x.device)
    scale = x.new_ones((), dtype=torch.float32) if scale is None else scale
    S: list[Tensor | None] = [None] * len(adapters)
    keep_bits: list[Tensor | None] = [None] * len(adapters)
    keys = [None if s is None else k for s, k in zip(seeds, keep_counts, strict=True)]
    for keep_count, members in _grouped(keys):
        stacked, parts = _stack_rows([adapters[i] for i in members], x, keep_count is not None)
        masking = {}
        if keep_count is not None:
            shape = len(members), M, cdiv(K, MASK_VECTOR) * (MASK_VECTOR // 32)
            bits = torch.empty(shape, dtype=torch.int32, device=x.device)
            own = [seeds[i].view(1) for i in members]
            own = torch.cat(own) if len(own) > 1 else own[0]
            masking = {"keep_bits": bits, "seed": own, "keep_count": keep_count}
            for i, of_member in zip(members, bits.unbind(), strict=True):
                keep_bits[i] = of_member
        u = run_shrink(x, stacked.t(), scale, target, scale_u=False, **masking)
        for i, part in zip(members, parts, strict=True):
            S[i] = u[:, part]
    return S, keep_bits


def thin_gradients(
    dy: Tensor, lora_B: Tensor, S: Tensor | None, scale: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``G = s · dy B (M, R)`` in dy's dtype and ``dB = s · dyᵀ S`` in B's, of one projection.

    Args:
        S: ``(M, R)``, inner stride 1; None if ``dB`` is not needed.
        scale: a 0-d tensor.
        needs: whether ``G`` and ``dB`` are needed; the other is None.
    """
    dy = inner_contiguous(dy)
    target = select_config.target_of(dy.device)
    G = dB = None
    if needs[1]:
        dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        if needs[0]:
            G = run_thin_pair(dB, dy, S, lora_B, scale, target, None)
            if G is not None:
                return G, dB
        run_rank_grad(dB.t(), inner_contiguous(S), dy, scale, target, None)
    if needs[0]:
        G = run_shrink(dy, lora_B, scale, target)
    return G, dB


def input_gradients(
    x: Tensor | None,
    dx: Tensor | None,
    adapters: Sequence[Tensor],
    G: Sequence[Tensor | None],
    keep_bits: Sequence[Tensor | None],
    inv_keeps: Sequence[float],
    needs_A: Sequence[bool],
) -> list[Tensor | None]:
    """``dA_i`` in the dtype of ``A_i``; then ``Σ D_i(G_i A_i)`` is added to ``dx`` in place.

    A ``dA_i`` is a view of what members share.

    Args:
        x: ``(M, K)``; None if no ``dA_i`` is needed.
        dx: ``(M, K)``, inner stride 1; None if it is not needed.
        adapters: ``A_i (R_i, K)``.
        G: ``(M, R_i)`` in x's dtype; None for a member without a gradient.
        keep_bits: packed masks, int32 ``(M, words)``, as of :func:`shrink_shared`; None for a
            member without dropout.
        inv_keeps: the factors of kept entries; not used without keep bits.
        needs_A: whether ``dA_i`` is needed; else, and without ``G_i``, it is None.
    """
    dA: list[Tensor | None] = [None] * len(adapters)
    present = [i for i, g in enumerate(G) if g is not None]
    if not present:
        return dA
    like = G[present[0]]
    target = select_config.target_of(like.device)
    x = None if x is None else inner_contiguous(x)
    keys = [None if b is None else f for b, f in zip(keep_bits, inv_keeps, strict=True)]
    tickets = None
    if like.shape[0] > MIN_SPLIT_ROWS and any(needs_A[i] for i in present):
        tickets = torch.zeros(TICKETS, dtype=torch.int32, device=like.device)
    stacks: dict[tuple, tuple] = {}

    def stack(members: list[int]) -> tuple[Tensor, list[slice], Tensor | None]:
        if tuple(members) not in stacks:
            masks = [keep_bits[i] for i in members if keep_bits[i] is not None]
            u, parts = _stack_columns([G[i] for i in members], bool(masks))
            stacks[tuple(members)] = u, parts, _stack_masks(masks) if masks else None
        return stacks[tuple(members)]

    for inv_keep, members in _grouped(keys, [i for i in present if needs_A[i]]):
        u, parts, bits = stack(members)
        dtypes = {adapters[i].dtype for i in members}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        o = torch.empty((u.shape[1], x.shape[1]), dtype=dtype, device=x.device)
        run_rank_grad(o, u, x, None, target, tickets, bits, inv_keep or 1.0)
        for i, part in zip(members, parts, strict=True):
            dA[i] = o[part].to(adapters[i].dtype)
    if dx is not None:
        for inv_keep, members in _grouped(keys, present):
            u, _, bits = stack(members)
            v, _ = _stack_rows([adapters[i] for i in members], like, inv_keep is not None)
            run_add(dx, u, v, None, target, bits, inv_keep or 1.0, base=dx)
    return dA


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``h = act(gate) · up``, all ``(M, I)``; ``activation`` is one of ``gated.ACTIVATIONS``."""
    gate, up = inner_contiguous(gate), inner_contiguous(up)
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gated_kernels.gated(h, gate, up, _gated_config(0, h, gate, up), activation=activation)
    return h


def gated_backward(
    gate: Tensor,
    up: Tensor,
    dh: Tensor,
    activation: str,
    G: Tensor | None,
    lora_A: Tensor | None,
    keep_bits: Tensor | None,
    inv_keep: float,
    reuse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dgate, dup, h)`` from ``dh + D(G A)``, the whole gradient of ``h``.

    Args:
        gate, up, dh: ``(M, I)`` in one dtype.
        G, lora_A: of the down projection, ``(M, R)`` and ``(R, I)``; both None if ``dh`` is whole.
        keep_bits: of its dropout, int32 ``(M, words)``, or None.
        inv_keep: factor of kept entries.
        reuse: whether the results may be written over gate, up and dh.
    """
    operands = [inner_contiguous(t) for t in (gate, up, dh)]
    results = operands
    if not reuse:
        results = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands]
    rank = 0 if G is None else G.shape[1]
    gated_kernels.gated_backward(
        *operands, _gated_config(rank, *operands, *results), activation=activation,
        **({} if reuse else dict(zip(("dgate", "dup", "h"), results, strict=True))),
        u=None if G is None else inner_contiguous(G), v=lora_A,
        keep_bits=keep_bits, inv_keep=inv_keep, input_precision=precision_of(gate),
    )  # fmt: skip
    return tuple(results)


def _gated_config(rank: int, *matrices: Tensor):
    first = matrices[0]
    return cached_config(
        select_config.gated_config,
        select_config.target_of(first.device),
        first.element_size(),
        *first.shape,
        rank,
        aligned=all(map(is_describable, matrices)),
    )


def _grouped(keys: Sequence, members: Sequence[int] | None = None) -> list[tuple]:
    """``(key, members)`` for each distinct key, in the order of the first member with it."""
    groups: dict = {}
    for i in range(len(keys)) if members is None else members:
        groups.setdefault(keys[i], []).append(i)
    return list(groups.items())


def _parts(ranks: list[int], itemsize: int, padded: bool) -> tuple[int, list[slice]]:
    """The number of stacked ranks and each member's part; ``padded``: to the largest rank.

    The parts of several members start at multiples of a vector.
    """
    if len(ranks) == 1:
        return ranks[0], [slice(0, ranks[0])]
    vector = VECTOR_BYTES // itemsize
    sizes = [cdiv(max(ranks) if padded else rank, vector) * vector for rank in ranks]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return sum(sizes), [slice(at, at + rank) for at, rank in zip(firsts, ranks, strict=True)]


def _stack_rows(adapters: list[Tensor], like: Tensor, padded: bool) -> tuple[Tensor, list[slice]]:
    """The adapters' rows in one matrix, with zeros between, and the part of each."""
    rows, parts = _parts([A.shape[0] for A in adapters], like.element_size(), padded)
    if len(adapters) == 1:
        return adapters[0], parts
    if rows == sum(A.shape[0] for A in adapters):
        return torch.cat(adapters), parts
    stacked = adapters[0].new_zeros((rows, adapters[0].shape[1]), dtype=like.dtype)
    for A, part in zip(adapters, parts, strict=True):
        stacked[part] = A
    return stacked, parts


def _stack_columns(G: list[Tensor], padded: bool) -> tuple[Tensor, list[slice]]:
    """The columns of several G in one matrix, with zeros between, and the part of each."""
    columns, parts = _parts([g.shape[1] for g in G], G[0].element_size(), padded)
    if len(G) == 1:
        return inner_contiguous(G[0]), parts
    if columns == sum(g.shape[1] for g in G):
        return torch.cat(G, dim=1), parts
    stacked = G[0].new_zeros((G[0].shape[0], columns))
    for g, part in zip(G, parts, strict=True):
        stacked[:, part] = g
    return stacked, parts


def _stack_masks(masks: list[Tensor]) -> Tensor:
    """The masks in one tensor ``(n, M, words)``; a view if they lie one after the other."""
    first = masks[0]
    if len(masks) == 1:
        return first
    pitch, start = first.numel(), first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    if all(
        mask.is_contiguous()
        and mask.untyped_storage().data_ptr() == storage
        and mask.storage_offset() == start + i * pitch
        for i, mask in enumerate(masks)
    ):
        return first.as_strided((len(masks), *first.shape), (pitch, *first.stride()))
    return torch.stack(masks)
