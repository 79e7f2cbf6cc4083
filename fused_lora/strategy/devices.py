"""The properties of a GPU that the cost model uses: a table of known GPUs, and queries for others.

Sources are given with each row. Peak rates are derived as in the vendors' architecture papers:
SMs (or CUs) · clock · operations of one SM per clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..kernels import select_config
from ..kernels.config import Target

# Dense half-precision operations per clock of one SM or CU, accumulating in fp32. NVIDIA's papers
# on A100, GA102, Ada, H100 and Blackwell (in families that differ, the GeForce rate, half that of
# professional GPUs); AMD's papers on CDNA 2, 3 and 4.
_OPS_PER_CLOCK = {
    "sm_80": 2048,
    "sm_86": 512,
    "sm_89": 512,
    "sm_90": 4096,
    "sm_100": 8192,
    "sm_120": 512,
    "gfx90a": 1024,
    "gfx942": 2048,
    "gfx950": 4096,
}
# Published speed of Triton's GEMM relative to the vendor's: A100 0.89 to 0.97, H100 0.86 to 0.97.
# Here is the middle of each range; A100's is used for sm_86 and sm_89 too. Nothing usable has been
# published for other architectures.
_GEMM_RATIO = {"sm_80": 0.93, "sm_86": 0.93, "sm_89": 0.93, "sm_90": 0.92}
# 32-bit integer results per clock of one SM (CUDA C++ programming guide) or one CU.
_INTEGER_LANES = 64

# For GPUs that do not report these. Low peaks and a high bandwidth make the pass that "addmm" adds
# look cheap, so errors in them favour the vendor's GEMM.
_DEFAULT_OPS_PER_CLOCK = 512
_DEFAULT_CLOCK = 1.4e9
_DEFAULT_BANDWIDTH = 8e12
_DEFAULT_CACHE = 126 << 20


@dataclass(frozen=True)
class Device:
    """A GPU as the cost model sees it.

    Attributes:
        name: the product's name, for display.
        target: architecture, SMs, shared memory.
        cache: bytes of the last cache before DRAM: L2, or AMD's Infinity Cache.
        bandwidth: of DRAM in bytes per second, from the data sheet.
        clock: in Hz, the clock on which the data sheet's tensor peak is based.
    """

    name: str
    target: Target
    cache: int
    bandwidth: float
    clock: float

    @property
    def flops(self) -> float:
        """Peak operations per second of dense half-precision products accumulated in fp32."""
        ops = _OPS_PER_CLOCK.get(self.target.arch, _DEFAULT_OPS_PER_CLOCK)
        return self.target.sms * self.clock * ops

    @property
    def integer_rate(self) -> float:
        """32-bit integer results per second."""
        return self.target.sms * self.clock * _INTEGER_LANES

    @property
    def has_gemm_ratio(self) -> bool:
        """Whether there is a published ratio for :attr:`gemm_ratio`."""
        return self.target.arch in _GEMM_RATIO

    @property
    def gemm_ratio(self) -> float:
        """Speed of Triton's GEMM relative to the vendor's; 1 if no ratio was published."""
        return _GEMM_RATIO.get(self.target.arch, 1.0)


def _gpu(name, arch, sms, cache_mib, bandwidth, clock) -> Device:
    shared = select_config.SHARED_BYTES.get(arch, select_config.DEFAULT_SHARED_BYTES)
    return Device(name, Target(arch, sms, shared), int(cache_mib * 2**20), bandwidth, clock)


KNOWN = {
    # NVIDIA A100 Tensor Core GPU data sheet, 2021: 312 TFLOPS
    "a100": _gpu("A100 SXM 80GB", "sm_80", 108, 40, 2.039e12, 1.41e9),
    "a100-40gb": _gpu("A100 SXM 40GB", "sm_80", 108, 40, 1.555e12, 1.41e9),
    "a100-pcie": _gpu("A100 PCIe 80GB", "sm_80", 108, 40, 1.935e12, 1.41e9),
    # NVIDIA Ampere GA102 architecture paper, 2020: 71 TFLOPS
    "rtx3090": _gpu("RTX 3090", "sm_86", 82, 6, 0.936e12, 1.695e9),
    # NVIDIA Ada architecture paper, 2022: 165.2 TFLOPS
    "rtx4090": _gpu("RTX 4090", "sm_89", 128, 72, 1.008e12, 2.52e9),
    # NVIDIA H100 data sheet and architecture paper, 2022-2023: 989, 756 and 835 TFLOPS
    "h100": _gpu("H100 SXM", "sm_90", 132, 50, 3.35e12, 1.83e9),
    "h100-pcie": _gpu("H100 PCIe", "sm_90", 114, 50, 2.0e12, 1.62e9),
    "h100-nvl": _gpu("H100 NVL", "sm_90", 132, 50, 3.9e12, 1.545e9),
    # NVIDIA H200 data sheet, 2023: 989 TFLOPS
    "h200": _gpu("H200 SXM", "sm_90", 132, 50, 4.8e12, 1.83e9),
    # NVIDIA HGX B200 data sheet, 2024: 2250 TFLOPS; size of the L2 as reported by torch
    "b200": _gpu("B200", "sm_100", 148, 126, 8.0e12, 1.85e9),
    # NVIDIA RTX Blackwell architecture paper, 2025: 209.5 TFLOPS
    "rtx5090": _gpu("RTX 5090", "sm_120", 170, 96, 1.792e12, 2.407e9),
    # AMD Instinct MI300X, MI325X and MI355X data sheets, 2023-2025: 1307, 1307 and 2516 TFLOPS;
    # the last cache before DRAM is 256 MB of Infinity Cache, behind 4 MB of L2 per die
    "mi300x": _gpu("MI300X", "gfx942", 304, 256, 5.3e12, 2.1e9),
    "mi325x": _gpu("MI325X", "gfx942", 304, 256, 6.0e12, 2.1e9),
    "mi355x": _gpu("MI355X", "gfx950", 256, 256, 8.0e12, 2.4e9),
}

# Full names from torch.cuda.get_device_name(): a laptop RTX 4090 or a slice of an A100 has another
# name, and is another GPU.
_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI325X": "mi325x",
    "AMD Instinct MI355X": "mi355x",
}
INTERPRETER = Device("Triton's interpreter", select_config.INTERPRETER, 0, 1.0, 1.0)


@lru_cache
def device_of(device: torch.device) -> Device:
    """The GPU of a CUDA or ROCm device; :data:`INTERPRETER` for a CPU."""
    if device.type == "cpu":
        return INTERPRETER
    return from_properties(
        torch.cuda.get_device_properties(device), select_config.target_of(device)
    )


def from_properties(properties, target: Target) -> Device:
    """The row of :data:`KNOWN` if torch's properties have a known name, else their own values.

    Args:
        properties: from :func:`torch.cuda.get_device_properties`. A driver may report 0 for any
            rate; a cautious default replaces it.
    """
    if properties.name in _NAMES:
        return replace(KNOWN[_NAMES[properties.name]], target=target)
    # The rate is in kHz with two transfers per clock, the bus width in bits.
    bandwidth = properties.memory_clock_rate * 1e3 * 2 * properties.memory_bus_width / 8
    return Device(
        properties.name,
        target,
        properties.L2_cache_size or _DEFAULT_CACHE,
        bandwidth or _DEFAULT_BANDWIDTH,
        properties.clock_rate * 1e3 or _DEFAULT_CLOCK,
    )
