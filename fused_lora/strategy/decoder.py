"""The kernels of projections that share their input, and of a gated MLP.

As ``ops/shared_input.py`` and ``ops/gated_mlp.py`` launch them on a GPU, forward and backward with
all gradients; and the kernels of the same projections as separate layers. What each kernel moves
and computes is in :mod:`.traffic`.

Projections are given as forward products (:class:`.traffic.Product`). Those of one input have the
same ``M``, ``L`` and dtypes; those with dropout keep entries with the same probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..kernels.config import MIN_SPLIT_ROWS, TICKETS, VECTOR_BYTES, cdiv
from . import traffic
from .devices import Device
from .schedule import back, layer, product
from .traffic import Kernel, Product, torch_kernel, vendor_gemm

Parts = list[tuple[str, Kernel]]
INNER, ACTIVATION, DOWN = "gate, up", "activation", "down"


def chain(
    device: Device, projections: Sequence[Product], strategies: Sequence[str]
) -> list[Kernel]:
    """Projections of one input as a chain.

    Args:
        strategies: Triton's strategy of each forward; backward has one sequence only.
    """
    kernels = shrink_shared(device, projections)
    for c, strategy in zip(projections, strategies, strict=True):
        kernels += expand(device, strategy, c)
    for i, c in enumerate(reversed(projections)):
        kernels += thin_gradients(device, back(c))
        kernels.append(base_gradient(device, back(c), accumulates=i > 0))
    return kernels + input_gradients(device, projections)


def gated_mlp(device: Device, projections: Sequence[Product], strategies: Sequence[str]) -> Parts:
    """A gated MLP as one block: each kernel with the part of the block that it belongs to.

    Args:
        projections: gate, up and down.
        strategies: as in :func:`chain`.
    """
    *inner, down = projections
    columns, dh = down.L, back(down)
    kernels = _in(INNER, shrink_shared(device, inner))
    for c, strategy in zip(inner, strategies[:2], strict=True):
        kernels += _in(INNER, expand(device, strategy, c))
    kernels += _in(ACTIVATION, [traffic.gated(down.M, columns, down.itemsize)])
    kernels += _in(DOWN, shrink_shared(device, [down]) + expand(device, strategies[2], down))
    kernels += _in(DOWN, thin_gradients(device, dh))
    kernels += _in(DOWN, [base_gradient(device, dh, accumulates=False)])
    kernels += _in(ACTIVATION, [traffic.gated_backward(device, dh)])
    kernels += _in(DOWN, input_gradients(device, [down], dx=False))
    for i, c in enumerate(inner):
        kernels += _in(INNER, thin_gradients(device, back(c)))
        kernels += _in(INNER, [base_gradient(device, back(c), accumulates=i > 0)])
    return kernels + _in(INNER, input_gradients(device, inner))


def separate(
    device: Device, projections: Sequence[Product], strategies: Sequence[tuple[str, str]]
) -> list[Kernel]:
    """Projections of one input as separate layers, whose gradients of it autograd adds up.

    Args:
        strategies: of each, for forward and for backward.
    """
    kernels = []
    for c, both in zip(projections, strategies, strict=True):
        kernels += layer(device, c, *both)
    x = projections[0].M * projections[0].L * projections[0].itemsize
    add = torch_kernel("add", {"dx": x, "other": x}, {"sum": x})
    return kernels + (len(projections) - 1) * [add]


def torch_activation(M: int, columns: int, itemsize: int) -> list[Kernel]:
    """``silu(gate) · up`` and its gradients by PyTorch's operators, all ``(M, columns)``."""
    size = M * columns * itemsize
    return [
        torch_kernel("silu", {"gate": size}, {"act": size}),
        torch_kernel("mul", {"act": size, "up": size}, {"h": size}),
        torch_kernel("mul", {"dh": size, "act": size}, {"dup": size}),
        torch_kernel("mul", {"dh": size, "up": size}, {"dact": size}),
        torch_kernel("silu_backward", {"dact": size, "gate": size}, {"dgate": size}),
    ]


def shrink_shared(device: Device, projections: Sequence[Product]) -> list[Kernel]:
    """All ``S``: one launch for the projections with dropout, one for the others."""
    kernels = []
    for together in _grouped(projections):
        one = _launch(together)
        kernels += _stack("A", together, one.L, one)
        if one.masked and one.members > 1:
            seeds = 8 * one.members
            kernels.append(torch_kernel("cat", {"seeds": seeds}, {"seed": seeds}))
        kernels += traffic.shrink(device, one)
    return kernels


