"""Which kernels a layer runs with each strategy, as ``kernels/strategies.py`` launches them.

What each kernel moves and computes is in :mod:`.traffic`.
"""

from __future__ import annotations

from dataclasses import replace

from ..kernels.config import MIN_SPLIT_ROWS, TICKETS, cdiv
from .devices import Device
from .traffic import (
    Kernel,
    Product,
    cast,
    dropout_mask,
    lora_add,
    lora_gemm,
    rank_grad,
    shrink,
    single_pass,
    thin_pair,
    torch_kernel,
    vendor_gemm,
)

_TABLE_OPERATORS = ("arange", "arange", "shift", "and", "to")  # in dropout._byte_table


def direction(device: Device, strategy: str, c: Product) -> list[Kernel]:
    """All kernels of a forward, or of a backward with ``dA`` and ``dB``."""
    if c.segments:
        return _segmented(device, strategy, c)
    if not c.backward:
        return product(device, strategy, c)
    pair = None if strategy in ("torch", "single_pass") else thin_pair(device, c)
    if pair is None:
        kernels = product(device, strategy, c) + _rank_gradients(device, strategy, c)
        if strategy != "torch" and c.M > MIN_SPLIT_ROWS:
            kernels.insert(0, torch_kernel("zero_", {}, {"tickets": 4 * TICKETS}))
        return kernels
    ahead = replace(c, L=c.N, N=c.L, masked="operand" if c.masked else None)
    return product(device, strategy, c, pair) + rank_grad(device, ahead, scaled=False)


def _segmented(device: Device, strategy: str, c: Product) -> list[Kernel]:
    """The kernels of one direction over segments, as ``ops/segmented_triton.py`` launches them.

    Args:
        strategy: "split" or "addmm".
    """
    if strategy == "split":
        base, added = [lora_gemm(device, c)], []
    else:
        shape = device.target.sms, c.M, c.L, c.N, c.itemsize
        base = [vendor_gemm("grouped_mm", *shape, bias=c.bias, weights=c.weights)]
        base += cast(c.adapters * c.R * c.N, c)
        added = [lora_add(device, replace(c, adapter_itemsize=c.itemsize))]
    if not c.backward:
        return [*shrink(device, c), *base, *added]
    ahead = replace(c, L=c.N, N=c.L, masked="operand" if c.masked else None)
    dA, dB = rank_grad(device, ahead, scaled=False), rank_grad(device, c, scaled=True)
    *casts, G = shrink(device, c)
    return [*casts, *dB, G, *base, *dA, *added]


def product(
    device: Device, strategy: str, c: Product, thin: list[Kernel] | None = None
) -> list[Kernel]:
    """The kernels of one direction, as ``kernels/strategies.py`` launches them for ``strategy``.

    Args:
        strategy: "torch" is PyTorch's operators only.
        thin: the kernels that compute ``U``; by default, those of :func:`shrink`.
    """
    if strategy == "torch":
        return torch_operators(device, c)
    if strategy == "single_pass":
        return single_pass(device, c)
    thin = shrink(device, c) if thin is None else thin
    if strategy == "split":
        return [*thin, lora_gemm(device, c)]
    shape = device.target.sms, c.M, c.L, c.N, c.itemsize
    if strategy == "seeded":
        gemm = vendor_gemm("addmm_", *shape, seeded=True)
        return [*thin, lora_add(device, c, seeds=True), gemm]
    return [*thin, vendor_gemm("mm", *shape, bias=c.bias), lora_add(device, c)]


