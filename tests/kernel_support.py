"""Shared by the tests of the kernels: operands, dropout masks, comparison with float64."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from fused_lora.ops import dropout
from support import UNIT_ROUNDOFF, assert_error, relative_rms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEEP = 45_000
INV_KEEP = dropout.KEEP_ALL / KEEP
SCALE = torch.tensor(0.7)
_random = random.Random(0)
LENGTHS = {  # of segments
    "uneven": [5, 0, 1, 40, 17, 0, 33, 0],
    "skewed": [3, 20, 90, 1, 0, 30, 6],  # 60 % in one
    "many": [_random.choice([0, 1, 2, 5]) for _ in range(256)],
    "long": [1100, 2, 2100, 0, 1024],  # several items of rank_grad
    "few": [5, 0, 1, 17],
}
TAIL = 9  # rows of no segment


def rand(*shape, dtype=FP32):
    return torch.randn(shape).to(dtype)


def random_keep_bits(rows, columns):
    seed = torch.tensor(1234567)
    keep_bits = dropout.make_keep_bits(seed, rows, columns, KEEP)
    return keep_bits, dropout.keep_mask(keep_bits, columns, torch.float64) * INV_KEEP


def offsets_of(lengths, dtype=torch.int32):
    return torch.tensor(lengths).cumsum(0).to(dtype)


def slices(offsets):
    return [slice(*ends) for ends in pairwise([0, *offsets.tolist()])]


def scales(segments):
    return torch.linspace(-1.5, 2.0, segments)


def peft_interleaved(B):
    """The same stack as PEFT's experts keep it: ``(N, R·G)``, segments fastest."""
    return B.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def parts_of_wider(stack):
    """The same stack in a larger one, whose matrices start off 16 bytes."""
    wide = stack.new_full((stack.shape[0], stack.shape[1] * stack.shape[2] + 3), torch.nan)
    view = wide[:, :-3].unflatten(1, stack.shape[1:])
    return view.copy_(stack)


def check(actual, expected, dtype):
    """Bound: two roundings to ``dtype`` (an operand cast for its dot, the result), float32 sums."""
    bound = 2 * UNIT_ROUNDOFF[dtype] + 4 * UNIT_ROUNDOFF[FP32]
    assert_error("result", relative_rms(actual, expected), bound, dtype)


ACTIVATE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def gated_in_float64(gate, up, dh, activation):
    """``h``, ``dgate``, ``dup`` by PyTorch, in float64."""
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    h = ACTIVATE[activation](leaves[0]) * leaves[1]
    return h.detach(), *torch.autograd.grad(h, leaves, dh.double())