def expand(device: Device, strategy: str, c: Product) -> list[Kernel]:
    """``y`` of one projection, whose ``S`` is given; *single_pass* is *split* here."""
    return product(device, "split" if strategy == "single_pass" else strategy, c, thin=[])


def thin_gradients(device: Device, dy: Product) -> list[Kernel]:
    """``G`` and ``dB`` of one projection, whose backward product is ``dy``."""
    pair = traffic.thin_pair(device, dy, tickets=False)
    if pair is not None:
        return pair
    dB = traffic.rank_grad(device, dy, scaled=True)
    return _with_tickets(dB) + _with_tickets(traffic.shrink(device, dy))


def base_gradient(device: Device, dy: Product, accumulates: bool) -> Kernel:
    """``dY W``; ``accumulates``: onto the product of another projection."""
    shape = device.target.sms, dy.M, dy.L, dy.N, dy.itemsize
    return vendor_gemm("addmm_" if accumulates else "mm", *shape, seeded=accumulates)


def input_gradients(
    device: Device, projections: Sequence[Product], dx: bool = True
) -> list[Kernel]:
    """All ``dA``, and ``dx += Σ D_i(G_i A_i)`` in place if ``dx``."""
    kernels = []
    for together in _grouped(projections):
        one = _launch(together)
        if one.M > MIN_SPLIT_ROWS:
            kernels.append(torch_kernel("zeros", {}, {"tickets": 4 * TICKETS}))
        kernels += _stack("G", together, one.M, one)
        dA = replace(one, adapter_itemsize=together[0].adapter_itemsize)
        kernels += traffic.rank_grad(device, dA, scaled=False)
        if dx:
            kernels += _stack("A", together, one.L, one)
            kernels.append(traffic.lora_add(device, back(one)))
    return kernels


def _grouped(projections: Sequence[Product]) -> list[list[Product]]:
    """The projections that share launches, in the order of the first one of each group."""
    groups: dict[str | None, list[Product]] = {}
    for c in projections:
        groups.setdefault(c.masked, []).append(c)
    return list(groups.values())


def _launch(together: Sequence[Product]) -> Product:
    """The thin product of one launch: members with dropout; or one adapter of all ranks.

    The ranks of several are padded to whole vectors; those with dropout, to the largest.
    """
    one = together[0]
    if len(together) == 1:
        return one
    vector = VECTOR_BYTES // one.itemsize
    ranks = [cdiv(c.R, vector) * vector for c in together]
    if one.masked:
        launch = replace(one, R=max(ranks), members=len(together))
    else:
        launch = replace(one, R=sum(ranks))
    # Rows with zeros between them are copied to a new matrix in the product's dtype.
    return replace(launch, adapter_itemsize=one.itemsize) if _pads(together, launch) else launch


def _pads(together: Sequence[Product], one: Product) -> bool:
    return one.ranks != sum(c.R for c in together)


def _stack(name: str, together: Sequence[Product], width: int, one: Product) -> list[Kernel]:
    """Several ``A (R, width)`` or ``G (width, R)`` in one matrix, for the launch ``one``."""
    if len(together) == 1:
        return []
    of_adapter = name == "A"
    reads = [c.R * width * (c.adapter_itemsize if of_adapter else c.itemsize) for c in together]
    itemsize = one.adapter_itemsize if of_adapter else one.itemsize
    stacked = one.ranks * width * itemsize
    if not _pads(together, one):
        return [torch_kernel("cat", {name: sum(reads)}, {"stacked": stacked})]
    copies = [
        torch_kernel("copy_", {name: read}, {"stacked": c.R * width * itemsize})
        for c, read in zip(together, reads, strict=True)
    ]
    return [torch_kernel("zeros", {}, {"stacked": stacked}), *copies]


def _with_tickets(kernels: list[Kernel]) -> list[Kernel]:
    """With the tickets that a launch of a split reduction makes for itself."""
    tickets = sum(kernel.writes.get("tickets", 0) for kernel in kernels if not kernel.is_torch)
    if not tickets or any("tickets" in kernel.writes for kernel in kernels if kernel.is_torch):
        return kernels
    return [torch_kernel("zeros", {}, {"tickets": tickets}), *kernels]


def _in(part: str, kernels: list[Kernel]) -> Parts:
    return [(part, kernel) for kernel in kernels]