def torch_operators(device: Device, c: Product) -> list[Kernel]:
    """The kernels of one direction in PyTorch, as ``ops/torch_impl.py`` runs it on a GPU.

    Triton computes the mask.
    """
    operand, thin, out = (size * c.itemsize for size in (c.M * c.L, c.M * c.R, c.M * c.N))
    kernels = cast(c.L * c.R, c)
    if c.masked == "operand":
        kernels.insert(0, dropout_mask(c.M, c.L))
        kernels += _expanded_mask(c.M, c.L, c.itemsize)
        kernels.append(torch_kernel("mul_", {"mask": operand, "p": operand}, {"p": operand}))
    adapter = {"p": operand, "q": c.L * c.R * c.itemsize}
    is_half = c.itemsize == 2
    # On a GPU the scale is a tensor. It multiplies G, or S, or in half precision S Bᵀ.
    wide = c.M * c.R * 4 if c.backward else thin
    kernels.append(torch_kernel("mm", adapter, {"u": wide}, 2.0 * c.M * c.L * c.R))
    if c.backward or not is_half:
        kernels.append(torch_kernel("mul", {"u": wide, "scale": 4}, {"u": wide}))
    if c.backward and is_half:
        kernels.append(torch_kernel("cast", {"u": wide}, {"u": thin}))
    kernels += [
        vendor_gemm("mm", device.target.sms, c.M, c.L, c.N, c.itemsize, bias=c.bias),
        *cast(c.R * c.N, c),
    ]
    low_rank, flops = {"u": thin, "v": c.R * c.N * c.itemsize}, 2.0 * c.M * c.N * c.R
    if c.masked == "output":
        factor = {"mask": out}
        kernels += _expanded_mask(c.M, c.N, c.itemsize)
    elif c.backward or not is_half:
        return [*kernels, torch_kernel("addmm_", {"o": out} | low_rank, {"o": out}, flops)]
    else:
        factor = {"scale": 4}
    kernels.append(torch_kernel("mm", low_rank, {"branch": out}, flops))
    return [*kernels, torch_kernel("addcmul_", {"o": out, "branch": out} | factor, {"o": out})]


def _rank_gradients(device: Device, strategy: str, back: Product) -> list[Kernel]:
    """Both gradients of the adapter, each with a pass over dY or x of its own."""
    ahead = replace(back, L=back.N, N=back.L, masked="operand" if back.masked else None)
    if strategy != "torch":
        return rank_grad(device, ahead, scaled=False) + rank_grad(device, back, scaled=True)
    kernels = []
    if back.masked:  # the expanded mask is shared with dx, which counts it
        x = back.M * back.N * back.itemsize
        kernels.append(torch_kernel("mul_", {"mask": x, "p": x}, {"p": x}))
    is_widened = back.adapter_itemsize > back.itemsize
    for columns, scaled in ((back.N, {}), (back.L, {"scale": 4})):
        reads = {"p": back.M * columns * back.itemsize, "u": back.M * back.R * back.itemsize}
        # dB is scaled in float32, and so is dA by 1/(1-p), unless that is the product's ``alpha``.
        is_wide = scaled or is_widened
        result = {"o": back.R * columns * (4 if is_wide else back.adapter_itemsize)}
        kernels.append(torch_kernel("mm", reads, result, 2.0 * back.M * columns * back.R))
        if scaled or (back.masked and is_widened):
            kernels.append(torch_kernel("mul_", result | scaled, result))
        if is_wide and back.adapter_itemsize < 4:
            kernels.append(torch_kernel("cast", result, {"o": back.R * columns * 2}))
    return kernels


def back(c: Product) -> Product:
    """The product of backward, ``dY W``, for that of forward."""
    masked = "output" if c.masked else None
    return replace(c, L=c.N, N=c.L, masked=masked, bias=False, backward=True)


def layer(device: Device, c: Product, forward: str, backward: str) -> list[Kernel]:
    """The forward of ``c`` with one strategy, and all three gradients with another."""
    return direction(device, forward, c) + direction(device, backward, back(c))


def _expanded_mask(M: int, columns: int, itemsize: int) -> list[Kernel]:
    """Keep bits unpacked to zeros and ones: each byte selects a row of a table with 256 rows."""
    table = [torch_kernel(name, {}, {"table": 2048 * itemsize}) for name in _TABLE_OPERATORS]
    packed = 4 * M * cdiv(columns, 128) * 4
    return [
        *table,
        torch_kernel("int", {"keep_bits": packed}, {"bytes": 4 * packed}),
        torch_kernel("embedding", {"bytes": 4 * packed}, {"mask": M * columns * itemsize}),
    ]
