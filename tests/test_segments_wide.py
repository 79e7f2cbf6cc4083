"""Wide products of experts in bfloat16, on any CPU as if it had AMX."""

import math

import pytest
import torch
from test_segments import BF16, FP16, FP32, REST, SIZES, draw, in_float64, leaves, results
from test_segments import segments as segments_of

from fused_lora import fused_lora_linear
from fused_lora.ops import cpu_gemm, dropout, segmented_torch, segmented_wide
from support import relative_rms

G, M, K, N, RANK = len(SIZES), sum(SIZES) + REST, 64, 96, 16
FIRST = [sum(SIZES[:g]) for g in range(G)]


@pytest.fixture(autouse=True)
def added(monkeypatch) -> list:
    """The tensors that wide products were added to."""
    found, add = [], segmented_wide._add

    def recorded(y, *args):
        found.append(y)
        add(y, *args)

    monkeypatch.setattr(cpu_gemm, "HAS_AMX", True)
    monkeypatch.setattr(segmented_wide, "_add", recorded)
    return found


def experts(adapter=FP32, **changes) -> dict:
    return call_of(BF16, adapter) | changes


def call_of(dtype, adapter, weights="stack", adapters="stack", rank=RANK, K=K, N=N) -> dict:
    kinds = {"weights": weights, "adapters": adapters, "ranks": [rank] * G}
    call = draw(dtype, adapter, **kinds, K=K, N=N)
    return call | {"scaling": 3.0, "segments": segments_of()}


def check(call: dict) -> None:
    """Results are as near to float64's as eager's, twice at most."""
    got = results(fused_lora_linear, call)
    eager = results(fused_lora_linear, call, impl="reference")
    exact = results(fused_lora_linear, in_float64(call), impl="reference")
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        error = relative_rms(value, exact[name])
        assert error <= 2 * relative_rms(eager[name], exact[name]), name


@pytest.mark.parametrize("adapter", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bias", ["of each", "of all", "none"])
def test_results(adapter, bias, added):
    call = experts(adapter)
    if bias == "none":
        call["bias"] = None
    elif bias == "of all":
        call["bias"] = call["bias"][0].detach().requires_grad_()
    check(call)
    assert [tuple(y.shape) for y in added] == [(M, N), (M, K)]


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [((61,), 32), ((0, 61, 0, 0), 8), ((30, *(1,) * 31), 4)],
    ids=lambda value: str(len(value)) if isinstance(value, tuple) else None,
)
def test_any_sizes(sizes, rank, added):
    count = len(sizes)
    check(
        {
            "x": torch.randn(M, K).to(BF16).requires_grad_(),
            "weight": (torch.randn(count, N, K) / K**0.5).to(BF16),
            "lora_A": (torch.randn(count, rank, K) / K**0.5).requires_grad_(),
            "lora_B": (torch.randn(count, N, rank) / rank**0.5).requires_grad_(),
            "bias": None,
            "segments": segments_of(sizes),
        }
    )
    assert len(added) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("g", [1, 2])  # without rows, and with
@pytest.mark.parametrize("where", ["x", "lora_A", "lora_B", "lora_A lora_B", "dy"])
def test_nothing_passes_between_segments(where, g, value, added):
    call, rows = experts(), slice(FIRST[g], FIRST[g] + SIZES[g])
    dy = torch.randn(M, N).to(BF16)

    def run(**options) -> dict:
        y = fused_lora_linear(**call, **options)
        found = torch.autograd.grad(y, list(leaves(call).values()), dy)
        return {"y": y.detach()} | dict(zip(leaves(call), found, strict=True))

    before = run()
    with torch.no_grad():
        if where in ("x", "dy"):
            (call["x"] if where == "x" else dy)[rows, 3:4] = value
        else:
            for name in where.split():
                call[name][g, 2, 1] = value
    after, eager = run(), run(impl="reference")
    assert len(added) == 4
    for name, result in after.items():
        is_own = torch.zeros(len(result), dtype=torch.bool)
        is_own[rows if name in ("y", "x") else g] = True
        assert torch.equal(result[~is_own], before[name][~is_own]), name
        assert torch.equal(result.isfinite(), eager[name].isfinite()), name
        assert torch.equal(result.isnan(), eager[name].isnan()), name


