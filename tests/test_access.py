"""Every kernel, over ragged shapes: accesses in bounds, each output written once, bytes moved."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from access_recorder import AccessError, assert_guards, guarded, record

from fused_lora.kernels import shared_input, strategies
from fused_lora.kernels.config import (
    AddConfig,
    GatedConfig,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
    SinglePassConfig,
    ThinPairConfig,
)
from fused_lora.kernels.gated import gated, gated_backward
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.operands import BackwardOperands, ForwardOperands
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.segments import Segments
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.single_pass import single_pass
from fused_lora.kernels.thin_pair import thin_pair
from fused_lora.ops import dropout
from support import by_default

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# M, K, N, R, dtype, strategy, dropout
CASES = [
    (63, 123, 80, 8, BF16, "split", True),
    (130, 65, 129, 100, FP16, "split", True),
    (300, 17, 33, 1, FP32, "split", False),
    (64, 128, 192, 16, BF16, "split", False),
    (17, 300, 123, 24, BF16, "addmm", True),
    (1, 1, 1, 1, FP32, "addmm", False),
    (17, 300, 123, 24, BF16, "seeded", True),
    (64, 128, 192, 16, FP16, "seeded", False),
    (300, 64, 184, 5, BF16, "seeded", True),
    (65, 64, 63, 200, FP32, "addmm", True),
    (17, 123, 65, 64, FP16, "single_pass", False),
    (64, 128, 64, 16, BF16, "single_pass", False),
]


def layer(case):
    """The layer's tensors between guard bands, and the buffers to check."""
    M, K, N, R, dtype, *_ = case
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "dy": (M, N)}
    pairs = {name: guarded(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    return {n: t for n, (t, _) in pairs.items()}, [buffer for _, buffer in pairs.values()]


def run_both_directions(case, tensors):
    M, K, _, _, _, strategy, dropped = case
    x, weight, A, B, dy = (tensors[n] for n in ("x", "weight", "lora_A", "lora_B", "dy"))
    seed, keep_bits = None, None
    if dropped:
        seed, keep_bits = torch.tensor(7), dropout.empty_keep_bits(M, K, x.device)
    bias = torch.randn(weight.shape[0])
    scale = torch.tensor(2.0)
    forward = ForwardOperands(x, weight, A, B, bias, scale, seed, 50_000)
    _, S = strategies.forward(forward, strategy, keep_bits)
    strategies.backward(BackwardOperands(dy, x, weight, A, B, S, scale, keep_bits, 1.3), strategy)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_bounds_and_written_once(case):
    tensors, buffers = layer(case)
    with record() as launches:
        run_both_directions(case, tensors)
    assert len(launches) >= 2
    assert all(launch.written for launch in launches)
    for buffer in buffers:
        assert_guards(buffer)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes", by_default([(33, 72, 64, 40)], [(33, 72, 64, 40), (17, 65, 63, 5)]), ids=str
)
def test_tiles_wider_than_the_matrix(sizes, transposed, masked):
    M, N, L, R = sizes
    """Explicit configs: a tile of 256 columns spans more words than a row of the mask has."""
    p, u, v, z = torch.randn(M, L), torch.randn(M, R), torch.randn(R, N), torch.randn(L, R)
    q = torch.randn(N, L).t() if transposed else torch.randn(L, N)
    o, bias, scale = torch.zeros(M, N), torch.randn(N), torch.tensor(0.5)
    seed = torch.tensor(1)
    over_o = {"keep_bits": dropout.make_keep_bits(seed, M, N, 45_000) if masked else None}
    over_p = {"keep_bits": dropout.make_keep_bits(seed, M, L, 45_000) if masked else None}
    with record() as launches:
        for block in (32, 256):
            for programs in (0, 3):
                gemm = GemmConfig(4, 2, block_m=16, block_n=block, block_l=32, programs=programs)
                lora_gemm(o, p, q, u, v, scale, gemm, bias=bias, **over_o)
            tile = AddConfig(4, 1, block_m=16, block_n=block)
            for base in (None, o, torch.randn(M, N)):
                lora_add(o, u, v, scale, tile, base=base, bias=bias, **over_o)
            single = SinglePassConfig(4, 2, block_m=16, block_n=block, block_l=32)
            single_pass(o, u, p, q, z, v, scale, single, bias=bias, **over_o)
            for splits in (1, 2):
                thin = ShrinkConfig(4, 2, block_m=16, block_l=block, splits=splits)
                shrink(torch.empty(M, R), p, z, scale, thin, **over_p)
                grad = RankGradConfig(4, 2, block_m=16, block_l=block, splits=splits)
                rank_grad(torch.empty(R, L), u, p, scale, grad, **over_p)
                pair = ThinPairConfig(4, 2, block_m=16, block_l=block, splits=splits)
                half = p.half(), z[:, :32].half(), u[:, :32].half()
                results = torch.empty(M, min(R, 32)), torch.empty(L, min(R, 32))
                thin_pair(*results, *half, scale, pair)
    assert len(launches) >= 16


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("M", "N", "R"), [(33, 72, 40), (17, 65, 5), (1, 1, 1), (40, 300, 0)])
def test_gated_in_bounds_and_written_once(M, N, R, in_place):
    """Rows of gate and up are parts of wider ones, as in the output of one stacked projection."""
    pairs = [guarded(torch.randn(M, 2 * N)) for _ in range(3)]
    (gate, up), (dh, h), (dgate, dup) = (wide.split(N, dim=1) for wide, _ in pairs)
    low_rank = {"u": torch.randn(M, R), "v": torch.randn(R, N)} if R else {}
    if R > 5:
        low_rank["keep_bits"] = dropout.make_keep_bits(torch.tensor(1), M, N, 45_000)
    results = {} if in_place else {"dgate": dgate, "dup": dup, "h": h}
    with record() as launches:
        for block in (32, 256):
            config = GatedConfig(4, 1, block_m=16, block_n=block)
            gated(h, gate, up, config, activation="silu")
            gated_backward(gate, up, dh, config, activation="silu", **results, **low_rank)
    assert len(launches) == 4
    for _, buffer in pairs:
        assert_guards(buffer)


