"""What a call is expected to cost on a GPU that nothing was measured on. Modelled, not measured.

    time  =  Σ over kernels of  launch + max(DRAM bytes / bandwidth, operations / rate)

Bytes and operations: :mod:`.traffic`; rates, of half-precision products: :mod:`.devices`.
"""

from __future__ import annotations

from .devices import Device
from .kernels import configs
from .traffic import Kernel, Product, product

# What cuBLAS reaches of the peak in large products: 716 of 989 TFLOPS on H100 (P. Shankhdhar,
# "Outperforming cuBLAS on H100", 2024), 1610 of 2250 on B200 (pyptx.dev/performance, 2025).
SUSTAINED = 0.72
# Of kernels queued back to back: 3.8 µs a launch for kernels of 2.9 µs on a V100 (NVIDIA, "Getting
# started with CUDA graphs", 2019).
LAUNCH_SECONDS = 0.9e-6
VALID_CACHES = 1.5  # an operand smaller than so many caches is partly read from there
SINGLE_PASS_COLUMNS = 64  # of one program
MIN_GAIN = 0.05  # predicted gains below it are noise: the vendor's GEMM is taken


def seconds(kernels: list[Kernel], device: Device) -> float:
    """Expected time of ``kernels`` one after another, launches included."""
    return sum(LAUNCH_SECONDS + _busy(kernel, device) for kernel in kernels)


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
    masked_operand: bool,
    aligned: bool,
) -> tuple[str, str]:
    """The strategy of one direction, ``(M,L) @ (L,N)``, and the reason for it.

    Args:
        device: as of :func:`.devices.device_of`.
        itemsize: bytes of an element.
        masked_operand: the contraction's operand is dropped, as in forward with dropout.
        aligned: every row of the operands starts on 16 bytes.
    """
    arch = device.target.arch
    few_rows = (
        M <= configs.SINGLE_PASS_MAX_ROWS
        and rank <= configs.SINGLE_PASS_MAX_RANK
        and not masked_operand
    )
    if arch == "interpreter":
        return ("single_pass" if few_rows else "split"), "the interpreter runs Triton's own GEMM"
    if itemsize == 4:
        return "addmm", "float32 products are faster in the vendor's GEMM"
    if not aligned:
        return "addmm", "rows that do not start on 16 bytes are slow in Triton's GEMM"
    if not device.has_gemm_ratio:
        return "addmm", f"no measurement or published ratio of Triton's GEMM on {arch}"
    single = few_rows and device.target.sms / 2 <= configs.cdiv(N, SINGLE_PASS_COLUMNS)
    strategy = "single_pass" if single else "split"
    if not single and not is_valid(device, M * N * itemsize):
        return "addmm", "the output is partly in the cache still, where an added pass is cheap"
    case = Product(M, L, N, rank, itemsize, masked="operand" if masked_operand else None)
    vendor = seconds(product(device, "addmm", case), device)
    gain = vendor / seconds(product(device, strategy, case), device) - 1.0
    if gain >= MIN_GAIN:
        return strategy, f"modelled gain of {gain:.0%} over the vendor's GEMM and an added pass"
    return "addmm", f"modelled gain of {gain:.0%} of {strategy} is under {MIN_GAIN:.0%}"
