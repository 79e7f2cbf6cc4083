"""The thin kernels over rows sorted into segments, under the interpreter, against float64."""

import random
from itertools import product

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
from torch._subclasses import FakeTensorMode
from triton.runtime import interpreter

from fused_lora.kernels import select_config
from fused_lora.kernels.config import (
    SEGMENT_ROWS,
    AddConfig,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
)
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.segments import (
    Segments,
    add_segments,
    input_gradients_segments,
    shrink_segments,
    thin_gradients_segments,
)
from fused_lora.kernels.shrink import shrink
from fused_lora.ops import dropout
from support import by_default

# name of lengths, L, R, dtype, splits, rows, step, descriptors, Q transposed, dropout
SHRINK = [
    ("uneven", 256, 16, BF16, 1, 16, 128, False, True, None),
    ("uneven", 123, 12, FP16, 1, 32, 64, False, False, "given"),
    ("skewed", 256, 64, BF16, 2, 32, 128, True, True, "made"),
    ("few", 300, 140, FP32, 2, 16, 32, False, True, "made"),  # the mask by its own launch
    ("many", 64, 8, FP32, 1, 16, 64, False, True, None),
    ("few", 72, 1, FP32, 1, 64, 64, False, True, None),
]


@pytest.mark.parametrize("case", SHRINK, ids=str)
def test_shrink(case):
    name, L, R, dtype, splits, block, step, descriptors, transposed, dropped = case
    offsets = offsets_of(LENGTHS[name])
    G, end = len(offsets), int(offsets[-1])
    M, scale = end + TAIL, scales(G)
    p = rand(M, L, dtype=dtype)
    q = rand(G, R, L, dtype=dtype).mT if transposed else rand(G, L, R, dtype=dtype)
    keep_bits, mask = random_keep_bits(M, L) if dropped else (None, torch.ones(M, 1))
    config = ShrinkConfig(
        4, 2, descriptors, block_m=block, block_l=step, splits=splits, max_block_r=128
    )
    masking = {"keep_bits": keep_bits, "inv_keep": INV_KEEP} if dropped else {}
    if dropped == "made":
        masking["keep_bits"] = torch.empty_like(keep_bits)
        masking |= {"seed": torch.tensor(1234567), "keep_count": KEEP}
    u, table = torch.empty(M, R), Segments(offsets, M).blocks(block)
    shrink(u, p, q, scale, config, segments=table, **masking)
    expected = [
        scale[g].double() * (p[s].double() * mask[s]) @ q[g].double()
        for g, s in enumerate(slices(offsets))
    ]
    check(u[:end], torch.cat(expected), FP32)
    assert u[end:].isnan().all()
    if dropped == "made":
        assert torch.equal(masking["keep_bits"][:end], keep_bits[:end])


# name of lengths, N, R, dtype, adapter's dtype, V transposed, masked, scaled, base
ADD = [
    ("uneven", 123, 12, BF16, FP32, True, False, True, "in place"),
    ("skewed", 96, 64, FP16, FP16, False, True, False, "in place"),
    ("many", 64, 8, FP32, BF16, True, False, True, "in place"),
    ("uneven", 72, 100, FP32, FP32, False, True, True, "beside"),
    ("few", 40, 1, FP32, FP32, False, False, False, "none"),
]


@pytest.mark.parametrize("case", ADD, ids=str)
def test_lora_add(case):
    name, N, R, dtype, adapter, transposed, masked, scaled, base = case
    offsets = offsets_of(LENGTHS[name], torch.int64)
    G, end = len(offsets), int(offsets[-1])
    M, scale = end + TAIL, scales(G) if scaled else None
    o, u, bias = rand(M, N, dtype=dtype), rand(M, R, dtype=dtype), rand(N)
    v = rand(G, N, R, dtype=adapter).mT if transposed else rand(G, R, N, dtype=adapter)
    keep_bits, mask = random_keep_bits(M, N) if masked else (None, torch.ones(M, 1))
    given = {"in place": o, "beside": rand(M, N, dtype=dtype), "none": None}[base]
    before = torch.zeros(M, N).double() if given is None else given.double()
    untouched, config = o[end:].clone(), AddConfig(4, 1, block_m=32, block_n=64)
    lora_add(
        o, u, v, scale, config, base=given, bias=bias, keep_bits=keep_bits,
        inv_keep=INV_KEEP if masked else 1.0, segments=Segments(offsets, M).blocks(32),
    )  # fmt: skip
    for g, s in enumerate(slices(offsets)):
        of_segment = u[s].double() @ v[g].to(dtype).double() * mask[s]
        before[s] += of_segment * (scale[g].double() if scaled else 1)
    check(o[:end], (before + bias.double())[:end], dtype)
    assert torch.equal(o[end:], untouched)


