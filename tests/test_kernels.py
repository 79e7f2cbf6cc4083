"""Each kernel alone, under the interpreter, with explicit configs, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import (
    BF16,
    FP16,
    FP32,
    INV_KEEP,
    KEEP,
    SCALE,
    check,
    gated_in_float64,
    rand,
    random_keep_bits,
)

from fused_lora.kernels import strategies
from fused_lora.kernels.config import (
    DIGITS,
    AddConfig,
    GatedConfig,
    GemmConfig,
    RankGradConfig,
    ShrinkConfig,
    SinglePassConfig,
    ThinPairConfig,
)
from fused_lora.kernels.gated import ACTIVATIONS, gated, gated_backward
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.single_pass import single_pass
from fused_lora.kernels.thin_pair import thin_pair
from fused_lora.ops import dropout
from support import by_default

# M, L, R, dtype, splits, descriptors, masked
SHRINK = [
    (63, 256, 16, BF16, 1, True, False),
    (63, 256, 16, BF16, 3, True, True),
    (17, 123, 4, BF16, 1, False, True),
    (64, 300, 100, FP16, 4, False, False),
    (1, 17, 1, FP32, 1, False, False),
    (40, 300, 300, FP32, 2, True, True),
]


@pytest.mark.parametrize("scale_u", [True, False])
@pytest.mark.parametrize("case", SHRINK, ids=str)
def test_shrink(case, scale_u):
    M, L, R, dtype, splits, descriptors, masked = case
    p, q = rand(M, L, dtype=dtype), rand(L, R, dtype=dtype)
    keep_bits, mask = random_keep_bits(M, L) if masked else (None, 1.0)
    u = torch.empty(M, R)
    config = ShrinkConfig(4, 2, descriptors, block_m=32, block_l=64, splits=splits)
    masking = {"keep_bits": keep_bits, "inv_keep": INV_KEEP} if masked else {}
    shrink(u, p, q, SCALE, config, scale_u=scale_u, **masking)
    check(u, (0.7 if scale_u else 1.0) * (p.double() * mask) @ q.double(), FP32)


# M, L, R, dtype, splits, step, descriptors, most columns of a program, keep count
SEEDED = [
    (63, 256, 16, BF16, 1, 128, False, 256, 58_982),
    (17, 123, 4, BF16, 1, 256, False, 256, 1),
    (37, 1000, 300, FP16, 3, 128, False, 128, 45_000),
    (1, 17, 1, FP32, 1, 128, False, 256, 32_768),
    (40, 520, 40, FP32, 2, 256, True, 32, 65_535),
    (33, 130, 8, FP16, 2, 64, False, 256, 58_982),  # the mask by a launch of its own
]


@pytest.mark.parametrize("case", SEEDED, ids=str)
def test_shrink_makes_the_mask(case):
    """The mask equals PyTorch's, padding included, and the result that of the given mask."""
    M, L, R, dtype, splits, step, descriptors, most, keep = case
    p, q, seed = rand(M, L, dtype=dtype), rand(L, R, dtype=dtype), torch.tensor(1234567)
    config = ShrinkConfig(
        4, 2, descriptors, block_m=16, block_l=step, splits=splits, max_block_r=most
    )
    expected = dropout.make_keep_bits(seed, M, L, keep)
    made, inv_keep = dropout.empty_keep_bits(M, L, seed.device), dropout.KEEP_ALL / keep
    u, of_given = torch.empty(M, R), torch.empty(M, R)
    p[dropped(expected, L)] = float("nan")
    masking = {"scale_u": False, "inv_keep": inv_keep}
    seeded = {"seed": seed, "keep_count": keep, "digits": DIGITS}
    shrink(u, p, q, SCALE, config, keep_bits=made, **seeded, **masking)
    assert torch.equal(made, expected)
    shrink(of_given, p, q, SCALE, config, keep_bits=expected, **masking)
    assert torch.equal(u, of_given)
    check(u, p.double().nan_to_num() @ q.double() * inv_keep, FP32)


def dropped(keep_bits, columns):
    return dropout.keep_mask(keep_bits, columns, torch.float32) == 0