def test_rows_of_no_segment():
    call = experts()
    with torch.no_grad():
        call["x"][-REST:] = math.nan
    y = fused_lora_linear(**call)
    dy = torch.randn(M, N).to(BF16)
    dy[-REST:] = math.nan
    dx, *others = torch.autograd.grad(y, [call[n] for n in ("x", "lora_A", "lora_B")], dy)
    assert not y[-REST:].any()
    assert not dx[-REST:].any()
    assert all(t.isfinite().all() for t in others)


def test_no_row_of_any_segment(added):
    call = experts(segments=segments_of((0,) * G))
    assert not any(value.any() for value in results(fused_lora_linear, call).values())
    assert len(added) == 2


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_only_what_is_asked_for(name):
    call = experts(bias=None)
    expected = results(fused_lora_linear, call)[f"d {name}"]
    for other in leaves(call).values():
        other.requires_grad_(False)
    call[name].requires_grad_()
    got = results(fused_lora_linear, call)
    assert list(got) == ["y", f"d {name}"]
    # dB alone keeps no weight, so it is one product per segment, of the same S.
    torch.testing.assert_close(got[f"d {name}"], expected, rtol=0.02, atol=1e-3)


def test_second_derivatives_and_batched_gradients():
    call = experts()
    wanted = list(leaves(call).values())
    found = {}
    for impl in ("auto", "reference"):
        y = fused_lora_linear(**call, impl=impl)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), wanted)
        y = fused_lora_linear(**call, impl=impl)
        dys = torch.linspace(-1, 1, 2 * y.numel()).to(BF16).view(2, *y.shape)
        found[impl] = *second, *torch.autograd.grad(y, wanted, dys, is_grads_batched=True)
    for value, expected in zip(*found.values(), strict=True):
        assert relative_rms(value, expected) <= 0.02


def test_backward_takes_the_kernels_matrix_of_s(added):
    """If a kernel fails in backward, PyTorch continues from the kernels' ``S (M, R)``."""
    call = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in experts().items()}
    x, weight, A, B = (call[name] for name in ("x", "weight", "lora_A", "lora_B"))
    segments, scaling, keep_all = call["segments"], [3.0] * G, [dropout.KEEP_ALL] * G
    y, S, _ = segmented_torch.forward(x, weight, A, B, None, scaling, segments, None, keep_all)
    matrix = torch.cat([*S, x.new_zeros(REST, RANK)])
    needs = True, [True] * G, [True] * G
    found = [
        segmented_torch.backward(
            y, x, weight, A, B, of_rows, scaling, segments, None, keep_all, needs
        )
        for of_rows in (S, matrix)
    ]
    assert len(added) == 3  # y, and dx twice
    assert all(map(torch.equal, *found))


def others():
    yield "float16", lambda: call_of(FP16, FP32)
    yield "float32", lambda: call_of(FP32, None)
    yield "one weight", lambda: call_of(BF16, FP32, weights="one")
    yield "a sequence", lambda: call_of(BF16, FP32, adapters="list")
    yield "several scales", lambda: experts(scaling=[1.0, 2.0] * 3)
    yield "a scale of 0", lambda: experts(scaling=0.0)
    yield "a tensor as scale", lambda: experts(scaling=torch.tensor(2.0))
    yield "dropout", lambda: experts(dropout_p=0.3)
    few = segments_of((10, 0, 4, 1, 4, 5))
    yield "few rows", lambda: experts(x=torch.randn(24, K).to(BF16), segments=few)
    yield "too wide", lambda: call_of(BF16, FP32, rank=48)
    for name, sizes in {"rank": {"rank": 8}, "in": {"K": 72}, "out": {"N": 80}}.items():
        yield f"a tail of {name}", lambda sizes=sizes: call_of(BF16, FP32, **sizes)


@pytest.mark.parametrize("make", [make for _, make in others()], ids=[name for name, _ in others()])
def test_other_calls_have_one_product_per_segment(make, added):
    results(fused_lora_linear, make())
    assert not added


def test_other_cpus_have_one_product_per_segment(monkeypatch, added):
    monkeypatch.setattr(cpu_gemm, "HAS_AMX", False)
    results(fused_lora_linear, experts())
    assert not added