# name of lengths, L, R, dtype, output dtype, step, descriptors, masked, scaled, output transposed
RANK_GRAD = [
    ("uneven", 123, 12, BF16, FP32, 32, False, True, False, False),
    ("skewed", 64, 64, FP16, FP16, 16, True, False, True, True),
    ("many", 64, 8, FP16, FP16, 16, False, False, True, True),
    ("long", 40, 16, BF16, BF16, 64, True, True, True, False),
    ("long", 65, 20, FP32, FP32, 128, False, False, False, True),
    ("few", 17, 1, FP32, FP32, 16, False, False, True, False),
]


@pytest.mark.parametrize("case", RANK_GRAD, ids=str)
def test_rank_grad(case):
    """Of both kinds: segments of one item, and of several, whose partial sums are added."""
    name, L, R, dtype, out_dtype, step, descriptors, masked, scaled, transposed = case
    offsets = offsets_of(LENGTHS[name])
    G, end = len(offsets), int(offsets[-1])
    M, scale = end + TAIL, scales(G) if scaled else None
    u, p = rand(M, R), rand(M, L, dtype=dtype)
    u[end:], p[end:] = torch.nan, torch.nan
    keep_bits, mask = random_keep_bits(M, L) if masked else (None, torch.ones(M, 1))
    shape = (G, L, R) if transposed else (G, R, L)
    results = [torch.empty(shape, dtype=out_dtype) for _ in range(2 if name == "long" else 1)]
    config = RankGradConfig(4, 2, descriptors, block_m=step, block_l=64, max_block_r=64)
    for o in results:
        rank_grad(
            o.mT if transposed else o, u, p, scale, config, keep_bits=keep_bits,
            inv_keep=INV_KEEP if masked else 1.0, segments=Segments(offsets, M).items(),
        )  # fmt: skip
    o = results[0].mT if transposed else results[0]
    expected = [
        u[s].to(dtype).double().mT @ (p[s].double() * mask[s]) * (scale[g] if scaled else 1)
        for g, s in enumerate(slices(offsets))
    ]
    check(o, torch.stack(expected), out_dtype)
    assert torch.equal(results[0], results[-1])
    assert all((o[g] == 0).all() for g, n in enumerate(LENGTHS[name]) if n == 0)


# name of lengths, K, N, R, dtype, adapter's dtype, dropout
SEQUENCES = [
    ("uneven", 136, 80, 16, BF16, FP32, True),
    ("skewed", 123, 65, 12, FP16, FP16, True),
    ("few", 40, 33, 64, FP32, FP32, True),
    ("long", 40, 33, 64, FP32, FP32, True),
    ("many", 130, 64, 64, FP32, FP32, True),
    ("skewed", 256, 192, 16, BF16, BF16, True),
    ("many", 64, 72, 8, BF16, BF16, False),
    ("uneven", 17, 33, 1, FP16, FP32, False),
    ("few", 64, 64, 8, BF16, FP32, True),
    ("long", 64, 64, 12, BF16, FP32, False),
]


def operands(name, K, N, R, dtype, adapter):
    offsets = offsets_of(LENGTHS[name])
    G, M = len(offsets), int(offsets[-1]) + TAIL
    x, dy = rand(M, K, dtype=dtype), rand(M, N, dtype=dtype)
    A, B = (rand(G, R, K) / K**0.5).to(adapter), (rand(G, N, R) / R**0.5).to(adapter)
    return offsets, x, dy, A, B, scales(G)


