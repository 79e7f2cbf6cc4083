"""The layer over rows sorted into segments, against one call per segment and float64."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import Segments, explain, fused_lora_linear
from fused_lora.ops import dropout, segmented_triton
from support import by_default, needs_triton, relative_rms

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(FP32, None), (FP64, None), (BF16, FP32), (BF16, None), (FP16, FP32), (FP16, None)]
SIZES = (10, 0, 25, 1, 4, 16)  # rows of the segments
REST = 5  # rows that belong to none
K, N = 72, 80


def draw(dtype=FP32, adapter=None, *, weights="one", adapters="list", ranks=None, K=K, N=N) -> dict:
    """Arguments of a call; the adapters of a stack have one rank."""
    G = len(SIZES)
    ranks = ranks or ([8, 8, 3, 16, 1, 12] if adapters == "list" else [8] * G)
    stack = (G,) if weights == "stack" else ()
    A = [(torch.randn(R, K) / K**0.5).to(adapter or dtype) for R in ranks]
    B = [(torch.randn(N, R) / R**0.5).to(adapter or dtype) for R in ranks]
    if adapters == "stack":
        A, B = torch.stack(A).requires_grad_(), torch.stack(B).requires_grad_()
    else:
        A, B = ([t.requires_grad_() for t in half] for half in (A, B))
        A[2] = B[2] = None
    return {
        "x": torch.randn(sum(SIZES) + REST, K).to(dtype).requires_grad_(),
        "weight": (torch.randn(*stack, N, K) / K**0.5).to(dtype),
        "lora_A": A,
        "lora_B": B,
        "bias": torch.randn(*stack, N).to(dtype).requires_grad_(),
        "scaling": [0.5, 1.0, 2.0, 3.0, 4.0, 64.0],
    }


def segments(sizes=SIZES, rows=None, dtype=torch.int32) -> Segments:
    return Segments(torch.tensor(sizes).cumsum(0).to(dtype), rows)


def leaves(call: dict) -> dict[str, torch.Tensor]:
    found = {"x": call["x"], "bias": call["bias"]}
    for name in ("lora_A", "lora_B"):
        value = call[name]
        each = {name: value} if isinstance(value, torch.Tensor) else enumerate(value)
        each = each.items() if isinstance(each, dict) else ((f"{name} {g}", t) for g, t in each)
        found |= {key: t for key, t in each if t is not None}
    return {key: t for key, t in found.items() if t is not None and t.requires_grad}


def results(function, call: dict, **options) -> dict:
    """The output and every gradient, by name."""
    torch.manual_seed(5)
    y = function(**call, **options)
    torch.manual_seed(6)
    dy = torch.randn(y.shape).to(y.dtype)
    wanted = leaves(call)
    found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach()} | dict(zip((f"d {name}" for name in wanted), found, strict=True))


def together(**call) -> torch.Tensor:
    return fused_lora_linear(**call, segments=segments())


def one_by_one(x, weight, lora_A, lora_B, bias, scaling, impl="auto") -> torch.Tensor:
    """One call for each segment that has rows."""
    parts, first = [], 0
    for g, size in enumerate(SIZES):
        xs, first = x[first : first + size], first + size
        W = weight[g] if weight.dim() == 3 else weight
        b = bias[g] if bias.dim() == 2 else bias
        if size and lora_A[g] is None:
            parts.append(torch.nn.functional.linear(xs, W, b))
        elif size:
            args = xs, W, lora_A[g], lora_B[g], b
            parts.append(fused_lora_linear(*args, scaling=scaling[g], impl=impl))
    rest = x[first:]
    if weight.dim() == 3:
        parts.append(rest.new_zeros((len(rest), N)))
    else:
        parts.append(torch.nn.functional.linear(rest, weight, bias))
    return torch.cat(parts)


def in_float64(call: dict) -> dict:
    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.detach().double().requires_grad_(value.requires_grad)
        return [wide(part) for part in value] if isinstance(value, list) else value

    return {name: wide(value) for name, value in call.items()}


KINDS = [("one", "list"), ("one", "stack"), ("stack", "list"), ("stack", "stack")]
kinds = pytest.mark.parametrize("kind", KINDS, ids="-".join)


@kinds
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_equals_one_call_per_segment(dtypes, kind):
    dtype, adapter = dtypes
    call = draw(dtype, adapter, weights=kind[0], adapters=kind[1])
    got, separate = results(together, call), results(one_by_one, call)
    eager, exact = (
        results(one_by_one, call, impl="reference"),
        results(one_by_one, in_float64(call)),
    )
    for name, value in got.items():
        if exact[name] is None:  # no row
            assert value is None, name
            continue
        assert value.dtype == separate[name].dtype, name
        bound = {FP64: 1e-14, FP32: 1e-6}.get(dtype) or 2 * relative_rms(eager[name], exact[name])
        assert relative_rms(value, exact[name]) <= bound, name


@needs_triton
@kinds
@pytest.mark.parametrize("strategy", ["split", "addmm"])
@pytest.mark.parametrize("p", by_default([0.3], [0.0, 0.3]))
@pytest.mark.parametrize(
    "dtypes", by_default([(BF16, FP32)], [(FP32, None), (BF16, FP32), (FP16, None)]), ids=str
)
def test_kernels(dtypes, p, strategy, kind):
    """With dropout: the masks of PyTorch's path."""
    dtype, adapter = dtypes
    call = draw(dtype, adapter, weights=kind[0], adapters=kind[1]) | {"dropout_p": p}
    if strategy == "split" and kind[0] == "one":  # has no rows of no segment
        call["x"] = call["x"].detach()[:-REST].requires_grad_()
    got = results(together, call, impl=f"triton:{strategy}")
    torchs = results(together, call, impl="torch")
    eager = results(together, call, impl="reference")
    exact = results(together, in_float64(call), impl="reference")
    for name, value in got.items():
        if torchs[name] is None:
            assert value is None, name
            continue
        assert value.dtype == torchs[name].dtype, name
        assert value.shape == torchs[name].shape, name
        bound = 1e-6 if dtype == FP32 else 2 * relative_rms(eager[name], exact[name])
        assert relative_rms(value, exact[name]) <= bound, name


