"""Tensor parallelism: the placements of a layer's operands, and the layer on their local parts.

Along each dimension of the mesh, the placement of the weight (or of a given base) determines that
of ``y``, which determines all others. Every rank then computes the layer on plain tensors:

    weight      y           x           A           B           bias        reduced
    Shard(0)    Shard(-1)   Replicate   Replicate   Shard(0)    Shard(0)    dx, dA
    Shard(1)    Partial     Shard(-1)   Shard(1)    Replicate   1/n each    y, dB
    Replicate   as x        rows, or    Replicate   Replicate   Replicate   dA, dB if x is
                            Replicate                                       sharded by rows

``y_local = x_local W_localᵀ + S_local Bᵀ`` is linear in its shards, so the base and the adapter
share one reduction. ``dB = dYᵀ S`` and ``dA = Gᵀ D(x)`` are partial sums if ``S`` or ``G`` is one.
Operands with other placements are redistributed, and their gradients back again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class _Along(NamedTuple):
    """Placements along one mesh dimension: of operands, and of their local parts' gradients."""

    x: Placement
    lora_A: Placement
    lora_B: Placement
    bias: Placement
    dx: Placement
    dA: Placement
    dB: Placement
    dbias: Placement


def _along(y: Placement, columns: Shard) -> _Along:
    """The placements that go with ``y``'s; ``columns`` is the shard of its last dimension."""
    whole, partial, first = Replicate(), Partial(), Shard(0)
    if y == columns:
        return _Along(whole, whole, first, first, partial, partial, first, first)
    if y == partial:
        inner = Shard(1)
        return _Along(columns, inner, whole, whole, columns, inner, partial, partial)
    if y == whole:
        return _Along(*[whole] * 8)
    return _Along(y, whole, whole, whole, y, partial, partial, partial)


def local_operands(operands):
    """This rank's part of a call on DTensors.

    With dropout, ranks with the same part of ``x`` drop the same entries, whatever the state of
    their generators. Different parts have independent masks.

    Args:
        operands: :class:`fused_lora.ops.operands.Operands` of DTensors.

    Returns:
        The operands as plain local tensors, and a function that converts the local ``y`` to the
        DTensor ``y``.

    Raises:
        ValueError: one of them is a plain tensor, on another mesh, or has a placement that is not
            in the table above.
    """
    x, weight, lora_A, lora_B, bias, scaling, seed, _, _, base = operands
    frozen = {"weight": weight} if base is None else {"base": base}
    mesh = _common_mesh({"x": x, **frozen, "lora_A": lora_A, "lora_B": lora_B, "bias": bias})
    columns = Shard(x.dim() - 1)
    if base is None:
        pairs = zip(weight.placements, x.placements, strict=True)
        outputs = [_output(own, other, columns) for own, other in pairs]
    else:
        outputs = [_checked_base(p) for p in base.placements]
    along = _Along(*zip(*(_along(y, columns) for y in outputs), strict=True))
    if bias is not None:
        bias = _parameter(bias, along.bias, along.dbias)
        if (summands := _summands(outputs, mesh)) > 1:
            bias = bias / summands
    local = operands._replace(
        x=_input(x, along.x, along.dx),
        weight=None if weight is None else weight.to_local(),
        lora_A=_parameter(lora_A, along.lora_A, along.dA),
        lora_B=_parameter(lora_B, along.lora_B, along.dB),
        bias=bias,
        scaling=scaling.to_local() if isinstance(scaling, DTensor) else scaling,
        seed=None if seed is None else _local_seed(seed, along.x, mesh),
        base=None if base is None else base.to_local(),
    )
    shape = (*x.shape[:-1], lora_B.shape[0])
    return local, lambda y: _Joined.apply(y, mesh, tuple(outputs), shape)


class _Joined(torch.autograd.Function):
    """The DTensor that consists of every rank's ``y``."""

    @staticmethod
    def forward(ctx, y, mesh, placements, shape):
        ctx.placements = placements
        meta = torch.empty(shape, device="meta")
        return DTensor.from_local(
            y, mesh, placements, run_check=False, shape=meta.shape, stride=meta.stride()
        )

    @staticmethod
    def backward(ctx, dy):
        # As from_local, except in a second backward: each rank's part of a row-wise layer has a
        # gradient in dY, and the gradient of dY is their sum.
        whole = [Replicate() if p.is_partial() else p for p in ctx.placements]
        local = dy.redistribute(placements=whole).to_local(grad_placements=ctx.placements)
        return local, None, None, None


