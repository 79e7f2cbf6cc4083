"""Tensor parallelism: where the operands of a layer must lie, and the product on local parts.

Along a dimension of the mesh, the weight's placement (for a given base, the base's) decides that of
``y``, and ``y``'s decides the others'. Every rank then computes the layer on plain tensors:

    weight      y           x           A           B           bias        to be reduced
    Shard(0)    Shard(-1)   Replicate   Replicate   Shard(0)    Shard(0)    dx, dA
    Shard(1)    Partial     Shard(-1)   Shard(1)    Replicate   1/n each    y, dB
    Replicate   as x        rows, or    Replicate   Replicate   Replicate   dA, dB if x is
                            Replicate                                       sharded by rows

``y_local = x_local W_localᵀ + S_local Bᵀ`` is linear in its shards, so a base and its adapter have
one reduction between them. ``dB = dYᵀ S`` and ``dA = Gᵀ D(x)`` with a part of ``S`` or ``G`` are
parts of a sum. Operands that lie elsewhere are redistributed, and so are their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class _Along(NamedTuple):
    """Placements along one dimension of the mesh: operands, and their local parts' gradients."""

    x: Placement
    lora_A: Placement
    lora_B: Placement
    bias: Placement
    dx: Placement
    dA: Placement
    dB: Placement
    dbias: Placement


def _along(y: Placement, columns: Shard) -> _Along:
    """What a placement of ``y`` asks for; ``columns`` is that of its last dimension."""
    whole, partial, first = Replicate(), Partial(), Shard(0)
    if y == columns:
        return _Along(whole, whole, first, first, partial, partial, first, first)
    if y == partial:
        inner = Shard(1)
        return _Along(columns, inner, whole, whole, columns, inner, partial, partial)
    if y == whole:
        return _Along(*[whole] * 8)
    return _Along(y, whole, whole, whole, y, partial, partial, partial)


def on_shards(
    product: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    keep: int,
    impl: str,
    base: Tensor | None,
) -> Tensor:
    """``product`` of the same arguments, DTensors, on every rank's local parts; ``y`` a DTensor.

    With dropout, ranks that have the same part of ``x`` drop the same entries of it, whatever the
    state of their generators; different parts have independent masks.

    Raises:
        ValueError: a plain tensor among them, another mesh, or a placement that is none of these.
    """
    frozen = {"weight": weight} if base is None else {"base": base}
    operands = {"x": x, **frozen, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    mesh = _common_mesh(operands)
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
    y = product(
        _input(x, along.x, along.dx),
        None if weight is None else weight.to_local(),
        _parameter(lora_A, along.lora_A, along.dA),
        _parameter(lora_B, along.lora_B, along.dB),
        bias,
        scaling.to_local() if isinstance(scaling, DTensor) else scaling,
        None if seed is None else _local_seed(seed, along.x, mesh),
        keep,
        impl,
        None if base is None else base.to_local(),
    )
    return _Joined.apply(y, mesh, tuple(outputs), (*x.shape[:-1], lora_B.shape[0]))


class _Joined(torch.autograd.Function):
    """``y`` of every rank as a DTensor."""

    @staticmethod
    def forward(ctx, y, mesh, placements, shape):
        ctx.placements = placements
        meta = torch.empty(shape, device="meta")
        return DTensor.from_local(
            y, mesh, placements, run_check=False, shape=meta.shape, stride=meta.stride()
        )

    @staticmethod
    def backward(ctx, dy):
        # What from_local does, but for a second backward: each rank's part of a row-wise layer has
        # a gradient in dY, and dY's is their sum.
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
    """Where ``y`` lies, from where the weight and ``x`` do."""
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
    """The local part of ``x``, whose gradient stays partial: whoever distributed x reduces it."""
    if x.placements != tuple(placements):
        x = x.redistribute(placements=placements)
    return _Split.apply(x, tuple(gradient))


class _Split(torch.autograd.Function):
    """``to_local`` that can be differentiated twice, whatever distributed ``x``."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.mesh, ctx.placements, ctx.gradient = x.device_mesh, x.placements, gradient
        ctx.shape, ctx.stride = x.shape, x.stride()
        local = x.to_local()
        return local.view_as(local)  # x keeps its own, which has no gradient

    @staticmethod
    def backward(ctx, dx):
        dx = DTensor.from_local(
            dx, ctx.mesh, ctx.gradient, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        if torch.is_grad_enabled():  # the reduction in from_local's backward would end the graph
            dx = dx.redistribute(placements=ctx.placements)
        return dx, None


def _parameter(p: Tensor, placements: Sequence[Placement], gradient: Sequence[Placement]) -> Tensor:
    """The local part of a parameter, whose gradient comes to lie as it does."""
    # Redistributed even where it lies right: in backward that reduces the gradient, once. Not by
    # to_local: PyTorch 2.11 guesses the strides of an uneven gradient, and autograd then copies it.
    return _Split.apply(p.redistribute(placements=placements), tuple(gradient))


def _summands(outputs: Sequence[Placement], mesh: DeviceMesh) -> int:
    """How many local ``y`` are summed: a bias is added by each in equal parts."""
    count = 1
    for dim, placement in enumerate(outputs):
        if placement.is_partial():
            count *= mesh.size(dim)
    return count


def _local_seed(seed: Tensor, x: Sequence[Placement], mesh: DeviceMesh) -> Tensor:
    """The first rank's seed where ``x`` is replicated, another for each shard of it."""
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
