"""What a call is expected to cost on a GPU that nothing was measured on. Modelled, not measured.

    device  =  Σ over kernels of  launch + max(DRAM bytes / bandwidth, operations / rate)
    host    =  Σ over kernels of  the time to queue one
    call    =  max(device, host); replayed from a CUDA graph, the device's alone

Bytes and operations: :mod:`.traffic`; rates, of half-precision products: :mod:`.devices`.
"""

from __future__ import annotations

from ..kernels.config import SINGLE_PASS_MAX_RANK, SINGLE_PASS_MAX_ROWS, cdiv
from .devices import Device
from .traffic import Kernel, Product, product, rank_gradients

# What cuBLAS reaches of the peak in large products: 716 of 989 TFLOPS on H100 (P. Shankhdhar,
# "Outperforming cuBLAS on H100", 2024), 1610 of 2250 on B200 (pyptx.dev/performance, 2025).
SUSTAINED = 0.72
# Of kernels queued back to back: 3.8 µs a launch for kernels of 2.9 µs on a V100 (NVIDIA, "Getting
# started with CUDA graphs", 2019).
LAUNCH_SECONDS = 0.9e-6
# Host time to queue one kernel. A PyTorch operator: the least of the published 5 to 25 µs (Lin
# Jiahuang, "From PyTorch op to kernel launch"). A Triton launch: 2.6 to 4.8 µs repeated and 8 to 28
# plain, measured without a driver (benchmarks/launch_overhead.py), and a driver's call.
TORCH_HOST_SECONDS = 5e-6
TRITON_HOST_SECONDS = 5e-6
PLAIN_TRITON_HOST_SECONDS = 20e-6
VALID_CACHES = 1.5  # an operand smaller than so many caches is partly read from there
SINGLE_PASS_COLUMNS = 64  # of one program
MIN_GAIN = 0.05  # predicted gains below it are noise: "addmm" is chosen


def seconds(kernels: list[Kernel], device: Device) -> float:
    """Expected time of the device for ``kernels`` one after another, launches included."""
    return sum(LAUNCH_SECONDS + _busy(kernel, device) for kernel in kernels)


def host_seconds(kernels: list[Kernel], *, repeated: bool = True) -> float:
    """Expected time of the host to queue ``kernels``.

    Args:
        repeated: whether Triton's launches are repeated, see ``kernels/launch.py``.
    """
    triton = TRITON_HOST_SECONDS if repeated else PLAIN_TRITON_HOST_SECONDS
    return sum(TORCH_HOST_SECONDS if kernel.is_torch else triton for kernel in kernels)


def _busy(kernel: Kernel, device: Device) -> float:
    return max(
        (kernel.thin_bytes + kernel.gemm_bytes) / device.bandwidth,
        kernel.flops / (device.flops * SUSTAINED * kernel.speed),
        kernel.integers / device.integer_rate,
    )


def is_valid(device: Device, operand_bytes: int) -> bool:
    """Whether the model holds: smaller operands are still in the cache when they are read again."""
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
    with_torch: bool = True,
    repeated: bool = True,
) -> tuple[str, str]:
    """The strategy of one direction, ``(M,L) @ (L,N)``, and the reason for it.

    Args:
        device: as of :func:`.devices.device_of`.
        itemsize: bytes of an element.
        masked: what is dropped: "operand" (of the contraction, in forward), "output" (the low-rank
            product, in backward) or None.
        aligned: every row of the operands starts on 16 bytes.
        gradients: whether those of A and B are computed too, as in backward.
        with_torch: whether PyTorch's operators alone are a candidate.
        repeated: whether Triton's launches are repeated, see ``kernels/launch.py``.
    """
    arch = device.target.arch
    few_rows = M <= SINGLE_PASS_MAX_ROWS and rank <= SINGLE_PASS_MAX_RANK and masked != "operand"
    if arch == "interpreter":
        return ("single_pass" if few_rows else "split"), "the interpreter runs Triton's own GEMM"
    single = few_rows and device.target.sms / 2 <= cdiv(N, SINGLE_PASS_COLUMNS)
    candidates, reason = ["torch"] if with_torch else [], None
    if itemsize == 4:
        reason = "float32 products are faster in the vendor's GEMM"
    elif not aligned:
        reason = "rows that do not start on 16 bytes are slow in Triton's GEMM"
    elif not device.has_gemm_ratio:
        reason = f"no measurement or published ratio of Triton's GEMM on {arch}"
    elif not single and not is_valid(device, M * N * itemsize):
        reason = "the output is partly in the cache still, where an added pass is cheap"
    else:
        candidates.insert(0, "single_pass" if single else "split")
    case = Product(M, L, N, rank, itemsize, masked=masked)

    def expected(strategy: str) -> float:
        kernels = product(device, strategy, case)
        if gradients:
            kernels += rank_gradients(device, strategy, case)
        return max(seconds(kernels, device), host_seconds(kernels, repeated=repeated))

    addmm = expected("addmm")
    gains = {name: addmm / expected(name) - 1.0 for name in candidates}
    best = max(gains, key=gains.get, default=None)
    if best is not None and gains[best] >= MIN_GAIN:
        return best, f"modelled gain of {gains[best]:.0%} over the vendor's GEMM and an added pass"
    if reason is None:
        name = candidates[0]
        reason = f"modelled gain of {gains[name]:.0%} of {name} is under {MIN_GAIN:.0%}"
    return "addmm", reason