@needs_triton
@pytest.mark.parametrize("rank", [1, 100])
@pytest.mark.parametrize("sizes", [SIZES, (sum(SIZES),)], ids=["six", "one"])
def test_kernels_of_any_rank(sizes, rank):
    G = len(sizes)
    call = {
        "x": torch.randn(sum(SIZES) + REST, K, requires_grad=True),
        "weight": torch.randn(G, N, K) / K**0.5,
        "lora_A": (torch.randn(G, rank, K) / K**0.5).requires_grad_(),
        "lora_B": (torch.randn(G, N, rank) / rank**0.5).requires_grad_(),
        "bias": None,
        "scaling": 2.0,
        "segments": segments(sizes),
        "dropout_p": 0.3,
    }
    got = results(fused_lora_linear, call, impl="triton")
    exact = results(fused_lora_linear, in_float64(call), impl="reference")
    for name, value in got.items():
        assert relative_rms(value, exact[name]) <= 1e-6, name


@needs_triton
@kinds
def test_kernels_keep_nan_in_its_segment(kind):
    call = draw(FP32, weights=kind[0], adapters="stack")
    before = results(together, call, impl="triton")
    with torch.no_grad():
        call["x"][10:35] = float("nan")
        call["lora_A"][2] = float("nan")
    after = results(together, call, impl="triton")
    rows = [*range(10), *range(35, sum(SIZES) + REST)]
    others = [g for g in range(len(SIZES)) if g != 2]
    for name, keep in {"y": rows, "d x": rows, "d lora_A": others, "d lora_B": others}.items():
        assert torch.equal(after[name][keep], before[name][keep]), name