def both_directions(offsets, x, dy, A, B, scale, seed=None, rows=None):
    """``y``, ``dx``, ``dA``, ``dB`` and the ``S`` and ``G`` between; bases are zeros."""
    segments = Segments(offsets, x.shape[0])
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    S, bits = shrink_segments(x, A, segments, scale, seed=seed, keep_count=KEEP, rows=rows)
    add_segments(y, S, B, segments, scale)
    G, dB = thin_gradients_segments(dy, B, S, segments, scale)
    inv_keep = 1.0 if seed is None else INV_KEEP
    dA = input_gradients_segments(x, dx, A, G, segments, bits, inv_keep)
    return {"y": y, "dx": dx, "dA": dA, "dB": dB, "S": S, "G": G}


@pytest.mark.parametrize("case", by_default(SEQUENCES[:3], SEQUENCES), ids=str)
def test_both_directions(case):
    """Each product, with the tiles that are selected, against float64 of the same operands."""
    *shape, dropped = case
    offsets, x, dy, A, B, scale = operands(*shape)
    M, dtype = x.shape[0], x.dtype
    order = torch.randperm(2 * M)[:M]
    _, mask = random_keep_bits(2 * M, x.shape[1])
    mask = mask[order] if dropped else torch.ones(M, 1)
    seed = torch.tensor(1234567) if dropped else None
    got = both_directions(offsets, x, dy, A, B, scale, seed, order)
    expected = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in got.items()}
    for g, s in enumerate(slices(offsets)):
        A_g, B_g, s_g = A[g].to(dtype).double(), B[g].to(dtype).double(), scale[g].double()
        wide_x, wide_dy = x[s].double() * mask[s], dy[s].double()
        expected["S"][s] = wide_x @ A_g.mT
        expected["y"][s] = s_g * (got["S"][s].double() @ B_g.mT)
        expected["G"][s] = s_g * (wide_dy @ B_g)
        expected["dB"][g] = s_g * (wide_dy.mT @ got["S"][s].double())
        expected["dx"][s] = (got["G"][s].double() @ A_g) * mask[s]
        expected["dA"][g] = got["G"][s].double().mT @ wide_x
    end = offsets[-1]
    for name, result in got.items():
        kept = slice(None) if name in ("dA", "dB") else slice(end)
        check(result[kept], expected[name][kept], result.dtype)
    assert not got["y"][end:].any()
    assert not got["dx"][end:].any()


@pytest.mark.parametrize(("dtype", "K"), [(BF16, 200), (FP32, 72)])
def test_the_mask_does_not_depend_on_the_order(dtype, K):
    """Sorted rows have their own numbers' rows of the mask of the unsorted call, bit for bit."""
    offsets = offsets_of(LENGTHS["uneven"])
    M = int(offsets[-1])
    x, A, seed = rand(M, K, dtype=dtype), rand(len(offsets), 8, K, dtype=dtype), torch.tensor(5)
    rows = torch.randperm(300)[:M]
    _, bits = shrink_segments(x, A, offsets, seed=seed, keep_count=KEEP, rows=rows)
    assert torch.equal(bits, dropout.make_keep_bits(seed, 300, K, KEEP)[rows])
    _, bits = shrink_segments(x, A, offsets, seed=seed, keep_count=KEEP)
    assert torch.equal(bits, dropout.make_keep_bits(seed, M, K, KEEP))


@pytest.mark.filterwarnings("ignore:.*encountered")  # of NumPy, which runs the kernel
@pytest.mark.parametrize(("value", "descriptors"), [(torch.nan, True), (torch.inf, False)])
def test_a_segment_does_not_reach_the_others(value, descriptors, monkeypatch):
    """NaN or infinity in rows, adapter and scale of one, and in rows of none."""
    offsets, *clean = operands("few", 64, 64, 12, BF16, BF16)
    if not descriptors:
        monkeypatch.setattr("fused_lora.kernels.strategies.is_describable", lambda t: False)
    bad, own = 0, slice(0, int(offsets[0]))
    x, dy, A, B, scale = (t.clone() for t in clean)
    for t in (x, dy):
        t[own] = value
        t[offsets[-1] :] = value
    for t in (A, B, scale):
        t[bad] = value
    seed = torch.tensor(1)
    expected = both_directions(offsets, *clean, seed)
    got = both_directions(offsets, x, dy, A, B, scale, seed)
    for name, result in got.items():
        of_segment = bad if name in ("dA", "dB") else own
        assert not result[of_segment].isfinite().all(), name
        for t in (result, expected[name]):
            t[of_segment] = 0
            if name not in ("dA", "dB"):
                t[offsets[-1] :] = 0
        assert torch.equal(result, expected[name]), name