# rows of each segment, L, R, rows of a block
SEGMENTED = [
    ([5, 0, 1, 40, 17, 0], 123, 12, 16),
    ([1] * 24, 64, 8, 16),
    ([1030, 3, 1500], 40, 5, 256),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", SEGMENTED, ids=["uneven", "single rows", "long"])
def test_segments_in_bounds_and_written_once(case, masked):
    """The tensors end with the last segment: an access to a row beyond it would be outside."""
    lengths, L, R, block = case
    end, G = sum(lengths), len(lengths)
    segments = Segments(torch.tensor(lengths).cumsum(0), end + 100)
    shapes = (end, L), (G, R, L), (end, R), (end, L), (end, 40), (G, 40, L), (G, L)
    pairs = [guarded(torch.randn(shape)) for shape in shapes]
    (p, stack, u, o, rows_of, weights, bias), buffers = zip(*pairs, strict=True)
    scale, rows, seed = torch.ones(G), torch.randperm(2 * end)[:end], torch.tensor(1)
    given = {"keep_bits": dropout.empty_keep_bits(end, L, p.device) if masked else None}
    making = given | {"seed": seed, "keep_count": 45_000, "rows": rows} if masked else {}
    with record(partly=("parts_ptr",)) as launches:
        for splits, step in ((1, 32), (2, 128)):
            thin = ShrinkConfig(4, 2, block_m=block, block_l=step, splits=splits)
            table = segments.blocks(block)
            shrink(u, p, stack.mT, scale, thin, segments=table, **making)
        add = AddConfig(4, 1, block_m=block, block_n=64)
        lora_add(o, u, stack, None, add, base=o, segments=segments.blocks(block), **given)
        tile = GemmConfig(4, 2, block_m=block, block_n=64, block_l=32)
        table = segments.blocks(block)
        lora_gemm(o, rows_of, weights, u, stack, scale, tile, bias=bias, segments=table, **given)
        grad = RankGradConfig(4, 2, block_m=256, block_l=128)
        rank_grad(stack, u, p, scale, grad, segments=segments.items(), **given)
    assert [launch.kernel for launch in launches if launch.kernel != "_dropout_mask"] == [
        "_shrink", "_shrink", "_lora_add", "_lora_gemm", "_rank_grad",
    ]  # fmt: skip
    for buffer in buffers:
        assert_guards(buffer)


def test_members_share_launches():
    """x is read by one launch for all masked members, and by one for all others; so is dx."""
    x, A, seeds = torch.randn(520, 128).to(BF16), [torch.randn(8, 128)] * 4, torch.arange(2)
    G, dx = [torch.randn(520, 8).to(BF16)] * 4, torch.zeros(520, 128, dtype=BF16)
    dropping = [seeds[0], None, seeds[1], None], [50_000] * 4
    with record() as launches:
        _, keep_bits = shared_input.shrink_shared(x, A, *dropping, torch.ones(()))
        shared_input.input_gradients(x, dx, A, G, keep_bits, [1.3] * 4, [True] * 4)
    names = [launch.kernel for launch in launches if launch.kernel != "_dropout_mask"]
    assert names == ["_shrink"] * 2 + ["_rank_grad"] * 2 + ["_lora_add"] * 2


def test_bytes_of_the_split_strategy():
    """The unique bytes are the compulsory ones: each operand and each result once."""
    M, K, N, R = 130, 128, 192, 16
    case = (M, K, N, R, BF16, "split", False)
    tensors, _ = layer(case)
    with record() as launches:
        run_both_directions(case, tensors)
    by_name = {}
    for launch in launches:
        by_name.setdefault(launch.kernel, []).append(launch)
    gemm = by_name["_lora_gemm"][0]
    assert gemm.read_unique["p_ptr"] == 2 * M * K
    assert gemm.read_unique["q_ptr"] == 2 * N * K
    assert gemm.read_unique["u_ptr"] == 2 * M * R
    assert gemm.written == {"o_ptr": 2 * M * N}
    assert gemm.read_total["p_ptr"] == 3 * gemm.read_unique["p_ptr"]  # per block of 64 columns
    for kernel, length in (("_shrink", K), ("_thin_pair", N)):
        (launch,) = by_name[kernel]
        assert launch.read_total["p_ptr"] == launch.read_unique["p_ptr"] == 2 * M * length


@triton.jit
def _copy(out_ptr, in_ptr, n, MASK_LOAD: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(in_ptr + offs, mask=offs < n) if MASK_LOAD else tl.load(in_ptr + offs)
    tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def _overlapping(out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, offs.to(tl.float32), mask=offs < n)


def test_recorder_passes_a_sound_kernel():
    out, source = torch.empty(100), torch.randn(100)
    with record() as launches:
        _copy[(4,)](out, source, 100, MASK_LOAD=True, BLOCK=32)
    assert torch.equal(out, source)
    assert launches[0].read_unique == {"in_ptr": 400}
    assert launches[0].written == {"out_ptr": 400}


def test_recorder_catches_an_unmasked_load():
    source, _ = guarded(torch.randn(100))
    with pytest.raises(AccessError, match="reads outside"), record():
        _copy[(4,)](torch.empty(100), source, 100, MASK_LOAD=False, BLOCK=32)


def test_recorder_catches_a_missing_tile():
    with pytest.raises(AccessError, match="leaves 4 elements of out_ptr"), record():
        _copy[(3,)](torch.empty(100), torch.randn(100), 100, MASK_LOAD=True, BLOCK=32)


def test_recorder_catches_a_double_write():
    with pytest.raises(AccessError, match="repeatedly"), record():
        _overlapping[(6,)](torch.empty(100), 100, BLOCK=32)


def test_recorder_catches_a_read_between_the_rows_of_a_view():
    matrix = torch.randn(10, 16)[:, :8]
    with pytest.raises(AccessError, match="reads outside"), record():
        _copy[(4,)](torch.empty(100), matrix, 100, MASK_LOAD=True, BLOCK=32)


def test_guard_bands_show_a_write():
    inner, buffer = guarded(torch.zeros(10))
    assert_guards(buffer)
    torch.as_strided(buffer, (1,), (1,), inner.storage_offset() - 1).zero_()
    with pytest.raises(AccessError, match="guard band"):
        assert_guards(buffer)