@pytest.mark.parametrize("adapters", ["list", "stack"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_bits_are_those_of_single_calls(dtype, adapters):
    """Of one weight, from four rows on; experts' thin products are in float32 on a CPU."""
    call = draw(dtype, FP32, adapters=adapters)
    got, separate = results(together, call), results(one_by_one, call)
    for g, size in enumerate(SIZES):
        if size < 4 or (adapters == "list" and g == 2):
            continue
        names = (f"d lora_A {g}", f"d lora_B {g}")
        if adapters == "stack":
            pairs = [(got[f"d lora_{n}"][g], separate[f"d lora_{n}"][g]) for n in "AB"]
        else:
            pairs = [(got[name], separate[name]) for name in names]
        for value, expected in pairs:
            assert torch.equal(value, expected), g


@kinds
@pytest.mark.parametrize("p", [0.3, [0.1, 0.2, 0.3, 0.0, 0.1, 0.6]], ids=str)
def test_dropout_equals_the_reference(p, kind):
    call = draw(FP64, weights=kind[0], adapters=kind[1]) | {"dropout_p": p}
    got = results(together, call)
    expected = results(together, call, impl="reference")
    for name, value in got.items():
        if expected[name] is None:
            assert value is None
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_a_mask_belongs_to_the_place_before_sorting():
    """Sorting rows in another order moves the results with them."""
    call = draw(FP64, adapters="stack") | {"dropout_p": 0.4}
    first = segments()
    torch.manual_seed(3)
    y = fused_lora_linear(**call, segments=first)
    rows = torch.cat([torch.randperm(10), torch.arange(10, sum(SIZES) + REST)])
    torch.manual_seed(3)
    moved = fused_lora_linear(**call | {"x": call["x"][rows]}, segments=segments(rows=rows))
    torch.testing.assert_close(moved, y[rows], rtol=1e-13, atol=1e-13)


def test_masks_are_those_of_unsorted_rows():
    x = torch.randn(40, K, dtype=FP64)
    A, B = torch.randn(2, 4, K, dtype=FP64), torch.randn(2, N, 4, dtype=FP64)
    weight, rows = torch.zeros(N, K, dtype=FP64), torch.randperm(40)
    torch.manual_seed(3)
    split = Segments(torch.tensor([15, 40]), rows)
    y = fused_lora_linear(x, weight, A, B, dropout_p=0.3, segments=split)
    torch.manual_seed(3)
    count = dropout.keep_count(0.3)
    bits = dropout.make_keep_bits(dropout.draw_seed(x.device), 40, K, count)
    dropped = x * dropout.keep_mask(bits, K, FP64)[rows] * (dropout.KEEP_ALL / count)
    expected = torch.cat([dropped[:15] @ A[0].t() @ B[0].t(), dropped[15:] @ A[1].t() @ B[1].t()])
    torch.testing.assert_close(y, expected)


@kinds
@pytest.mark.parametrize("where", ["x", "lora_A", "lora_B", "dy"])
def test_nan_stays_in_its_segment(where, kind):
    call = draw(FP32, weights=kind[0], adapters=kind[1])
    before = results(together, call)
    rows = slice(10, 35)  # of segment 2
    if kind[1] == "list" and where.startswith("lora"):
        pytest.skip("segment 2 has no adapter")
    with torch.no_grad():
        if where in ("lora_A", "lora_B"):
            call[where][2].fill_(float("nan"))
        elif where == "x":
            call["x"][rows] = float("nan")
    if where == "dy":
        y = together(**call)
        torch.manual_seed(6)
        dy = torch.randn(y.shape)
        dy[rows] = float("nan")
        wanted = leaves(call)
        found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        after = {"y": y} | dict(zip((f"d {name}" for name in wanted), found, strict=True))
    else:
        after = results(together, call)
    others = [g for g in range(len(SIZES)) if g != 2]
    for name, value in after.items():
        if value is None or name == "d bias":
            continue
        if name in ("y", "d x"):
            keep = torch.ones(len(value), dtype=torch.bool)
            keep[rows] = False
        elif kind[1] == "stack":
            keep = others
        else:
            keep = ... if not name.endswith(" 2") else slice(0, 0)
        assert torch.equal(value[keep], before[name][keep]), name


def test_a_segment_without_rows():
    """None in a sequence, so that its optimizer skips it; exactly zero in a stack."""
    assert results(together, draw(adapters="list"))["d lora_A 1"] is None
    got = results(together, draw(adapters="stack"))
    for name in ("d lora_A", "d lora_B"):
        assert not got[name][1].any()
        assert got[name][0].any()


def test_rows_of_no_segment():
    call = draw(weights="stack")
    with torch.no_grad():
        call["x"][-REST:] = float("nan")
    got = results(together, call)
    assert not got["y"][-REST:].any()
    assert not got["d x"][-REST:].any()
    for name, value in got.items():
        assert value is None or value.isfinite().all(), name


@kinds
def test_second_derivatives(kind):
    call = draw(FP64, weights=kind[0], adapters=kind[1], K=9, N=7)
    wanted = list(leaves(call).values())

    def penalty(function):
        torch.manual_seed(5)
        y = function(**call)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True, allow_unused=True)
        loss = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    def eagerly(**call):
        return together(**call, impl="reference")

    for a, b in zip(penalty(together), penalty(eagerly), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    call = draw(FP64, adapters="stack", K=5, N=4)
    names = ("x", "lora_A", "lora_B", "bias")
    rest = {name: value for name, value in call.items() if name not in names}

    def function(*tensors):
        torch.manual_seed(5)
        return together(**rest, **dict(zip(names, tensors, strict=True)), dropout_p=0.3)

    assert torch.autograd.gradcheck(function, [call[name] for name in names])


def test_batched_gradients():
    call = draw(FP64)
    y = together(**call)
    dys = torch.randn(3, *y.shape, dtype=FP64)
    wanted = [call["x"], call["lora_A"][0], call["bias"]]
    batched = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        single = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    call = draw(FP32) | {"dropout_p": 0.3}

    def again(**call):
        x = call.pop("x")
        return checkpoint(lambda x: together(x=x, **call), x, use_reentrant=reentrant)

    got, expected = results_of_leaves(again, call), results_of_leaves(together, call)
    for name, value in got.items():
        assert (value is None) == (expected[name] is None)
        assert value is None or torch.equal(value, expected[name]), name


def results_of_leaves(function, call: dict) -> dict:
    """As :func:`results`, by ``backward``: reentrant checkpoints refuse ``autograd.grad``."""
    wanted = leaves(call)
    for t in wanted.values():
        t.grad = None
    torch.manual_seed(5)
    y = function(**call)
    torch.manual_seed(6)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach()} | {name: t.grad for name, t in wanted.items()}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_autocast(dtype):
    call = draw(dtype, FP32)
    with torch.autocast("cpu", BF16):
        got, separate = results(together, call), results(one_by_one, call)
    for name, value in got.items():
        if value is not None:
            assert value.dtype == separate[name].dtype, name
            assert relative_rms(value, separate[name].double()) < 0.02, name


def test_compiled_code_breaks_its_graph_there():
    call = draw()
    torch.manual_seed(5)
    y = torch.compile(lambda x: together(**call | {"x": x}) + 1, backend="eager")(call["x"])
    torch.testing.assert_close(y, together(**call) + 1)


def test_flops_are_those_of_single_calls():
    call = draw(BF16)  # in float32 a single row is added by an operator that the counter leaves out
    counts = []
    for function in (together, one_by_one):
        with FlopCounterMode(display=False) as counter:
            results(function, call)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_leading_dimensions_and_strides():
    call = draw(FP64, adapters="stack")
    expected = results(together, call)
    for x in (call["x"].detach().view(1, -1, K), call["x"].detach().t().contiguous().t()):
        again = call | {"x": x.requires_grad_()}
        got = results(together, again)
        torch.testing.assert_close(got["y"].view(-1, N), expected["y"])
    transposed = call["lora_B"].detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    got = results(together, call | {"lora_B": transposed.requires_grad_()})
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name])