def test_a_segment_alone_has_the_same_bits():
    """Each result is that of the kernels for one adapter, given the same tiles."""
    offsets, x, _, A, _, scale = operands("uneven", 128, 64, 16, BF16, BF16)
    M, segments = x.shape[0], Segments(offsets, x.shape[0])
    config = ShrinkConfig(4, 2, block_m=16, block_l=128, splits=2)
    grad, add = RankGradConfig(4, 2, block_m=32, block_l=64), AddConfig(4, 1, 16, 64)
    u, o, dA = torch.empty(M, 16), x.clone(), torch.empty(A.shape)
    shrink(u, x, A.mT, scale, config, segments=segments.blocks(16))
    lora_add(o, u, A, scale, add, base=x, segments=segments.blocks(add.block_m))
    rank_grad(dA, u, x, scale, grad, segments=segments.items())
    for g, s in enumerate(slices(offsets)):
        if s.start == s.stop:
            continue
        of_one = torch.empty_like(u[s]), torch.empty_like(x[s]), torch.empty_like(dA[g])
        shrink(of_one[0], x[s], A[g].mT, scale[g], config)
        lora_add(of_one[1], u[s], A[g], scale[g], add, base=x[s])
        rank_grad(of_one[2], u[s], x[s], scale[g], grad)
        assert all(map(torch.equal, of_one, (u[s], o[s], dA[g])))


def test_programs_may_run_in_any_order(monkeypatch):
    """Partial sums of segments whose items arrive in turns do not mix."""
    lengths = [2 * SEGMENT_ROWS, 0, 2 * SEGMENT_ROWS + 5, 3]
    M, config = sum(lengths), RankGradConfig(4, 2, block_m=256, block_l=16)
    u, p, results = rand(M, 4), rand(M, 20), [torch.empty(4, 4, 20) for _ in range(2)]
    segments = Segments(offsets_of(lengths), M)
    place = interpreter.InterpreterBuilder.set_grid_idx

    def shuffled(self, x, y, z):
        order = list(product(*map(range, self.grid_dim)))
        random.Random(0).shuffle(order)
        place(self, *order[(x * self.grid_dim[1] + y) * self.grid_dim[2] + z])

    rank_grad(results[0], u, p, None, config, segments=segments.items())
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", shuffled)
    rank_grad(results[1], u, p, None, config, segments=segments.items())
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", [peft_interleaved, parts_of_wider])
def test_stacks_of_any_strides(layout):
    offsets, x, dy, A, B, scale = operands("few", 64, 72, 8, BF16, BF16)
    expected = both_directions(offsets, x, dy, A, B, scale)
    got = both_directions(offsets.long(), x, dy, layout(A), layout(B), scale[:, None][:, 0])
    for name, result in got.items():
        kept = slice(None) if name in ("dA", "dB") else slice(offsets[-1])
        assert torch.equal(result[kept], expected[name][kept]), name
    # In PEFT's order autograd need not copy the gradient.
    is_dense = layout is peft_interleaved
    assert got["dB"].stride() == (layout(B) if is_dense else B).stride()