def _common_mesh(operands: dict[str, Tensor | None]) -> DeviceMesh:
    given = {name: t for name, t in operands.items() if t is not None}
    plain = [name for name, t in given.items() if not isinstance(t, DTensor)]
    if plain:
        raise ValueError(
            "expected every operand to be a DTensor or none, got a plain Tensor for"
            f" {', '.join(plain)}: adapt the model first, then call parallelize_module with"
            " fused_lora.tensor_parallel's styles, which distribute the input too (sharded by FSDP,"
            " a layer works within its model's forward only)"
        )
    x = given["x"]
    for name, t in given.items():
        if t.device_mesh != x.device_mesh:
            raise ValueError(f"expected {name} on x's {x.device_mesh}, got {t.device_mesh}")
    return x.device_mesh


def _output(weight: Placement, x: Placement, columns: Shard) -> Placement:
    """The placement of ``y`` that follows from those of the weight and ``x``."""
    if weight == Shard(0):
        return columns
    if weight == Shard(1):
        return Partial()
    if weight != Replicate():
        raise ValueError(f"expected weight in Shard(0), Shard(1) or Replicate(), got {weight}")
    return x if x.is_shard() and x != columns else Replicate()


def _checked_base(base: Placement) -> Placement:
    if not base.is_shard() and base not in (Replicate(), Partial()):
        raise ValueError(f"expected base sharded, replicated or a sum of parts, got {base}")
    return base


def _input(x: Tensor, placements: Sequence[Placement], gradient: Sequence[Placement]) -> Tensor:
    """The local part of ``x``; its gradient stays partial until ``x``'s own backward reduces it."""
    if x.placements != tuple(placements):
        x = x.redistribute(placements=placements)
    return _Split.apply(x, tuple(gradient))


class _Split(torch.autograd.Function):
    """A ``to_local`` that is twice differentiable, however ``x`` was distributed."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.mesh, ctx.placements, ctx.gradient = x.device_mesh, x.placements, gradient
        ctx.shape, ctx.stride = x.shape, x.stride()
        local = x.to_local()
        return local.view_as(local)  # not x's own local tensor, which has no gradient

    @staticmethod
    def backward(ctx, dx):
        dx = DTensor.from_local(
            dx, ctx.mesh, ctx.gradient, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        if torch.is_grad_enabled():  # the reduction in from_local's backward is not differentiable
            dx = dx.redistribute(placements=ctx.placements)
        return dx, None


def _parameter(p: Tensor, placements: Sequence[Placement], gradient: Sequence[Placement]) -> Tensor:
    """The local part of a parameter; its gradient gets the parameter's own placements."""
    # Redistributed even if its placements match: in backward this reduces the gradient, once. Not
    # by to_local, which guesses an uneven gradient's strides in PyTorch 2.11: autograd copies it.
    return _Split.apply(p.redistribute(placements=placements), tuple(gradient))


def _summands(outputs: Sequence[Placement], mesh: DeviceMesh) -> int:
    """How many local ``y`` are summed: each of them adds an equal part of the bias."""
    count = 1
    for dim, placement in enumerate(outputs):
        if placement.is_partial():
            count *= mesh.size(dim)
    return count


def _local_seed(seed: Tensor, x: Sequence[Placement], mesh: DeviceMesh) -> Tensor:
    """The first rank's seed for all replicas of ``x``, and a different one for each shard."""
    whole = [Replicate()] * mesh.ndim
    if Replicate() in x:
        sources = [Shard(0) if p.is_replicate() else Replicate() for p in x]
        seeds = DTensor.from_local(seed.reshape(1), mesh, sources, run_check=False)
        seed = seeds.redistribute(placements=whole).to_local()[0]
    shard = 0
    for dim, placement in enumerate(x):
        if placement.is_shard():
            shard = shard * mesh.size(dim) + mesh.get_local_rank(dim)
    return seed + shard
