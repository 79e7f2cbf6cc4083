"""What a strategy is expected to cost on a GPU that nothing was measured on.

Modelled, not measured: a GEMM at the published ratio of Triton's speed to the vendor's, against
the vendor's GEMM followed by one more read and write of its output.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernels.configs import SINGLE_PASS_MAX_RANK, SINGLE_PASS_MAX_ROWS

SINGLE_PASS_COLUMNS = 64  # of one program
MIN_FILL = 0.85  # the published ratios are of GEMMs that fill the GPU
MIN_GAIN = 0.05  # predicted gains below it are noise: the vendor's GEMM is taken


@dataclass(frozen=True)
class Rates:
    """Of one architecture, from the vendor's data sheets; the ratio from published benchmarks."""

    flops: float  # dense half precision, fp32 accumulation, per second
    bandwidth: float  # bytes per second
    gemm_ratio: float  # Triton's GEMM speed over the vendor's


RATES = {
    "sm_80": Rates(312e12, 2.0e12, 0.93),
    "sm_86": Rates(155e12, 0.77e12, 0.93),
    "sm_89": Rates(165e12, 1.0e12, 0.93),
    "sm_90": Rates(800e12, 3.35e12, 0.92),
}


def choose_strategy(
    arch: str,
    sms: int,
    itemsize: int,
    M: int,
    N: int,
    L: int,
    rank: int,
    *,
    masked_operand: bool,
    aligned: bool,
    fill: float,
) -> tuple[str, str]:
    """The strategy of one direction, ``(M,L) @ (L,N)``, and the reason for it.

    Args:
        arch: "sm_90", "gfx942", "interpreter".
        sms: multiprocessors of the GPU.
        itemsize: bytes of an element.
        masked_operand: the contraction's operand is dropped, as in forward with dropout.
        aligned: every row of the operands starts on 16 bytes.
        fill: share of the GPU that Triton's tiles keep busy.
    """
    few_rows = M <= SINGLE_PASS_MAX_ROWS and rank <= SINGLE_PASS_MAX_RANK and not masked_operand
    if arch == "interpreter":
        return ("single_pass" if few_rows else "split"), "the interpreter runs Triton's own GEMM"
    if itemsize == 4:
        return "addmm", "float32 products are faster in the vendor's GEMM"
    if not aligned:
        return "addmm", "rows that do not start on 16 bytes are slow in Triton's GEMM"
    rates = RATES.get(arch)
    if rates is None:
        return "addmm", f"no measurement or published ratio of Triton's GEMM on {arch}"
    if few_rows and sms / 2 <= -(-N // SINGLE_PASS_COLUMNS):
        return "single_pass", f"{M} rows: one launch, one read of the weight"
    if fill < MIN_FILL:
        return "addmm", f"Triton's tiles would keep {fill:.0%} of the GPU busy"
    gemm = 2.0 * M * N * L / rates.flops
    add = 2.0 * M * N * itemsize / rates.bandwidth
    gain = (gemm + add) / (gemm / rates.gemm_ratio) - 1.0
    if gain >= MIN_GAIN:
        return "split", f"modelled gain of {gain:.0%} over the vendor's GEMM and an added pass"
    return "addmm", f"modelled gain of {gain:.0%} of Triton's GEMM is under {MIN_GAIN:.0%}"