def test_only_what_is_asked_for_is_kept_and_computed():
    call = draw(FP64, adapters="stack")
    for t in leaves(call).values():
        t.requires_grad_(False)
    y = together(**call)
    assert not y.requires_grad
    call["lora_B"].requires_grad_()
    got = results(together, call)
    y = together(**call)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert call["x"].data_ptr() not in kept
    assert call["weight"].data_ptr() not in kept
    torch.manual_seed(6)
    dy = torch.randn(y.shape).to(FP64).requires_grad_()
    (dB,) = torch.autograd.grad(y, [call["lora_B"]], dy, create_graph=True)
    torch.testing.assert_close(dB, got["d lora_B"])
    (ddy,) = torch.autograd.grad(dB.square().sum(), [dy])
    S = torch.einsum("mk,grk->gmr", call["x"], call["lora_A"])
    first = 0
    for g, size in enumerate(SIZES):
        rows = slice(first, first := first + size)
        s = call["scaling"][g] * S[g, rows]
        torch.testing.assert_close(ddy[rows], 2 * s @ dB[g].t())


@pytest.mark.parametrize("sizes", [(64,), (1,) * 64, (0, 64, 0), (0, 0), (39,) + (1,) * 25])
def test_any_sizes(sizes):
    G, M = len(sizes), sum(sizes)
    x = torch.randn(M, 24, dtype=FP64, requires_grad=True)
    A = torch.randn(G, 4, 24, dtype=FP64, requires_grad=True)
    B = torch.randn(G, 16, 4, dtype=FP64, requires_grad=True)
    weight = torch.randn(G, 16, 24, dtype=FP64)
    y = fused_lora_linear(x, weight, A, B, segments=segments(sizes, dtype=torch.int64))
    owner = torch.repeat_interleave(torch.arange(G), torch.tensor(sizes))
    delta = weight + B @ A
    expected = torch.einsum("mk,mnk->mn", x, delta[owner])
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, (x, A, B), dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_scale_of_tensors():
    call = draw(FP64)
    expected = results(together, call)
    got = results(together, call | {"scaling": torch.tensor(call["scaling"], dtype=FP64)})
    for name, value in got.items():
        assert (value is None) == (expected[name] is None)
        if value is not None:
            torch.testing.assert_close(value, expected[name])