def member_masks(n, rows, columns, keep=KEEP):
    """The seeds, stacked keep bits and float64 masks of ``n`` projections of one input."""
    seeds = torch.tensor([1234567, -5, 99][:n])
    keep_bits = torch.stack([dropout.make_keep_bits(seed, rows, columns, keep) for seed in seeds])
    masks = [dropout.keep_mask(bits, columns, torch.float64) for bits in keep_bits]
    return seeds, keep_bits, [mask * (dropout.KEEP_ALL / keep) for mask in masks]


# n, M, L, R, dtype, splits, step, most columns of a program, descriptors
SHRINK_OF_MEMBERS = [
    (2, 63, 256, 16, BF16, 1, 128, 256, True),
    (3, 37, 300, 5, FP16, 3, 128, 256, False),
    (3, 17, 123, 1, BF16, 1, 128, 256, False),
    (2, 40, 520, 300, FP32, 2, 256, 128, False),
    (3, 33, 130, 40, BF16, 2, 64, 32, False),  # the masks by launches of their own
]


@pytest.mark.parametrize("case", SHRINK_OF_MEMBERS, ids=str)
def test_shrink_of_members(case):
    """Masks are those of each seed bit for bit; results are those of a launch per member."""
    n, M, L, R, dtype, splits, step, most, descriptors = case
    p, q = rand(M, L, dtype=dtype), rand(n * R, L, dtype=dtype).t()
    config = ShrinkConfig(
        4, 2, descriptors, block_m=16, block_l=step, splits=splits, max_block_r=most
    )
    seeds, expected, masks = member_masks(n, M, L)
    made, u, alone = torch.empty_like(expected), torch.empty(M, n * R), torch.empty(M, n * R)
    options = {"scale_u": False, "inv_keep": INV_KEEP}
    shrink(u, p, q, SCALE, config, keep_bits=made, seed=seeds, keep_count=KEEP, **options)
    assert torch.equal(made, expected)
    for i, mask in enumerate(masks):
        own = slice(i * R, (i + 1) * R)
        shrink(alone[:, own], p, q[:, own], SCALE, config, keep_bits=expected[i], **options)
        check(u[:, own], (p.double() * mask) @ q[:, own].double(), FP32)
    assert torch.equal(u, alone)
    shrink(alone.fill_(torch.nan), p, q, SCALE, config, keep_bits=expected, **options)
    assert torch.equal(u, alone)


# M, N, L, R, dtype, adapter dtype, descriptors, transposed, masked, bias
GEMM = [
    (96, 80, 128, 16, BF16, BF16, True, True, False, True),
    (63, 72, 120, 8, BF16, FP32, True, True, False, False),
    (96, 128, 64, 16, BF16, BF16, True, False, True, False),
    (63, 123, 300, 100, FP16, FP16, False, True, False, True),
    (17, 123, 63, 24, FP16, FP32, False, False, True, False),
    (123, 63, 17, 1, FP32, FP32, False, True, False, True),
    (65, 65, 33, 200, FP32, FP32, False, False, True, True),
    (65, 296, 40, 136, FP16, FP16, True, False, True, True),
    (40, 520, 24, 16, BF16, FP32, True, True, False, True),
]


GEMM_BY_PROGRAMS = [
    (case, programs, overlap)
    for case in GEMM
    for programs in (0, 3)
    for overlap in ((False, True) if case[6] else (False,))
]


@pytest.mark.parametrize(("case", "programs", "overlap"), GEMM_BY_PROGRAMS, ids=str)
def test_lora_gemm(case, programs, overlap):
    M, N, L, R, dtype, adapter, descriptors, transposed, masked, has_bias = case
    p, u, v = rand(M, L, dtype=dtype), rand(M, R), rand(R, N, dtype=adapter)
    q = rand(N, L, dtype=dtype).t() if transposed else rand(L, N, dtype=dtype)
    bias = rand(N, dtype=dtype) if has_bias else None
    keep_bits, mask = random_keep_bits(M, N) if masked else (None, 1.0)
    o = torch.empty(M, N, dtype=dtype)
    columns = 64 if N < 100 or not overlap else 128 if N < 500 else 256
    config = GemmConfig(
        4, 2, descriptors, block_m=32, block_n=columns, block_l=32, group_m=2, programs=programs,
        overlap=overlap,
    )  # fmt: skip
    lora_gemm(
        o, p, q, u, v, SCALE, config,
        bias=bias, keep_bits=keep_bits, inv_keep=INV_KEEP if masked else 1.0,
    )  # fmt: skip
    low_rank = 0.7 * u.to(dtype).double() @ v.to(dtype).double() * mask
    expected = p.double() @ q.double() + low_rank + (bias.double() if has_bias else 0)
    check(o, expected, dtype)


