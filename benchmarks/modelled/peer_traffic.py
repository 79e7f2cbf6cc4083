"""Bytes and operations of other implementations of a LoRA layer, as in ``strategy/traffic.py``.

Each function returns the schedule of one forward and backward with gradients of A, B and x, all in
one dtype. PyTorch keeps a dropout mask of one byte per element; drawing it is modelled as costing
only these bytes, which favours the peers. The comments count passes: one pass reads or writes a
tensor of x's size in half precision, assuming K = N.
"""

from __future__ import annotations

from fused_lora.kernels import select_config
from fused_lora.strategy.devices import Device
from fused_lora.strategy.traffic import TRITON_TRAFFIC, Kernel, Product, vendor_gemm


class _Sizes:
    """Bytes of the layer's tensors, and the kernels that the peers have in common."""

    def __init__(self, device: Device, c: Product):
        self.c, self.sms = c, device.target.sms
        self.X, self.Y = c.M * c.L * c.itemsize, c.M * c.N * c.itemsize
        self.A, self.B = c.R * c.L * c.itemsize, c.R * c.N * c.itemsize
        self.S, self.mask = c.M * c.R * c.itemsize, c.M * c.L
        self.thin_x, self.thin_y = 2.0 * c.M * c.L * c.R, 2.0 * c.M * c.N * c.R

    def frozen(self) -> tuple[Kernel, Kernel]:
        """``x Wᵀ`` and ``dY W``."""
        c = self.c
        forward = vendor_gemm("y", self.sms, c.M, c.L, c.N, c.itemsize, bias=c.bias)
        return forward, vendor_gemm("dx", self.sms, c.M, c.N, c.L, c.itemsize)

    def dropout(self) -> list[Kernel]:
        """``D(x)`` and its mask: 2.5 passes."""
        if not self.c.masked:
            return []
        return [Kernel("dropout", {"x": self.X}, {"d": self.X, "mask": self.mask})]

    def undropped(self) -> list[Kernel]:
        """The gradient through dropout: 2.5 passes."""
        if not self.c.masked:
            return []
        return [Kernel("dropout backward", {"dd": self.X, "mask": self.mask}, {"dd'": self.X})]

    def gradients(self) -> list[Kernel]:
        """``dB``, ``G = dY B`` and ``dA``: 3 passes."""
        return [
            Kernel("dB", {"dy": self.Y, "S": self.S}, {"dB": self.B}, self.thin_y),
            Kernel("G", {"dy": self.Y, "B": self.B}, {"G": self.S}, self.thin_y),
            Kernel("dA", {"d": self.X, "G": self.S}, {"dA": self.A}, self.thin_x),
        ]


def frozen(device: Device, c: Product) -> list[Kernel]:
    """The layer without an adapter, a lower bound."""
    return list(_Sizes(device, c).frozen())


def eager(device: Device, c: Product) -> list[Kernel]:
    """``linear(x) + s * (D(x) Aᵀ) Bᵀ`` under autograd: 21 thin passes with dropout, 16 without."""
    t = _Sizes(device, c)
    X, Y, S = t.X, t.Y, t.S
    forward, backward = t.frozen()
    return [
        forward,
        *t.dropout(),
        Kernel("S", {"d": X, "A": t.A}, {"S": S}, t.thin_x),  # 1
        Kernel("z", {"S": S, "B": t.B}, {"z": Y}, t.thin_y),  # 1
        Kernel("scale", {"z": Y}, {"sz": Y}),  # 2
        Kernel("add", {"y": Y, "sz": Y}, {"out": Y}),  # 3
        Kernel("scale backward", {"dy": Y}, {"dz": Y}),  # 2
        *t.gradients(),
        Kernel("dd", {"G": S, "A": t.A}, {"dd": X}, t.thin_x),  # 1
        *t.undropped(),
        backward,
        Kernel("accumulate", {"dx": X, "dd'": X}, {"dx": X}),  # 3
    ]


def chained(device: Device, c: Product) -> list[Kernel]:
    """One autograd function of vendor GEMMs; ``addmm_`` accumulates the adapter's products.

    15 thin passes with dropout, 8 without.
    """
    t = _Sizes(device, c)
    X, Y, S = t.X, t.Y, t.S
    forward, backward = t.frozen()
    kernels = [
        forward,
        *t.dropout(),
        Kernel("S", {"d": X, "A": t.A}, {"S": S}, t.thin_x),  # 1
        Kernel("addmm_", {"y": Y, "S": S, "B": t.B}, {"y": Y}, t.thin_y),  # 2
        *t.gradients(),
        backward,
    ]
    if not c.masked:
        return [*kernels, Kernel("addmm_", {"dx": X, "G": S, "A": t.A}, {"dx": X}, t.thin_x)]  # 2
    return [
        *kernels,
        Kernel("dd", {"G": S, "A": t.A}, {"dd": X}, t.thin_x),  # 1
        *t.undropped(),
        Kernel("accumulate", {"dx": X, "dd'": X}, {"dx": X}),  # 3
    ]


def lorafusion(device: Device, c: Product) -> list[Kernel]:
    """Split at S in Triton, with a stored ``D(x)`` and byte mask (Zhu et al., LoRAFusion, 2025).

    6 thin passes with dropout, 4 without.
    """
    t = _Sizes(device, c)
    X, S = t.X, t.S
    reads, written = {"x": X, "A": t.A}, {"S": S}
    mask = {}
    if c.masked:
        mask, written = {"mask": t.mask}, written | {"d": X, "mask": t.mask}
    forward, backward = t.frozen()
    return [
        Kernel("dropout and S", reads, written, t.thin_x),  # 2.5
        _fused(device, forward, (c.M, c.N), {"S": S, "B": t.B}, t.thin_y),
        *t.gradients(),
        _fused(device, backward, (c.M, c.L), {"G": S, "A": t.A} | mask, t.thin_x),  # 0.5
    ]


def _fused(device: Device, gemm: Kernel, shape: tuple[int, int], more: dict, flops: float):
    """``gemm`` in Triton, at the speed modelled for this library's, with ``more`` read too."""
    tile = select_config.gemm_config(device.target, 2, *shape, 16, aligned=True)
    return Kernel(
        gemm.name,
        gemm.reads | more,
        gemm.writes,
        gemm.flops + flops,
        gemm.rereads,
        gemm=TRITON_TRAFFIC,
        speed=device.gemm_ratio * select_config.fill(tile, device.target, *shape),
    )


PEERS = {"eager": eager, "chained": chained, "lorafusion": lorafusion}
