"""Resources of one multiprocessor, and how many warps of a kernel fit on it.

NVIDIA: CUDA C++ programming guide, "Technical specifications per compute capability"; the
allocation granularities are those of the CUDA occupancy calculator. AMD: the ISA guides of CDNA 2,
3 and 4; a compute unit has four SIMDs with 512 vector registers per lane.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_lora.kernels import select_config
from fused_lora.kernels.config import Target, cdiv

REGISTERS = 65_536  # of 32 bits, per NVIDIA multiprocessor
REGISTERS_PER_WARP = 256  # granularity of their allocation to a warp
RESERVED_SHARED = 1024  # bytes of shared memory that the driver reserves per block
AMD_SIMDS, AMD_REGISTERS, AMD_REGISTER_STEP = 4, 512, 8
TENSOR_COLUMNS = 512  # of tensor memory, sm_100


@dataclass(frozen=True)
class Limits:
    """Limits of one multiprocessor or compute unit."""

    sms: int  # of the GPU that represents the architecture
    warps: int
    blocks: int
    shared: int  # bytes, for all its blocks together
    products: int  # half-precision multiply-adds per clock with fp32 sums, dense (data sheets)


LIMITS = {
    "sm_80": Limits(108, 64, 32, 167_936, 1024),  # A100
    "sm_86": Limits(84, 48, 16, 102_400, 512),  # A40
    "sm_89": Limits(142, 48, 24, 102_400, 512),  # L40S
    "sm_90": Limits(132, 64, 32, 233_472, 2048),  # H100
    "sm_100": Limits(148, 64, 32, 233_472, 4096),  # B200
    "sm_120": Limits(188, 48, 24, 102_400, 512),  # RTX PRO 6000
    "gfx90a": Limits(104, 32, 32, 65_536, 512),  # one die of an MI250
    "gfx942": Limits(304, 32, 32, 65_536, 1024),  # MI300X
    "gfx950": Limits(256, 32, 32, 163_840, 2048),  # MI355X
}


def is_nvidia(arch: str) -> bool:
    """Whether ``arch`` is a CUDA compute capability, such as "sm_90"."""
    return arch.startswith("sm_")


def target(arch: str) -> Target:
    """The GPU that represents ``arch`` in the report."""
    shared = select_config.SHARED_BYTES.get(arch, select_config.DEFAULT_SHARED_BYTES)
    return Target(arch, LIMITS[arch].sms, shared)


def occupancy(arch: str, registers: int, shared: int, warps: int, columns: int = 0) -> float:
    """Occupancy: resident warps over their maximum, by the resources that a block uses.

    Args:
        registers: 32-bit registers per thread; on AMD, vector and accumulator registers together.
        shared: bytes of shared memory per block.
        warps: per block.
        columns: of tensor memory, per block.
    """
    limits = LIMITS[arch]
    if is_nvidia(arch):
        per_warp = cdiv(32 * registers, REGISTERS_PER_WARP) * REGISTERS_PER_WARP
        by_registers = REGISTERS // per_warp // 4 * 4 // warps  # each quarter holds whole warps
        by_shared = limits.shared // (shared + RESERVED_SHARED)
    else:
        rounded = cdiv(max(1, registers), AMD_REGISTER_STEP) * AMD_REGISTER_STEP
        by_registers = AMD_SIMDS * min(limits.warps // AMD_SIMDS, AMD_REGISTERS // rounded) // warps
        by_shared = limits.shared // max(1, shared)
    by_columns = TENSOR_COLUMNS // columns if columns else limits.blocks
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared, by_columns)
    return blocks * warps / limits.warps