@pytest.mark.parametrize("case", [(63, 123, 8, BF16), (17, 96, 100, FP16), (1, 1, 1, FP32)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("base", ["in place", "beside", "float32", "none"])
def test_lora_add(case, masked, base):
    M, N, R, dtype = case
    o, u, v, bias = rand(M, N, dtype=dtype), rand(M, R), rand(R, N, dtype=dtype), rand(N)
    keep_bits, mask = random_keep_bits(M, N) if masked else (None, 1.0)
    given = {
        "in place": o,
        "beside": rand(M, 2 * N, dtype=dtype)[:, N:],
        "float32": rand(M, N),
        "none": None,
    }[base]
    before = torch.zeros(M, N).double() if given is None else given.double()
    config = AddConfig(4, 1, block_m=32, block_n=64)
    inv_keep = INV_KEEP if masked else 1.0
    lora_add(o, u, v, SCALE, config, base=given, bias=bias, keep_bits=keep_bits, inv_keep=inv_keep)
    low_rank = 0.7 * u.to(dtype).double() @ v.double() * mask
    check(o, before + low_rank + bias.double(), dtype)


# n, M, N, R, dtype, adapter dtype, transposed
ADD_OF_MEMBERS = [
    (2, 63, 123, 8, BF16, FP32, False),
    (3, 17, 96, 100, FP16, FP16, True),
    (3, 70, 300, 5, BF16, BF16, False),
    (2, 3, 40, 1, FP32, FP32, True),
    (3, 33, 64, 300, FP32, FP32, False),
]


@pytest.mark.parametrize("case", ADD_OF_MEMBERS, ids=str)
def test_lora_add_of_members(case):
    n, M, N, R, dtype, adapter, transposed = case
    o, u = rand(M, N, dtype=dtype), rand(M, n * R, dtype=dtype)
    v = rand(N, n * R, dtype=adapter).t() if transposed else rand(n * R, N, dtype=adapter)
    _, keep_bits, masks = member_masks(n, M, N)
    config, bias = AddConfig(4, 1, block_m=32, block_n=64), rand(N)
    expected = o.double() + bias.double()
    for i, mask in enumerate(masks):
        own = slice(i * R, (i + 1) * R)
        expected += 0.7 * (u[:, own].double() @ v[own].to(dtype).double()) * mask
    masking = {"keep_bits": keep_bits, "inv_keep": INV_KEEP}
    beside = torch.empty_like(o)
    lora_add(beside, u, v, SCALE, config, base=o, bias=bias, **masking)
    lora_add(o, u, v, SCALE, config, base=o, bias=bias, **masking)
    check(o, expected, dtype)
    assert torch.equal(o, beside)


def test_lora_add_backwards_is_the_same():
    u, v, base = rand(200, 8), rand(8, 100), rand(200, 100)
    keep_bits, _ = random_keep_bits(200, 100)
    results = []
    for backwards in (False, True):
        config = AddConfig(4, 1, block_m=32, block_n=64, backwards=backwards)
        results.append(torch.empty(200, 100))
        lora_add(results[-1], u, v, SCALE, config, base=base, keep_bits=keep_bits)
    assert torch.equal(*results)


# M, L, R, dtype, output dtype, splits, descriptors, masked, transposed output
RANK_GRAD = [
    (300, 64, 16, BF16, FP32, 3, True, True, False),
    (300, 123, 8, BF16, BF16, 2, False, False, True),
    (63, 17, 1, FP32, FP32, 1, False, True, False),
    (123, 100, 100, FP16, FP32, 2, False, False, True),
    (64, 64, 300, FP32, FP32, 1, True, False, False),
]


@pytest.mark.parametrize("case", RANK_GRAD, ids=str)
def test_rank_grad(case):
    M, L, R, dtype, out_dtype, splits, descriptors, masked, transposed = case
    u, p = rand(M, R), rand(M, L, dtype=dtype)
    keep_bits, mask = random_keep_bits(M, L) if masked else (None, 1.0)
    o = torch.empty(L, R, dtype=out_dtype).t() if transposed else torch.empty(R, L, dtype=out_dtype)
    config = RankGradConfig(4, 2, descriptors, block_m=32, block_l=64, splits=splits)
    rank_grad(o, u, p, SCALE, config, keep_bits=keep_bits, inv_keep=INV_KEEP if masked else 1.0)
    check(o, 0.7 * u.to(dtype).double().t() @ (p.double() * mask), out_dtype)


# n, M, L, R, dtype, output dtype, splits, most rows of a program, descriptors
RANK_GRAD_OF_MEMBERS = [
    (2, 300, 64, 16, BF16, FP32, 3, 256, True),
    (3, 100, 123, 5, BF16, BF16, 2, 256, False),
    (3, 63, 17, 1, FP32, FP32, 1, 256, False),
    (2, 64, 70, 300, FP16, FP32, 1, 64, False),
]


@pytest.mark.parametrize("case", RANK_GRAD_OF_MEMBERS, ids=str)
def test_rank_grad_of_members(case):
    """Each member's gradient is that of a launch of its own."""
    n, M, L, R, dtype, out_dtype, splits, most, descriptors = case
    u, p = rand(M, n * R, dtype=dtype), rand(M, L, dtype=dtype)
    _, keep_bits, masks = member_masks(n, M, L)
    config = RankGradConfig(
        4, 2, descriptors, block_m=32, block_l=64, splits=splits, max_block_r=most
    )
    o, alone = torch.empty(n * R, L, dtype=out_dtype), torch.empty(n * R, L, dtype=out_dtype)
    rank_grad(o, u, p, None, config, keep_bits=keep_bits, inv_keep=INV_KEEP)
    for i, mask in enumerate(masks):
        own = slice(i * R, (i + 1) * R)
        masking = {"keep_bits": keep_bits[i], "inv_keep": INV_KEEP}
        rank_grad(alone[own], u[:, own], p, None, config, **masking)
        check(o[own], u[:, own].double().t() @ (p.double() * mask), out_dtype)
    assert torch.equal(o, alone)


# M, L, R, dtype, splits
THIN_PAIR = [
    (63, 72, 16, BF16, 1),
    (300, 520, 8, BF16, 3),
    (129, 123, 5, FP16, 2),
    (1, 1, 1, FP16, 4),
    (65, 64, 32, BF16, 9),
]


@pytest.mark.parametrize("case", THIN_PAIR, ids=str)
def test_thin_pair(case):
    M, L, R, dtype, splits = case
    p, q, u = rand(M, L, dtype=dtype), rand(L, R, dtype=dtype), rand(M, R, dtype=dtype)
    config = ThinPairConfig(4, 2, block_m=32, block_l=64, splits=splits)
    v, o = 0.7 * p.double() @ q.double(), 0.7 * p.double().t() @ u.double()
    for out_dtype in (FP32, dtype):
        wide = [torch.full((n, 2 * R), torch.nan, dtype=out_dtype)[:, :R] for n in (M, L)]
        thin_pair(*wide, p, q, u, SCALE, config)
        check(wide[0], v, out_dtype)
        check(wide[1], o, out_dtype)
        again = [torch.empty(M, R, dtype=out_dtype), torch.empty(R, L, dtype=out_dtype).t()]
        thin_pair(*again, p, q, u, SCALE, config)
        assert all(map(torch.equal, again, wide))


# M, N, L, R, dtype, adapter dtype, descriptors, transposed, masked, bias
SINGLE_PASS = [
    (16, 128, 128, 16, BF16, BF16, True, True, False, True),
    (17, 123, 63, 24, FP16, FP32, False, True, False, True),
    (64, 72, 72, 64, BF16, BF16, True, False, True, False),
    (1, 300, 17, 1, FP32, FP32, False, False, True, False),
]


@pytest.mark.parametrize("case", SINGLE_PASS, ids=str)
@pytest.mark.parametrize("scale_u", [False, True])
def test_single_pass(case, scale_u):
    M, N, L, R, dtype, adapter, descriptors, transposed, masked, has_bias = case
    p, z, v = rand(M, L, dtype=dtype), rand(L, R, dtype=dtype), rand(R, N, dtype=adapter)
    q = rand(N, L, dtype=dtype).t() if transposed else rand(L, N, dtype=dtype)
    bias = rand(N, dtype=dtype) if has_bias else None
    keep_bits, mask = random_keep_bits(M, N) if masked else (None, 1.0)
    o, u = torch.empty(M, N, dtype=dtype), torch.empty(M, R)
    config = SinglePassConfig(4, 2, descriptors, block_m=16, block_n=64, block_l=64)
    single_pass(
        o, u, p, q, z, v, torch.tensor(0.1), config,
        scale_u=scale_u, bias=bias, keep_bits=keep_bits, inv_keep=INV_KEEP if masked else 1.0,
    )  # fmt: skip
    low = p.double() @ z.double() * (0.1 if scale_u else 1)
    check(u, low, FP32)
    low_rank = (1 if scale_u else 0.1) * u.to(dtype).double() @ v.to(dtype).double() * mask
    check(o, p.double() @ q.double() + low_rank + (bias.double() if has_bias else 0), dtype)


# M, I, R, dtype, adapter dtype, masked
GATED = [
    (63, 123, 8, BF16, FP32, True),
    (17, 96, 100, FP16, FP16, True),
    (1, 1, 1, FP32, FP32, False),
    (40, 264, 300, FP32, FP32, True),
    (33, 80, 0, BF16, None, False),
    (70, 65, 0, FP16, None, False),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", by_default(GATED[1::2], GATED), ids=str)
def test_gated(case, activation):
    """Both directions; in place the same bits as out of place."""
    M, N, R, dtype, adapter, masked = case
    gate, up = rand(M, 2 * N, dtype=dtype).split(N, dim=1)
    dh, config = rand(M, N, dtype=dtype), GatedConfig(4, 1, block_m=16, block_n=64)
    operands, wide = {}, dh.double()
    if R:
        u, v = rand(M, R, dtype=dtype), rand(R, N, dtype=adapter)
        keep_bits, mask = random_keep_bits(M, N) if masked else (None, 1.0)
        operands = {"u": u, "v": v, "scale": SCALE, "keep_bits": keep_bits}
        operands["inv_keep"] = INV_KEEP if masked else 1.0
        wide = wide + 0.7 * u.double() @ v.to(dtype).double() * mask
    expected = gated_in_float64(gate, up, wide, activation)
    h = torch.empty(M, N, dtype=dtype)
    gated(h, gate, up, config, activation=activation)
    check(h, expected[0], dtype)
    results = {name: torch.empty(M, N, dtype=dtype) for name in ("h", "dgate", "dup")}
    gated_backward(gate, up, dh, config, activation=activation, **results, **operands)
    for result, value in zip(results.values(), expected, strict=True):
        check(result, value, dtype)
    gated_backward(gate, up, dh, config, activation=activation, **operands)
    assert all(map(torch.equal, (dh, gate, up), results.values()))


@pytest.mark.filterwarnings("ignore:.*encountered")  # of NumPy, which runs the kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [1e4, -1e4, torch.inf, -torch.inf, torch.nan, 0.0])
def test_gated_at_the_ends(value, activation):
    """Where a formula could overflow, all results are PyTorch's, NaN included."""
    gate, up, dh = torch.tensor([[[value], [1.5], [2.0]]]).expand(8, 3, 16).to(BF16).unbind(1)
    h, dgate, dup = gated_in_float64(gate, up, dh, activation)
    results = [torch.empty(8, 16, dtype=BF16) for _ in range(4)]
    config = GatedConfig(4, 1, block_m=16, block_n=32)
    gated(results[0], gate, up, config, activation=activation)
    given = dict(zip(("h", "dgate", "dup"), results[1:], strict=True))
    gated_backward(gate, up, dh, config, activation=activation, **given)
    for result, expected in zip(results, (h, h, dgate, dup), strict=True):
        torch.testing.assert_close(result, expected.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*encountered")
def test_gated_writes_zero_where_relu_stops_an_infinite_gradient():
    gate, up, dh = torch.tensor([[-1.0, 2.0]]), torch.full((1, 2), 2.0), torch.full((1, 2), 1e38)
    gated_backward(gate, up, dh * 2, GatedConfig(4, 1), activation="relu")
    assert gate.tolist() == [[0.0, torch.inf]]


def test_tickets_serve_any_number_of_launches():
    """Tickets are zero again after each launch, and repeated launches give the same bits."""
    tickets = torch.zeros(40, dtype=torch.int32)
    p, q, u = rand(70, 300, dtype=BF16), rand(300, 300, dtype=BF16), rand(70, 300)
    thin = ShrinkConfig(4, 2, block_m=16, block_l=32, splits=5, max_block_r=128)
    grad = RankGradConfig(4, 2, block_m=16, block_l=64, splits=3, max_block_r=64)
    assert (thin.blocks(70, 300, 300), grad.blocks(300, 300, 300)) == (15, 25)
    results = []
    for _ in range(2):
        S, dA = torch.empty(70, 300), torch.empty(300, 300)
        shrink(S, p, q, SCALE, thin, tickets=tickets)
        rank_grad(dA, u, p, SCALE, grad, tickets=tickets)
        assert not tickets.any()
        results.append((S, dA))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    check(results[0][0], 0.7 * p.double() @ q.double(), FP32)
    check(results[0][1], 0.7 * u.to(BF16).double().t() @ p.double(), FP32)


@pytest.mark.parametrize("case", [(37, 100, 58_982), (1, 1, 1), (8, 65, 32_768), (3, 300, 65_535)])
def test_dropout_mask_equals_pytorchs(case):
    rows, columns, keep = case
    seed = dropout.draw_seed(torch.get_default_device())
    keep_bits = dropout.empty_keep_bits(rows, columns, seed.device)
    strategies.dropout_mask(keep_bits, seed, keep, DIGITS)
    assert torch.equal(keep_bits, dropout.make_keep_bits(seed, rows, columns, keep))


def test_partial_sums_are_rounded_once():
    """A bfloat16 result of several splits is the rounded float32 result of the same splits."""
    u, p = torch.randn(300, 8), torch.randn(300, 96).to(BF16)
    config = RankGradConfig(4, 2, block_m=32, block_l=64, splits=3)
    wide, narrow = torch.empty(8, 96), torch.empty(8, 96, dtype=BF16)
    rank_grad(wide, u, p, SCALE, config)
    rank_grad(narrow, u, p, SCALE, config)
    assert torch.equal(narrow, wide.to(BF16))


def test_rows_two_to_the_31_elements_apart(tmp_path):
    """Offsets beyond 2³¹ do not overflow: the rows of a sparse file are 2²⁷ elements apart."""
    M, pitch = 17, 2**27
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=M * pitch, dtype=BF16)
    far = flat.view(M, pitch)[:, :32]
    near = torch.randn(M, 32).to(BF16)
    far.copy_(near)
    u, config = torch.randn(M, 8), RankGradConfig(4, 2, block_m=16, block_l=32)
    got, expected = torch.empty(8, 32), torch.empty(8, 32)
    rank_grad(got, u, far, SCALE, config)
    rank_grad(expected, u, near, SCALE, config)
    assert torch.equal(got, expected)
    q = torch.randn(M, 8).to(BF16)
    far_q, p = flat.view(M, pitch)[:, :8], torch.randn(4, M).to(BF16)
    far_q.copy_(q)
    config = ShrinkConfig(4, 2, block_m=16, block_l=16)
    got, expected = torch.empty(4, 8), torch.empty(4, 8)
    shrink(got, p, far_q, SCALE, config)
    shrink(expected, p, q, SCALE, config)
    assert torch.equal(got, expected)
    far.copy_(near)
    got, expected = (torch.empty(M, 32, dtype=BF16) for _ in range(2))
    config = GatedConfig(4, 1, block_m=16, block_n=32)
    gated(got, far, near, config, activation="silu")
    gated(expected, near, near, config, activation="silu")
    assert torch.equal(got, expected)
    gated(far, near, near, config, activation="silu")
    assert torch.equal(far, expected)
