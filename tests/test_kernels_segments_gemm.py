"""``lora_gemm`` over rows sorted into segments, under the interpreter, against float64."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import (
    BF16,
    FP16,
    FP32,
    INV_KEEP,
    KEEP,
    LENGTHS,
    TAIL,
    check,
    offsets_of,
    parts_of_wider,
    peft_interleaved,
    rand,
    random_keep_bits,
    scales,
    slices,
)

from fused_lora.kernels import select_config
from fused_lora.kernels.config import GemmConfig
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.segments import (
    Segments,
    gemm_segments,
    input_gradients_segments,
    shrink_segments,
    thin_gradients_segments,
)
from support import by_default

# name of lengths, L, N, R, dtype, adapters' dtype, weights, bias, masked, scaled, rows of a block
GEMM = [
    ("uneven", 123, 70, 12, BF16, FP32, "transposed", "own", False, True, 32),
    ("skewed", 96, 130, 64, FP16, FP16, "stack", "none", True, False, 64),
    ("many", 32, 64, 8, BF16, BF16, "transposed", "common", False, True, 16),
    ("uneven", 72, 65, 100, FP32, FP32, "stack", "none", True, True, 16),
    ("few", 40, 33, 1, FP32, FP32, "one", "own", False, True, 64),
    ("skewed", 136, 80, 16, BF16, FP32, "one transposed", "common", True, True, 32),
    ("long", 24, 40, 8, FP32, FP32, "stack", "own", True, False, 128),
    ("few", 1, 1, 1, BF16, BF16, "transposed", "none", False, False, 16),
]


def problem(case):
    """Operands of a launch by name; NaN in all that no row of a segment needs."""
    name, L, N, R, dtype, adapter, weights, bias, masked, scaled, _ = case
    offsets = offsets_of(LENGTHS[name], torch.int64)
    G, end = len(offsets), int(offsets[-1])
    M, stack = end + TAIL, () if weights.startswith("one") else (G,)
    is_transposed = weights.endswith("transposed")
    q = rand(*stack, N, L, dtype=dtype).mT if is_transposed else rand(*stack, L, N, dtype=dtype)
    p, u, v = rand(M, L, dtype=dtype), rand(M, R), peft_interleaved(rand(G, N, R)).mT.to(adapter)
    keep_bits, mask = random_keep_bits(M, N) if masked else (None, torch.ones(M, 1))
    p[end:], u[end:] = torch.nan, torch.nan
    empty = [g for g, rows in enumerate(LENGTHS[name]) if rows == 0]
    v[empty] = torch.nan
    if stack:
        q[empty] = torch.nan
    bias = {"own": rand(G, N), "common": rand(N), "none": None}[bias]
    scale = scales(G) if scaled else None
    return offsets, p, q, u, v, scale, bias, keep_bits, mask


def in_float64(offsets, p, q, u, v, scale, bias, mask):
    expected = []
    for g, s in enumerate(slices(offsets)):
        own = q if q.dim() == 2 else q[g]
        low_rank = u[s].to(p.dtype).double() @ v[g].to(p.dtype).double() * mask[s]
        y = p[s].double() @ own.double() + low_rank * (1 if scale is None else scale[g].double())
        expected.append(y if bias is None else y + (bias if bias.dim() == 1 else bias[g]).double())
    return torch.cat(expected)


@pytest.mark.parametrize("case", by_default(GEMM[:6], GEMM), ids=str)
def test_lora_gemm(case):
    offsets, p, q, u, v, scale, bias, keep_bits, mask = problem(case)
    dtype, block, end, M = case[4], case[-1], int(offsets[-1]), len(p)
    o = torch.empty(M, q.shape[-1], dtype=dtype)
    untouched = o[end:].clone()
    config = GemmConfig(4, 2, block_m=block, block_n=64, block_l=32, group_m=3)
    lora_gemm(
        o, p, q, u, v, scale, config, bias=bias, keep_bits=keep_bits,
        inv_keep=INV_KEEP if keep_bits is not None else 1.0,
        segments=Segments(offsets, M).blocks(block),
    )  # fmt: skip
    check(o[:end], in_float64(offsets, p, q, u, v, scale, bias, mask), dtype)
    assert torch.equal(o[end:].nan_to_num(7.0), untouched.nan_to_num(7.0))


# name of lengths, K, N, R, dtype, adapters' dtype, dropout, one weight for all
SPLIT = [
    ("skewed", 136, 80, 16, BF16, FP32, True, False),
    ("few", 64, 72, 100, FP16, FP16, False, True),
    ("many", 64, 33, 8, FP32, FP32, True, False),
    ("uneven", 256, 192, 1, BF16, BF16, True, True),
]


@pytest.mark.parametrize("case", by_default(SPLIT[:2], SPLIT), ids=str)
def test_both_directions(case):
    """``y`` and ``dx`` in one launch each, with the tiles that are selected, against float64."""
    name, K, N, R, dtype, adapter, dropped, common = case
    offsets = offsets_of(LENGTHS[name])
    G, end = len(offsets), int(offsets[-1])
    M = end + TAIL
    x, dy, bias, scale = rand(M, K, dtype=dtype), rand(M, N, dtype=dtype), rand(G, N), scales(G)
    weight = rand(*(() if common else (G,)), N, K, dtype=dtype) / K**0.5
    A, B = (rand(G, R, K) / K**0.5).to(adapter), (rand(G, N, R) / R**0.5).to(adapter)
    segments, rows = Segments(offsets, M), torch.randperm(2 * M)[:M]
    _, mask = random_keep_bits(2 * M, K)
    mask = mask[rows] if dropped else torch.ones(M, 1)
    masking = {"seed": torch.tensor(1234567), "keep_count": KEEP, "rows": rows} if dropped else {}
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    S, bits = shrink_segments(x, A, segments, scale, **masking)
    gemm_segments(y, x, weight.mT, S, B.mT, segments, scale, bias=bias)
    U, _ = thin_gradients_segments(dy, B, S, segments, scale)
    gemm_segments(dx, dy, weight, U, A, segments, keep_bits=bits, inv_keep=INV_KEEP)
    assert input_gradients_segments(x, None, A, U, segments, bits).shape == A.shape
    ones = torch.ones(M, 1)
    exact = in_float64(offsets, x, weight.mT, S, B.mT, scale, bias, ones)
    check(y[:end], exact, dtype)
    check(dx[:end], in_float64(offsets, dy, weight, U, A, None, None, mask), dtype)
    assert y[end:].isnan().all()
    assert dx[end:].isnan().all()


@pytest.mark.filterwarnings("ignore:.*encountered")  # of NumPy, which runs the kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["p", "q", "u", "v", "scale", "bias"])
def test_a_segment_does_not_reach_the_others(where, value):
    names = "p", "q", "u", "v", "scale", "bias"
    case = ("skewed", 40, 65, 12, BF16, FP32, "stack", "own", True, True, 64)
    offsets, *clean, keep_bits, _ = problem(case)
    operands, M, bad = dict(zip(names, clean, strict=True)), len(clean[0]), 1
    own = slices(offsets)[bad]
    config = GemmConfig(4, 2, block_m=64, block_n=64, block_l=32)
    results = []
    for _ in range(2):
        o = torch.zeros(M, 65, dtype=BF16)
        p, q, u, v, scale, bias = operands.values()
        lora_gemm(
            o, p, q, u, v, scale, config, bias=bias, keep_bits=keep_bits, inv_keep=INV_KEEP,
            segments=Segments(offsets, M).blocks(64),
        )  # fmt: skip
        results.append(o)
        changed = operands[where] = operands[where].clone()
        changed[own if where in ("p", "u") else bad] = value
    clean, other = results
    assert not other[own].isfinite().all()
    for t in results:
        t[own] = 0
    assert torch.equal(clean, other)


def test_a_segment_alone_has_the_same_bits():
    """Each result is that of the kernel for one adapter, given the same tile."""
    case = ("uneven", 72, 130, 40, BF16, BF16, "transposed", "own", True, True, 16)
    offsets, p, q, u, v, scale, bias, keep_bits, _ = problem(case)
    config = GemmConfig(4, 2, block_m=16, block_n=64, block_l=32)
    M, N = len(p), q.shape[-1]
    o = torch.empty(M, N, dtype=BF16)
    masking = {"inv_keep": INV_KEEP, "segments": Segments(offsets, M).blocks(16)}
    lora_gemm(o, p, q, u, v, scale, config, bias=bias, keep_bits=keep_bits, **masking)
    for g, s in enumerate(slices(offsets)):
        if s.start == s.stop:
            continue
        one, bits = torch.empty_like(o[s]), keep_bits[s].contiguous()
        of_one = {"bias": bias[g], "keep_bits": bits, "inv_keep": INV_KEEP}
        lora_gemm(one, p[s], q[g], u[s], v[g], scale[g], config, **of_one)
        assert torch.equal(one, o[s]), g


@pytest.mark.parametrize("which", ["q", "q transposed", "v", "v transposed"])
def test_stacks_of_any_strides(which):
    """A matrix may start anywhere, though rows of each are whole 16-byte vectors."""
    case = ("few", 40, 64, 8, BF16, BF16, "transposed", "own", False, True, 16)
    offsets, p, q, u, v, scale, *_ = problem(case)
    config = GemmConfig(4, 2, block_m=16, block_n=64, block_l=32)
    results = []
    for layout in (torch.Tensor.contiguous, parts_of_wider):
        operand, _, transposed = which.partition(" ")
        stack = {"q": q, "v": v}[operand]
        stack = layout(stack.mT).mT if transposed else layout(stack)
        o = torch.zeros(len(p), 64, dtype=BF16)
        operands = (stack, u, v) if operand == "q" else (q, u, stack)
        table = Segments(offsets, len(p)).blocks(16)
        lora_gemm(o, p, *operands, scale, config, segments=table)
        results.append(o)
    assert torch.equal(*results)


def test_a_descriptor_is_refused():
    """Its block would be stored beyond the end of a segment."""
    case = ("few", 64, 64, 8, BF16, BF16, "stack", "none", False, True, 64)
    offsets, p, q, u, v, scale, *_ = problem(case)
    table, o = Segments(offsets, len(p)).blocks(64), torch.empty(len(p), 64, dtype=BF16)
    for wrong in ({"descriptors": True}, {"programs": 4}):
        config = GemmConfig(4, 2, block_m=64, block_n=64, block_l=32, **wrong)
        with pytest.raises(Exception, match="beyond the end of a segment"):
            lora_gemm(o, p, q[0], u, v, scale, config, segments=table)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_no_higher_than_a_segment(arch, itemsize):
    shared = select_config.SHARED_BYTES.get(arch, select_config.DEFAULT_SHARED_BYTES)
    target = select_config.Target(arch, 132, shared)
    for aligned in (True, False):
        of = {"aligned": aligned}
        for M, segments, most in ((4096, 256, 16), (4096, 128, 32), (32_768, 128, 256)):
            of["segments"] = segments
            config = select_config.gemm_config(target, itemsize, M, 2048, 16, **of)
            assert config.block_m <= most
            assert config == replace(config, descriptors=False, programs=0, overlap=False)
        of["segments"] = 8
        long = select_config.gemm_config(target, itemsize, 32_768, 2048, 16, **of)
        assert long.block_m >= 64