def test_a_scale_may_change_before_backward():
    call = draw(FP64, adapters="stack") | {"scaling": torch.tensor(2.0, dtype=FP64)}
    expected = results(together, call)["d lora_A"]
    torch.manual_seed(5)
    y = together(**call)
    call["scaling"].fill_(7.0)
    torch.manual_seed(6)
    (dA,) = torch.autograd.grad(y, [call["lora_A"]], torch.randn(y.shape).to(FP64))
    torch.testing.assert_close(dA, expected)


def test_a_bias_of_all_experts_gets_nothing_from_rows_of_none():
    call = draw(FP64, weights="stack") | {"bias": torch.randn(N, dtype=FP64, requires_grad=True)}
    for impl in ("torch", "reference"):
        y = together(**call, impl=impl)
        (db,) = torch.autograd.grad(y.sum(), [call["bias"]])
        torch.testing.assert_close(db, torch.full((N,), float(sum(SIZES)), dtype=FP64))


def test_transforms():
    call = draw(FP64, adapters="stack")
    y, dA = torch.func.vjp(lambda A: together(**call | {"lora_A": A}), call["lora_A"])
    expected = together(**call)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(expected.sum(), [call["lora_A"]])
    torch.testing.assert_close(dA(torch.ones_like(y)), found)
    xs = torch.stack([call["x"].detach(), 2 * call["x"].detach()])
    ys = torch.func.vmap(lambda x: together(**call | {"x": x}))(xs)
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(y, together(**call | {"x": x}))
    with pytest.raises(ValueError, match=r"expected no torch\.func transform"):
        torch.func.grad(lambda x: together(**call | {"x": x}, impl="triton").sum())(call["x"])