def test_matrices_two_to_the_31_elements_apart(tmp_path):
    """Offsets of a stack do not overflow: the matrices of a sparse file are 2³⁰ elements apart."""
    G, R, L = 3, 8, 32
    shape, strides = (G, R, L), (2**30, L, 1)
    flat = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * 2**30 + R * L, dtype=BF16
    )
    far, near = flat.as_strided(shape, strides), rand(*shape, dtype=BF16)
    far.copy_(near)
    offsets, x, scale = offsets_of([4, 0, 7]), rand(11, L, dtype=BF16), scales(G)
    segments, config = Segments(offsets, 11), AddConfig(4, 1, block_m=16, block_n=32)
    results = []
    for stack in (far, near):
        u, o = torch.empty(11, R), torch.empty(11, L)
        thin = ShrinkConfig(4, 2, block_m=16, block_l=32)
        shrink(u, x, stack.mT, scale, thin, segments=segments.blocks(16))
        lora_add(o, u, stack, scale, config, segments=segments.blocks(16))
        tile = GemmConfig(4, 2, block_m=16, block_n=32, block_l=32)
        y, dx = torch.empty(11, R, dtype=BF16), torch.empty(11, L, dtype=BF16)
        lora_gemm(y, x, stack.mT, u, near[:, :, :R], scale, tile, segments=segments.blocks(16))
        lora_gemm(dx, y, near, u, stack, scale, tile, segments=segments.blocks(16))
        results.append((u, o, y, dx))
    assert all(map(torch.equal, *results))
    grad = RankGradConfig(4, 2, block_m=16, block_l=32)
    rank_grad(far, u, x, None, grad, segments=segments.items())
    rank_grad(near, u, x, None, grad, segments=segments.items())
    assert torch.equal(far, near)


TABLES = [
    (lengths, tail, dtype)
    for lengths in (*LENGTHS.values(), [0, 0, 0], [SEGMENT_ROWS] * 3, [1] * 300)
    for tail in (0, 5000)
    for dtype in (torch.int32, torch.int64)
]


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_tables(index):
    """Every row of a segment is in one entry; numbers of items and parts are as documented."""
    lengths, tail, dtype = TABLES[index]
    offsets, M = offsets_of(lengths, dtype), sum(lengths) + tail
    segments = Segments(offsets, M)
    ends = [0, *offsets.tolist()]
    for size in (16, 64, 128):
        table = segments.blocks(size)
        assert table.shape == (M // size + len(lengths), 3)
        assert table.dtype == torch.int32
        found = [tuple(entry) for entry in table.tolist() if entry[1] < entry[2]]
        assert found == [
            (g, first, ends[g + 1])
            for g in range(len(lengths))
            for first in range(ends[g], ends[g + 1], size)
        ]
    found, expected, before = [e for e in segments.items().tolist() if e[3]], [], 0
    for g in range(len(lengths)):
        firsts = list(range(ends[g], ends[g + 1], SEGMENT_ROWS)) or [ends[g]]
        for nth, first in enumerate(firsts):
            end = min(first + SEGMENT_ROWS, ends[g + 1])
            expected.append([g, first, end, len(firsts), nth, before])
        before += len(firsts) if len(firsts) > 1 else 0
    assert found == expected
    assert before <= 2 * M // SEGMENT_ROWS


def test_tables_need_no_values():
    """The host reads no offset, so a CUDA graph can capture this: fake tensors have no values."""
    with FakeTensorMode():
        segments = Segments(torch.zeros(128, dtype=torch.int32), 32_768)
        assert segments.blocks(64).shape == (32_768 // 64 + 128, 3)
        assert segments.items().shape == (32_768 // SEGMENT_ROWS + 128, 6)


def test_tables_are_made_once():
    segments = Segments(offsets_of(LENGTHS["uneven"]), 200)
    assert segments.blocks(16) is segments.blocks(16)
    assert segments.blocks(16) is not segments.blocks(32)
    assert segments.items() is segments.items()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_tiles_are_no_higher_than_a_segment(arch):
    shared = select_config.SHARED_BYTES.get(arch, select_config.DEFAULT_SHARED_BYTES)
    target = select_config.Target(arch, 132, shared)
    for choose in (select_config.shrink_config, select_config.rank_grad_config):
        of_many = choose(target, 2, 4096, 2048, 16, describable=True, segments=256)
        assert of_many.block_m <= 32
        of_one = choose(target, 2, 4096, 2048, 16, describable=True, segments=1)
        assert of_one.block_m >= of_many.block_m
    for segments in (1, 256):
        shrink = select_config.shrink_config(
            target, 2, 64, 8192, 16, describable=True, segments=segments
        )
        assert shrink.splits == 1
    assert select_config.shrink_config(target, 2, 64, 8192, 16, describable=True).splits > 1
    of_many = select_config.add_config(target, 2, 4096, 2048, 16, segments=256)
    assert of_many.block_m == min(c.block_m for c in select_config.add_candidates(target, 2, 16))
