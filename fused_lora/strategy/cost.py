"""The expected time of a call on a GPU without measurements. Modelled, not measured.

    device  =  Σ over kernels of  launch + max(DRAM bytes / bandwidth, operations / rate)
    host    =  Σ over kernels of  the time to queue one
    call    =  max(device, host); in a CUDA graph's replay, the device's time only

The kernels are from :mod:`.schedule`, their bytes and operations from :mod:`.traffic`, and the
rates, of half-precision products, from :mod:`.devices`. Memory traffic, products and integer
arithmetic of a kernel overlap, so the slowest of them counts. This includes the vendor's GEMM that
accumulates onto what it reads ("seeded"), an assumption.
"""

from __future__ import annotations

from collections.abc import Collection

from ..kernels.config import cdiv, single_pass_applies
from .devices import Device
from .schedule import direction
from .traffic import Kernel, Product
from .tuning_cache import STRATEGIES

# Share of the peak that cuBLAS reaches in large products: 716 of 989 TFLOPS on H100 (P. Shankhdhar,
# "Outperforming cuBLAS on H100", 2024), 1610 of 2250 on B200 (pyptx.dev/performance, 2025).
SUSTAINED = 0.72
# The gap between kernels queued back to back: 3.8 µs per launch of a kernel of 2.9 µs on a V100
# (NVIDIA, "Getting started with CUDA graphs", 2019).
LAUNCH_SECONDS = 0.9e-6
# Host time to queue one kernel. A PyTorch operator: the lowest of the published 5 to 25 µs (Lin
# Jiahuang, "From PyTorch op to kernel launch"). A Triton launch: 3.4 to 6.0 µs if repeated and 13
# to 36 if plain, measured without a driver (benchmarks/launch_overhead.py), plus the driver's call.
TORCH_HOST_SECONDS = 5e-6
TRITON_HOST_SECONDS = 5e-6
PLAIN_TRITON_HOST_SECONDS = 20e-6
VALID_CACHES = 1.5  # an operand smaller than this many times the cache is partly read from it
SINGLE_PASS_COLUMNS = 64  # columns of one program
MIN_GAIN = 0.05  # smaller predicted gains over the vendor's GEMM are noise


def seconds(kernels: list[Kernel], device: Device) -> float:
    """Expected device time of ``kernels`` run one after another, launches included."""
    return sum(LAUNCH_SECONDS + _busy(kernel, device) for kernel in kernels)


def host_seconds(kernels: list[Kernel], *, repeated: bool = True) -> float:
    """Expected host time to queue ``kernels``.

    Args:
        repeated: whether Triton launches are repeated, see ``kernels/launch.py``.
    """
    triton = TRITON_HOST_SECONDS if repeated else PLAIN_TRITON_HOST_SECONDS
    return sum(TORCH_HOST_SECONDS if kernel.is_torch else triton for kernel in kernels)


def _busy(kernel: Kernel, device: Device) -> float:
    """Expected time of one kernel: its slowest resource, since they work at the same time."""
    return max(
        (kernel.thin_bytes + kernel.gemm_bytes) / device.bandwidth,
        kernel.flops / (device.flops * SUSTAINED * kernel.speed),
        kernel.integers / device.integer_rate,
    )


def is_valid(device: Device, operand_bytes: int) -> bool:
    """Whether the model holds: smaller operands are still cached when they are read again."""
    return operand_bytes >= VALID_CACHES * device.cache


def choose_strategy(
    device: Device,
    itemsize: int,
    M: int,
    N: int,
    L: int,
    rank: int,
    *,
    masked: str | None,
    aligned: bool,
    gradients: bool = False,
    strategies: Collection[str] = STRATEGIES,
    repeated: bool = True,
    segments: int = 0,
    weights: int = 1,
) -> tuple[str, str]:
    """``(strategy, reason)`` for one direction, a product ``(M,L) @ (L,N)``.

    Args:
        device: from :func:`.devices.device_of`.
        itemsize: bytes per element.
        masked: what dropout applies to: "operand" (of the contraction, in forward), "output" (the
            low-rank product, in backward) or None.
        aligned: whether every row of the operands starts on a 16-byte boundary.
        gradients: whether the gradients of A and B are computed too, as in backward.
        strategies: those that can run the call; "torch" is PyTorch's operators only.
        repeated: whether Triton launches are repeated, see ``kernels/launch.py``.
        segments, weights: into which the rows are sorted, see :class:`.traffic.Product`; then
            "split" and "addmm" can run the call.
    """
    arch = device.target.arch
    few_rows = not segments and single_pass_applies(M, rank, masked)
    if arch == "interpreter":
        return ("single_pass" if few_rows else "split"), "the interpreter runs Triton's own GEMM"
    # With few rows the columns provide the parallelism: half of the SMs at least need a program.
    single = few_rows and device.target.sms / 2 <= cdiv(N, SINGLE_PASS_COLUMNS)
    candidates, reason = ["torch"] if "torch" in strategies else [], None
    if itemsize == 4:
        reason = "float32 products are faster in the vendor's GEMM"
    elif not aligned:
        reason = "rows that do not start on a 16-byte boundary are slow in Triton's GEMM"
    elif not device.has_gemm_ratio:
        reason = f"no published speed of Triton's GEMM relative to the vendor's on {arch}"
    elif not single and not is_valid(device, M * N * itemsize):
        reason = "the output is still partly in the cache, so an added pass is cheap"
    else:
        candidates.insert(0, "single_pass" if single else "split")
    case = Product(
        M, L, N, rank, itemsize, masked=masked, backward=gradients,
        segments=segments, weights=weights,
    )  # fmt: skip

    def expected(strategy: str) -> float:
        kernels = direction(device, strategy, case)
        return max(seconds(kernels, device), host_seconds(kernels, repeated=repeated))

    # Both run the vendor's GEMM and the same thin kernels; only the order of the sum differs.
    vendors = {name: expected(name) for name in ("addmm", "seeded") if name in strategies}
    default = min(vendors, key=vendors.get)
    gains = {name: vendors[default] / expected(name) - 1.0 for name in candidates}
    best = max(gains, key=gains.get, default=None)
    if best is not None and gains[best] >= MIN_GAIN:
        return best, f"modelled gain of {gains[best]:.0%} over the vendor's GEMM ({default})"
    if reason is None:
        name = candidates[0]
        reason = f"modelled gain of {gains[name]:.0%} with {name} is under {MIN_GAIN:.0%}"
    return default, reason
