"""Dropout of the LoRA branch. These terms are used throughout the package:

    p           probability that an entry of x is dropped
    keep_count  int, 1 … 2¹⁶: the keep probability in units of 2⁻¹⁶
    inv_keep    float: 2¹⁶ / keep_count, the factor of kept entries
    seed        0-d int64 from PyTorch's generator: determines the mask
    keep_bits   int32 (M, words), the packed mask: bit j of word w keeps column 32·w + j
    mask        (M, K) of zeros and ones in a floating dtype: keep_bits unpacked

``keep_bits`` is a pure function of the seed, and this module and ``kernels/dropout.py`` compute the
same bits. So every implementation drops the same entries, and a recomputed forward has the same
mask. The 64 columns of a 64-bit word share one random word per digit of keep_count. The bits start
as zeros; the digits are applied from the lowest on:

    h[m, l]  =  mix(mix(seed) xor (m·2³² + l))                   for the 64 columns 64·l …
    r[i]     =  mix(h + (i+1)·γ),  i = 0 … 15                    SplitMix64 seeded with h
    bits     =  r[i] | bits  if digit i of keep_count is 1,  else  r[i] & bits

Each bit is 1 with probability keep_count/2¹⁶. SplitMix64: Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014, with the constants of Stafford's variant 13.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from ..kernels.config import DIGITS
from .constants import constant
from .modes import is_observed

try:
    import numpy
except Exception:  # missing; or damaged, and then it can raise anything
    numpy = None

KEEP_ALL = 1 << DIGITS  # the keep probability is a multiple of 2⁻¹⁶

_COLUMNS = 64  # columns per random word
_PITCH = 2  # rows are padded to a multiple of this many 64-bit words: 16-byte vectors
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_ROUNDS = ((30, _MIX_1), (27, _MIX_2), (31, None))  # of SplitMix64's finaliser
_64_BITS = (1 << 64) - 1
# Random words per block: temporaries stay in the cache, and each thread has enough work.
_CPU_WORDS_PER_THREAD = 1 << 15
_NUMPY_WORDS = 1 << 16
_DEVICE_WORDS = 1 << 22
_FEW_WORDS = 1 << 16  # up to here more threads do not help


def keep_count(p: float) -> int:
    """The keep probability ``1 - p`` in units of 2⁻¹⁶, at least one."""
    return max(1, round((1.0 - p) * KEEP_ALL))


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from the default generator of ``device``: checkpointing restores it."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def empty_keep_bits(rows: int, columns: int, device: torch.device) -> Tensor:
    """An uninitialised mask ``int32 (rows, words)`` for ``columns`` columns."""
    return _empty_words(rows, columns, device).view(torch.int32)


def _empty_words(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty((rows, _row_words(columns)), dtype=torch.int64, device=device)


def _row_words(columns: int) -> int:
    return -(-columns // (_COLUMNS * _PITCH)) * _PITCH


def make_keep_bits(seed: Tensor, rows: int, columns: int, keep_count: int) -> Tensor:
    """Keep bits ``int32 (rows, words)``, each set with probability keep_count/2¹⁶."""
    # One operator for compilers, which cannot handle dtype views or 64-bit constants, and for
    # vmap, which has no rule for these views.
    is_opaque = torch.compiler.is_compiling() or _are_functorch_transforms_active()
    make = _make_keep_bits_op if is_opaque else _make_keep_bits
    return make(seed, rows, columns, keep_count)


def first_digit(keep_count: int) -> int:
    """Index of the lowest digit that is 1; the steps below it only AND with zero bits."""
    return (keep_count & -keep_count).bit_length() - 1


def _make_keep_bits(seed: Tensor, rows: int, columns: int, keep_count: int) -> Tensor:
    """As :func:`make_keep_bits`; seeds ``(...)`` of vmap give keep bits ``(..., rows, words)``."""
    device = seed.device
    lowest = first_digit(keep_count)
    random_words = rows * -(-columns // _COLUMNS) * (DIGITS - lowest)
    if seed.dim() == 0 and _is_for_numpy(seed, random_words):
        return _make_keep_bits_by_numpy(seed, rows, columns, keep_count)
    total = seed.numel() * rows
    words = _empty_words(total, columns, device)
    width = words.shape[1]
    steps = torch.arange(lowest + 1, DIGITS + 1, device=device).mul_(_GAMMA)
    at_once = (
        _CPU_WORDS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _DEVICE_WORDS
    )
    block = max(1, at_once // max(1, width * steps.numel()))
    word = torch.arange(width, device=device)
    key = _mix(seed.clone())
    for first in range(0, total, block):
        row = torch.arange(first, min(first + block, total), device=device)
        row_key = key
        if seed.dim():
            row, row_key = row % rows, key.flatten()[row // rows].unsqueeze(1)
        h = _mix((row[:, None] * (1 << 32) + word).bitwise_xor_(row_key))
        random = _mix(h + steps[:, None, None])
        bits = words[first : first + block].copy_(random[0])
        for digit, more in enumerate(random[1:], start=lowest + 1):
            if keep_count >> digit & 1:
                bits.bitwise_or_(more)
            else:
                bits.bitwise_and_(more)
    return words.view(torch.int32).view(*seed.shape, rows, 2 * width)


def keep_mask(keep_bits: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask as a new ``(M, columns)`` of zeros and ones in ``dtype``."""
    if _is_for_numpy(keep_bits, keep_bits.numel() // 2 * DIGITS):  # two int32 per random word
        return _keep_mask_by_numpy(keep_bits, columns, dtype)
    if _are_functorch_transforms_active():  # vmap has no rule for a dtype view
        places = torch.arange(32, dtype=torch.int32, device=keep_bits.device)
        bits = keep_bits.unsqueeze(-1).bitwise_right_shift(places).bitwise_and(1)
        return bits.flatten(1)[:, :columns].to(dtype)
    packed = keep_bits.view(torch.uint8).int()
    # Not cached on a GPU, where it may lie in the memory pool of one of inductor's CUDA graphs.
    args = dtype, keep_bits.device
    table = constant(_byte_table, *args) if keep_bits.is_cpu else _byte_table(*args)
    # Look up eight values per byte: 0.3 ns per element, half the time of shifts and comparisons.
    return F.embedding(packed, table).flatten(1)[:, :columns]


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place; shifts of int64 are arithmetic, hence the masks."""
    t = torch.empty_like(z)
    for shift, factor in _ROUNDS:
        torch.bitwise_right_shift(z, shift, out=t)
        z.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


def _is_for_numpy(tensor: Tensor, random_words: int) -> bool:
    """Whether NumPy computes or unpacks a mask of ``random_words``; ``tensor`` is the input.

    NumPy has logical shifts and a third of the overhead per operator: a mask of one row takes 20 µs
    instead of 90. Its one thread is as fast as three of PyTorch's. Compilers and dispatch modes
    cannot intercept NumPy, so with them PyTorch's operators are used.
    """
    return (
        tensor.is_cpu
        and type(tensor) is Tensor
        and not is_observed()
        and _has_numpy()
        and (random_words <= _FEW_WORDS or torch.get_num_threads() <= 2)
    )


@lru_cache
def _has_numpy() -> bool:
    """Whether NumPy is installed and this PyTorch can use it."""
    try:
        torch.empty(0, device="cpu").numpy()
    except Exception:  # NumPy's version does not tell whether PyTorch can use it
        return False
    return numpy is not None


def _make_keep_bits_by_numpy(seed: Tensor, rows: int, columns: int, keep_count: int) -> Tensor:
    # Writing results in place and caching the constants halve the time of one row.
    width = _row_words(columns)
    words = numpy.empty((rows, width), numpy.uint64)
    lowest = first_digit(keep_count)
    steps = _numpy_steps(lowest)
    key = _mix_int(seed.item())
    block = max(1, _NUMPY_WORDS // max(1, width * len(steps)))
    for first in range(0, rows, block):
        counters = _numpy_counters(min(block, rows - first), width)
        if first:
            counters = counters + numpy.uint64(first << 32 & _64_BITS)
        h = _mix_numpy(numpy.bitwise_xor(counters, numpy.uint64(key)))
        bits, *rest = _mix_numpy(numpy.add(h, steps))
        for digit, more in enumerate(rest, start=lowest + 1):
            fold = numpy.bitwise_or if keep_count >> digit & 1 else numpy.bitwise_and
            fold(bits, more, bits)
        words[first : first + block] = bits
    return torch.from_numpy(words.view(numpy.int32))


def _keep_mask_by_numpy(keep_bits: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    packed = keep_bits.numpy().view(numpy.uint8)
    bits = numpy.unpackbits(packed, axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits).to(dtype)


@lru_cache(maxsize=16)
def _numpy_counters(rows: int, width: int):
    """``m·2³² + l``, uint64 ``(rows, width)``."""
    row, word = (numpy.arange(n, dtype=numpy.uint64) for n in (rows, width))
    return (row[:, None] << numpy.uint64(32)) + word


@lru_cache(maxsize=DIGITS)
def _numpy_steps(lowest: int):
    """``(i+1)·γ`` of the digits from ``lowest`` on, uint64 ``(digits, 1, 1)``."""
    digits = numpy.arange(lowest + 1, DIGITS + 1, dtype=numpy.uint64)
    return (digits * numpy.uint64(_GAMMA & _64_BITS))[:, None, None]


@lru_cache
def _numpy_rounds():
    """:data:`_ROUNDS` as 0-d arrays of uint64."""
    array = partial(numpy.array, dtype=numpy.uint64)
    return [(array(n), None if f is None else array(f & _64_BITS)) for n, f in _ROUNDS]


def _mix_numpy(z):
    """:func:`_mix` for a uint64 array, in place."""
    t = numpy.empty_like(z)
    for shift, factor in _numpy_rounds():
        numpy.right_shift(z, shift, t)
        numpy.bitwise_xor(z, t, z)
        if factor is not None:
            numpy.multiply(z, factor, z)
    return z


def _mix_int(z: int) -> int:
    """:func:`_mix` for one integer, signed or unsigned; the result is unsigned."""
    z &= _64_BITS
    for shift, factor in _ROUNDS:
        z ^= z >> shift
        if factor is not None:
            z = z * factor & _64_BITS
    return z


_make_keep_bits_op = torch.library.custom_op(
    "fused_lora::keep_words",
    _make_keep_bits,
    mutates_args=(),
    schema="(Tensor seed, SymInt rows, SymInt columns, int keep) -> Tensor",
)


@_make_keep_bits_op.register_fake
def _(seed, rows, columns, keep_count):
    keep_bits = empty_keep_bits(seed.numel() * rows, columns, seed.device)
    return keep_bits.view(*seed.shape, rows, keep_bits.shape[1])


@_make_keep_bits_op.register_vmap
def _(info, in_dims, seed, rows, columns, keep_count):
    """With ``randomness="different"`` every sample has its own seed."""
    return _make_keep_bits_op(seed.movedim(in_dims[0], 0), rows, columns, keep_count), 0


def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row ``i`` is the eight bits of byte ``i``, lowest first."""
    byte = torch.arange(256, device=device)
    return (byte[:, None] >> torch.arange(8, device=device) & 1).to(dtype)
