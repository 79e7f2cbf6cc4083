"""One compiled kernel as a row of the report, with its faults."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

from . import limits, machine_code, pipeline
from .driver import Binary

TENSOR_ROWS = 64  # fewest rows of a product by a warp group or in tensor memory


@dataclass(frozen=True)
class Expected:
    """What a case's compiled kernel must have.

    Attributes:
        matrix: "widest" for its architecture's widest matrix instructions; "any" where reading an
            operand bounds the kernel; "none" for fp32 "ieee" products, a mask or a sum.
        pipelined: whether the main loop must be pipelined. Not with 2-byte loads: an asynchronous
            copy moves 4, 8 or 16 bytes.
        shared: the shared memory that the config's validity check assumed, at most; or None.
    """

    matrix: str = "widest"
    pipelined: bool = True
    shared: int | None = None


@dataclass
class Row:
    """What was read from one compiled kernel.

    Attributes:
        registers: 32-bit registers per thread.
        spill: bytes of local memory per thread.
        shared: bytes of shared memory per block, out of ``shared_limit``.
        tensor_columns: columns of tensor memory, out of 512.
        occupancy: resident warps over their maximum.
        matrix: number of matrix instructions by kind.
        copies: number of asynchronous copies by kind.
        instructions: number of instructions of the whole kernel.
        share: share of the main loop's issue slots that its products take, :func:`product_share`.
        pipelined: None if there is no main loop.
        faults: the reasons why the config must not be shipped.
    """

    registers: int = 0
    spill: int = 0
    shared: int = 0
    shared_limit: int = 0
    tensor_columns: int = 0
    occupancy: float = 0.0
    matrix: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    share: float = 0.0
    pipelined: bool | None = None
    faults: list[str] = field(default_factory=list)

    as_dict = asdict


def inspect(binary: Binary, expected: Expected) -> Row:
    """Read a compiled kernel and list its faults."""
    code, ttgir = machine_code.read(binary), binary.text("ttgir")
    shared, warps = binary.metadata["shared"], binary.metadata["num_warps"]
    loop = code.main_loop()
    main = pipeline.main_loops(ttgir)
    product = pipeline.largest_product(ttgir)
    columns = binary.metadata.get("tmem_size") or 0
    row = Row(
        registers=code.registers,
        spill=code.spill,
        shared=shared,
        shared_limit=limits.target(binary.arch).shared_bytes,
        tensor_columns=columns,
        occupancy=limits.occupancy(binary.arch, code.registers, shared, warps, columns),
        matrix=dict(code.count(machine_code.MATRIX)),
        copies=dict(code.count(machine_code.ASYNC)),
        instructions=len(code.instructions),
        share=product_share(binary.arch, loop, product, warps) if main else 0.0,
        pipelined=not any(pipeline.faults(each) for each in main) if main else None,
    )
    if row.spill:
        row.faults.append(f"spills {row.spill} bytes")
    if row.shared > row.shared_limit:
        row.faults.append(f"{row.shared} bytes of shared memory, of {row.shared_limit}")
    if row.tensor_columns > limits.TENSOR_COLUMNS:
        row.faults.append(f"{row.tensor_columns} columns of tensor memory, of 512")
    if row.occupancy == 0:
        row.faults.append("no block fits a multiprocessor")
    if code.traps_only:
        row.faults.append("a body of traps")
    if expected.shared is not None and row.shared > expected.shared:
        row.faults.append(f"{row.shared} bytes of shared memory, counted on {expected.shared}")
    if expected.matrix == "widest":
        due = due_instruction(binary.arch, product[0])
        if not any(kind.startswith(due) for kind in row.matrix):
            row.faults.append(f"no {due}")
    elif expected.matrix == "any" and not row.matrix:
        row.faults.append("no matrix instructions")
    if expected.pipelined and not main:
        row.faults.append("no main loop")
    if expected.pipelined:
        row.faults += sorted({fault for each in main for fault in pipeline.faults(each)})
        # Where reading an operand bounds the kernel, its few products may wait for each other.
        if expected.matrix == "widest" and machine_code.are_serial(loop):
            row.faults.append("waits for every matrix instruction")
    return row


def due_instruction(arch: str, rows: int) -> str:
    """The matrix instruction that a product of ``rows`` must use on ``arch``."""
    if not limits.is_nvidia(arch):
        return "v_mfma"
    wide = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    return wide.get(arch, "HMMA") if rows >= TENSOR_ROWS else "HMMA"


def product_share(
    arch: str, loop: list[machine_code.Instruction], product: tuple[int, int, int], warps: int
) -> float:
    """The share of a loop's issue slots during which the tensor cores are busy.

    A warp issues one instruction per clock. A matrix instruction takes the clocks that its products
    need at the data sheet's rate on a quarter of the multiprocessor. In a loop without matrix
    instructions, fused multiply-adds count instead, one clock each. The figure ranks candidates; it
    does not predict speed.
    """
    rate = limits.LIMITS[arch].products / 4
    busy = sum(_products(i.name, product, warps) / rate for i in loop)
    others = [i for i in loop if not machine_code.MATRIX.match(i.name)]
    if busy == 0:
        fused = sum(i.name.startswith(("FFMA", "v_fma", "v_pk_fma", "v_mac")) for i in others)
        return fused / max(1, len(others))
    return busy / (busy + len(others))


def _products(name: str, product: tuple[int, int, int], warps: int) -> float:
    """Multiply-adds of one matrix instruction, per warp."""
    if name.startswith("UTC"):  # the name does not contain the shape; the inner size is 16
        return product[0] * product[1] * 16 / warps
    if match := re.match(r"HMMA\.(\d{2})(\d)(\d+)", name):
        return float(match[1]) * float(match[2]) * float(match[3])
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return float(match[1]) * float(match[2]) * float(match[3]) / 4  # shared by four warps
    if match := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        return float(match[1]) * float(match[2]) * float(match[3])
    return 0.0
