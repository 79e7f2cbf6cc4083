"""The LoRA branch's dropout: keep bits from a seed, and the seed from PyTorch's generator.

A mask is ``int32 (M, words)``: bit ``j`` of word ``w`` keeps column ``32·w + j``. It is a pure
function of the seed, made alike here and in ``kernels/dropout.py``, so that every implementation
drops the same entries and a recomputed forward repeats its mask.

    h[m, l]  =  mix(mix(seed) xor (m·2³² + l))                   for the 64 columns 64·l …
    r[i]     =  mix(h + (i+1)·γ),  i = 0 … 15                    SplitMix64 seeded with h
    bits     =  r[i] | bits  if digit i of the keep probability is 1,  else  r[i] & bits

Each bit is 1 with probability keep/2¹⁶. SplitMix64: Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014, with the constants of Stafford's variant 13.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant

DIGITS = 16
KEEP_ALL = 1 << DIGITS  # the keep probability is a multiple of 2⁻¹⁶

_LANE = 64  # columns of one random word
_PITCH = 2  # lanes: a row is a whole number of 16-byte vectors
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
# Random words made at once: temporaries stay in cache, and each thread has a grain of work.
_CPU_WORDS_PER_THREAD = 1 << 15
_DEVICE_WORDS = 1 << 22


def keep_count(p: float) -> int:
    """The keep probability ``1 - p`` in units of 2⁻¹⁶, at least one."""
    return max(1, round((1.0 - p) * KEEP_ALL))


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from the default generator of ``device``: checkpointing restores it."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def empty_words(rows: int, columns: int, device: torch.device) -> Tensor:
    """An uninitialised mask ``int32 (rows, words)`` for ``columns`` columns."""
    lanes = -(-columns // (_LANE * _PITCH)) * _PITCH
    return torch.empty((rows, lanes), dtype=torch.int64, device=device).view(torch.int32)


def keep_words(seed: Tensor, rows: int, columns: int, keep: int) -> Tensor:
    """Keep bits ``int32 (rows, words)``, each set with probability keep/2¹⁶."""
    # Compilers see one operator: views of another dtype and 64-bit constants are beyond them.
    make = _keep_words_op if torch.compiler.is_compiling() else _keep_words
    return make(seed, rows, columns, keep)


def _keep_words(seed: Tensor, rows: int, columns: int, keep: int) -> Tensor:
    device = seed.device
    words = empty_words(rows, columns, device)
    lanes = words.view(torch.int64)
    width = lanes.shape[1]
    first_digit = (keep & -keep).bit_length() - 1  # AND with zero leaves zero: nothing to draw
    steps = torch.arange(first_digit + 1, DIGITS + 1, device=device).mul_(_GAMMA)
    at_once = (
        _CPU_WORDS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _DEVICE_WORDS
    )
    block = max(1, at_once // max(1, width * steps.numel()))
    lane = torch.arange(width, device=device)
    key = _mix(seed.clone())
    for first in range(0, rows, block):
        row = torch.arange(first, min(first + block, rows), device=device)
        h = _mix((row[:, None] * (1 << 32) + lane).bitwise_xor_(key))
        random = _mix(h + steps[:, None, None])
        bits = lanes[first : first + block].copy_(random[0])
        for digit, more in enumerate(random[1:], start=first_digit + 1):
            if keep >> digit & 1:
                bits.bitwise_or_(more)
            else:
                bits.bitwise_and_(more)
    return words


def keep_matrix(words: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask as a new ``(M, columns)`` of zeros and ones in ``dtype``."""
    octets = words.view(torch.uint8).int()
    # Not kept on a GPU: inductor's CUDA graphs own what is made in their memory pool.
    args = dtype, words.device
    table = constant(_byte_table, *args) if words.is_cpu else _byte_table(*args)
    # A row of eight values a byte: 0.3 ns an element; shifting and comparing takes twice that.
    return F.embedding(octets, table).flatten(1)[:, :columns]


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place; shifts of int64 are arithmetic, hence the masks."""
    t = torch.empty_like(z)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        torch.bitwise_right_shift(z, shift, out=t)
        z.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


_keep_words_op = torch.library.custom_op(
    "fused_lora::keep_words",
    _keep_words,
    mutates_args=(),
    schema="(Tensor seed, SymInt rows, SymInt columns, int keep) -> Tensor",
)


@_keep_words_op.register_fake
def _(seed, rows, columns, keep):
    return empty_words(rows, columns, seed.device)


def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row ``i`` is the eight bits of byte ``i``, lowest first."""
    byte = torch.arange(256, device=device)
    return (byte[:, None] >> torch.arange(8, device=device) & 1).to(dtype)