@needs_triton
@pytest.mark.parametrize("kind", ["x", "weight", "both"])
def test_kernels_read_any_strides(kind):
    call = draw(FP32, weights="stack", adapters="stack")
    expected = results(together, call, impl="torch")
    if kind != "weight":
        wide = torch.randn(len(call["x"]), K + 1)
        wide[:, 1:] = call["x"].detach()
        call["x"] = wide[:, 1:].requires_grad_()
    if kind != "x":
        wide = torch.randn(len(SIZES), N, K + 1)
        wide[..., 1:] = call["weight"]
        call["weight"] = wide[..., 1:]
    got = results(together, call, impl="triton")
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3)


@needs_triton
def test_kernels_have_one_dropout():
    """That of segments with an adapter; PyTorch's operators compute several."""
    call = draw(adapters="list")  # segment 2 has no adapter
    results(together, call | {"dropout_p": [0.3, 0.3, 0.1, 0.3, 0.3, 0.3]}, impl="triton")
    several = call | {"dropout_p": [0.3, 0.3, 0.3, 0.0, 0.3, 0.3]}
    with pytest.raises(ValueError, match="with one probability, got several"):
        together(**several, impl="triton")
    args = call["x"], call["weight"], call["lora_A"]
    with pytest.raises(ValueError, match="cannot run here"):
        explain(*args, segments=segments(), impl="triton", dropout_p=several["dropout_p"])


@needs_triton
def test_a_gradient_of_the_kernels_keeps_no_others():
    found = results(together, draw(adapters="list"), impl="triton")
    for name, value in found.items():
        if value is not None and "lora" in name:
            assert value.untyped_storage().nbytes() == value.nbytes, name


def test_without_in_features_and_on_the_meta_device():
    A, B, weight = torch.ones(2, 1, 0), torch.ones(2, 3, 1), torch.ones(3, 0)
    two = Segments(torch.tensor([1, 4]))
    assert not fused_lora_linear(torch.ones(4, 0), weight, A, B, segments=two).any()
    meta = [
        torch.ones(*shape, device="meta") for shape in ((4, 5), (2, 3, 5), (2, 1, 5), (2, 3, 1))
    ]
    y = fused_lora_linear(*meta, segments=Segments(torch.tensor([1, 4], device="meta")))
    assert (y.shape, y.device.type) == ((4, 3), "meta")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segments_keep_their_own_offsets(dtype):
    offsets, rows = torch.tensor([2, 4], dtype=dtype), torch.arange(4)
    kept = Segments(offsets, rows)
    offsets.zero_(), rows.zero_()
    assert kept.offsets.tolist() == [2, 4]
    assert kept.rows.tolist() == [0, 1, 2, 3]
    with torch.device("meta"):  # the default device is not that of the tensors
        Segments(torch.tensor([2], device="cpu"), torch.tensor([1, 0], device="cpu"))


def test_a_bias_may_change_before_backward():
    call = draw(FP64)
    y = together(**call)
    with torch.no_grad():
        call["bias"].mul_(2)
    torch.autograd.grad(y.sum(), [call["x"], call["bias"]])


