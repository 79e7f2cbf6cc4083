"""The keep bits of the LoRA branch's dropout.

    bit j of keep_bits[m, w]  =  1 with probability keep_count / 2¹⁶, for column 32·w + j of row m

``ops/dropout.py`` documents the formula and computes the same bits in PyTorch. Each thread computes
the 64 columns of a 64-bit word from a sequence of random words. A bit depends only on the seed and
its position, never on the launch.
"""

import torch
import triton
import triton.language as tl

from .config import cdiv
from .launch import Arguments, launch


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keep_words(seed, rows, words, keep_count, first_digit, DIGITS: tl.constexpr):
    """The 64-bit words ``words`` of the mask's rows ``rows``, as (rows, words) int64.

    The digits of ``keep_count`` below ``first_digit`` are 0; from there on there are DIGITS.
    """
    seed = seed.to(tl.uint64, bitcast=True)
    place = (rows.to(tl.uint64)[:, None] << 32) + words.to(tl.uint64)[None, :]
    state = _mix(_mix(seed) ^ place)
    # Skip the digits below the lowest 1: an AND with zero bits leaves them zero.
    state += first_digit.to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = tl.zeros_like(state)
    # Unrolled: Triton pipelines innermost loops only, and this may be inside one.
    for step in tl.static_range(DIGITS):
        state += 0x9E3779B97F4A7C15
        random = _mix(state)
        # OR if the digit is 1, else AND: ``one`` is all ones or zero, so no branch is needed.
        digit = (keep_count >> (first_digit + step)) & 1
        one = (0 - digit.to(tl.int64)).to(tl.uint64, bitcast=True)
        bits = (bits & random) | ((bits | random) & one)
    return bits.to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["M", "keep_count", "first_digit"])
def _dropout_mask(
    keep_bits_ptr,
    seed_ptr,
    rows_ptr,
    keep_count,
    first_digit,
    M,
    width,
    stride_m,
    HAS_ROWS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    seed = tl.load(seed_ptr)
    rows = offs_m
    if HAS_ROWS:
        rows = tl.load(rows_ptr + offs_m, mask=offs_m < M, other=0)
    words = keep_words(seed, rows, offs_l, keep_count, first_digit, DIGITS)
    tl.store(
        keep_bits_ptr + offs_m.to(tl.int64)[:, None] * stride_m + offs_l[None, :],
        words,
        mask=(offs_m[:, None] < M) & (offs_l[None, :] < width),
    )


def first_digit(keep_count: int) -> int:
    """Index of the lowest digit that is 1."""
    return (keep_count & -keep_count).bit_length() - 1


def dropout_mask(
    keep_bits: torch.Tensor,
    seed: torch.Tensor,
    keep_count: int,
    digits: int,
    rows: torch.Tensor | None = None,
) -> None:
    """Compute the packed mask ``keep_bits`` from ``seed``.

    Args:
        keep_bits: int32 ``(M, words)``, each row a whole number of 64-bit words; written.
        seed: 0-d int64, read on the device.
        keep_count: the keep probability in units of ``2**-digits``; 0 < keep_count < 2**digits.
        digits: binary digits of the keep probability.
        rows: int64 ``(M,)``, contiguous: the row of the mask that each row has; None: its own.
    """
    tensors = keep_bits.view(torch.int64), seed, rows
    first = first_digit(keep_count)
    launch(_dropout_mask, _arguments, None, tensors, (keep_count, first), digits - first)


def _arguments(_, keep_bits, seed, rows, digits: int) -> Arguments:
    M, width = keep_bits.shape
    block_l = min(32, triton.next_power_of_2(max(1, width)))
    block_m = 1024 // block_l
    return Arguments(
        grid=(cdiv(M, block_m), cdiv(width, block_l)),
        operands=(keep_bits, seed, rows),
        numbers=(M, width, keep_bits.stride(0)),
        constants={
            "HAS_ROWS": rows is not None,
            "DIGITS": digits,
            "BLOCK_M": block_m,
            "BLOCK_L": block_l,
        },
        options={"num_warps": 4},
    )