def test_explain():
    call = draw(adapters="stack", weights="stack")
    args = call["x"], call["weight"], call["lora_A"]
    decision = explain(*args, segments=segments())
    assert (decision.impl, decision.reason) == ("torch", "the tensors are on a cpu device")
    assert explain(*args, segments=segments(), impl="reference").impl == "reference"
    with pytest.raises(TypeError, match="expected lora_A"):
        explain(call["x"], call["weight"], None, segments=segments())
    with pytest.raises(ValueError, match=f"expected lora_A of {len(SIZES)} segments, got 2"):
        explain(call["x"], call["weight"], list(call["lora_A"][:2]), segments=segments())


@needs_triton
def test_explain_kernels():
    call = draw(adapters="list")
    args = call["x"], call["weight"], call["lora_A"]
    decision = explain(*args, segments=segments(), impl="triton")
    assert (decision.impl, decision.forward, decision.backward) == ("triton", "addmm", "addmm")
    assert decision.reason.startswith("segments: there may be rows of no segment")
    args = call["x"][:-REST], *args[1:]
    decision = explain(*args, segments=segments(), impl="triton")
    assert (decision.impl, decision.forward, decision.backward) == ("triton", "split", "split")
    for name in ("split", "addmm"):
        decision = explain(*args, segments=segments(), impl=f"triton:{name}")
        assert (decision.forward, decision.backward) == (name, name)
        assert decision.reason == "segments: requested"
    experts = call["x"], draw(weights="stack")["weight"], call["lora_A"]
    assert explain(*experts, segments=segments(), impl="triton").forward == "split"


@needs_triton
def test_one_launch_of_a_common_weight_needs_segments_of_all_rows():
    call = draw(adapters="list")
    message = re.escape("rows of no segment: Segments(..., whole=True) says that there are none")
    with pytest.raises(ValueError, match=message):
        together(**call, impl="triton:split")
    call["x"] = call["x"][:-REST]
    whole = Segments(torch.tensor(SIZES).cumsum(0), whole=True)
    fused_lora_linear(**call, segments=whole, impl="triton:split")


@needs_triton
@pytest.mark.parametrize("strategy", ["split", "addmm"])
def test_the_gradient_of_a_stack_has_its_strides(strategy):
    """PEFT's Parameter ``(out, rank · experts)`` has the expert fastest: nothing is copied."""
    call = draw(FP32, weights="stack", adapters="stack")
    B = call["lora_B"].detach().permute(1, 2, 0).contiguous()
    call["lora_B"] = B.permute(2, 0, 1).requires_grad_()
    expected = results(together, call, impl="torch")
    got = results(together, call, impl=f"triton:{strategy}")
    assert got["d lora_B"].permute(1, 2, 0).is_contiguous()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3)


def wrong():
    G = len(SIZES)
    good = draw()
    yield {"segments": [3, 4]}, "expected segments to be Segments, got list"
    yield {"impl": "triton:seeded"}, "expected triton:split or triton:addmm for segments"
    yield {"impl": "triton:addmm", "dropout_p": [0.1, 0.2] * 3}, "cannot run here"
    yield {"impl": "tritn"}, "expected impl to be one of"
    yield {"lora_A": good["lora_A"][:2]}, f"expected lora_A of {G} segments, got 2"
    yield {"lora_A": torch.randn(8, K)}, "expected lora_A of three dimensions"
    stack = torch.randn(G, N, 8)
    yield {"lora_B": stack}, "expected lora_A and lora_B both as stacks or both as sequences"
    yield {"lora_A": 3}, "expected lora_A to be a Tensor or a sequence of them, got int"
    yield (
        {"lora_B": [None, *good["lora_B"][1:]]},
        "segment 0: expected lora_A and lora_B, or neither",
    )
    yield {"lora_A": [torch.randn(8, K + 1), *good["lora_A"][1:]]}, "segment 0: expected lora_A of"
    yield {"weight": torch.randn(2, N, K)}, f"expected weight of shape (out, in) or ({G}, out, in)"
    yield {"weight": torch.randn(N, K, requires_grad=True)}, "expected a frozen weight"
    yield {"bias": torch.randn(3)}, f"expected bias of shape ({N},) or ({G}, {N}), got (3,)"
    yield {"scaling": [1.0]}, f"expected scaling of {G} segments, got 1"
    yield {"scaling": "1"}, "expected scaling"
    yield {"dropout_p": [0.1]}, f"expected dropout_p of {G} segments, got 1"
    yield {"dropout_p": 1.0}, "expected dropout in [0, 1), got 1.0"
    yield {"x": torch.randn(3, K)}, "expected offsets up to x's 3 rows, got 56"
    yield {"x": torch.randn(61, K, dtype=BF16)}, "expected x in the weight's dtype"
    whole = Segments(torch.tensor(SIZES).cumsum(0), whole=True)
    yield {"segments": whole}, "expected segments of all 61 rows, as whole=True says, got 56"
    rows = torch.arange(60)
    yield {"segments": segments(rows=rows)}, "expected segments of 61 rows, as x has, got 60"


@pytest.mark.parametrize("case", list(wrong()), ids=lambda case: case[1])
def test_wrong_arguments(case):
    changes, message = case
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fused_lora_linear(**{"segments": segments()} | draw() | changes)


@pytest.mark.parametrize(
    ("offsets", "rows", "message"),
    [
        ([1, 2], None, "expected offsets to be a Tensor, got list"),
        (torch.tensor([1.0]), None, "expected offsets in int32 or int64, got torch.float32"),
        (torch.tensor([[1]]), None, "expected offsets of one dimension, got shape (1, 1)"),
        (torch.tensor([], dtype=torch.int64), None, "expected offsets of at least one segment"),
        (torch.tensor([3, 2]), None, "that do not fall, got [3, 2]"),
        (torch.tensor([-1, 2]), None, "expected offsets from 0 on"),
        (torch.tensor([2]), torch.tensor([0, 2]), "to be a permutation of 0 to 1"),
        (torch.tensor([2]), torch.tensor([0, 1]).int(), "expected rows in int64, got torch.int32"),
    ],
)
def test_wrong_segments(offsets, rows, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Segments(offsets, rows)


@needs_triton
@pytest.mark.parametrize(("K", "N"), [(33, 96), (96, 33)])
def test_kernels_beside_widths_that_grouped_gemm_refuses(K, N):
    """Its rows must start on 16 bytes: of x, of y and of dy."""
    call = draw(BF16, FP32, weights="stack", adapters="stack", K=K, N=N)
    got, exact = (results(together, call, impl=impl) for impl in ("triton:addmm", "reference"))
    for name, value in got.items():
        assert relative_rms(value, exact[name]) <= 0.02, name


@needs_triton
def test_kernels_copy_no_scales_from_the_host(monkeypatch):
    """A copy waits for the GPU, and cannot be captured in a CUDA graph."""
    call = draw(FP32, adapters="stack") | {"scaling": [1.0, 2.0, 0.5, 1.0, 1.0, 3.0]}
    call["segments"] = segments()
    results(fused_lora_linear, call, impl="triton")

    def copied(*args, **kwargs):
        raise AssertionError("expected constants on the device, got a copy from the host")

    monkeypatch.setattr(segmented_triton.torch, "tensor", copied)
    results(fused_lora_linear, call, impl="triton")


@pytest.mark.parametrize("adapters", ["stack", "list"])
@pytest.mark.parametrize("only_x", [True, False])
def test_second_derivatives_without_any_row(adapters, only_x):
    """As of a process that gets no token in expert parallelism: zeros, of x too."""
    call = draw(FP64, weights="stack", adapters=adapters)
    call |= {"segments": Segments(torch.zeros(len(SIZES), dtype=torch.int64)), "bias": None}
    y = fused_lora_linear(**call)
    wanted = [call["x"]] if only_x else [t for n, t in leaves(call).items() if n != "bias"]
    found = torch.autograd.grad(y.square().sum(), wanted, create_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in found)
    assert found[0] is not None
