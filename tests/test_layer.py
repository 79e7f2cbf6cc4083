"""The whole layer, forward and backward, every implementation and strategy, against float64."""

import itertools
import random

import pytest
import torch

from fused_lora import fused_lora_linear
from fused_lora.ops import dispatch, dropout
from fused_lora.strategy import cost
from support import (
    assert_as_good_as_eager,
    by_default,
    in_eager,
    in_float64,
    make_inputs,
    needs_triton,
    pooled,
    relative_rms,
    run,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (0, 1, 17, 63, 123, 300)
RANKS = (1, 4, 8, 16, 24, 64, 100, 200)
LAYOUTS = ("plain", "1d", "3d", "4d", "row-strided", "transposed", "offset", "expanded-dy")
TRITON = ("split", "single_pass", "seeded", "addmm")
MOST_WORK = 4000  # of a sampled case: one in six has more, and those would take 0.8 of the time


def draws_of(case: tuple) -> int:
    """How many draws of a case are compared at once.

    Few results (R K of dA, R N of dB), or few shared intermediates (S, G), are too small a sample
    of errors.
    """
    M, K, N, R, *_ = case
    fewest = min(size for size in (M * R, M * N, M * K, R * K, N) if size) if M * K * N else 64
    return 1 if fewest >= 16 else 8 if fewest >= 4 else 32


def work(case: tuple) -> int:
    """About proportional to the seconds that a case takes in the interpreter."""
    return draws_of(case) * (100 + sum(case[:4]))


def sample_cases(count: int, seed: int) -> list[tuple]:
    """Random whole cases; every size, rank, dtype, layout and strategy comes up many times."""
    rng = random.Random(seed)
    cases = []
    while len(cases) < count:
        dtype = rng.choice((FP32, FP16, BF16))
        strategy = rng.choice((*TRITON, "torch"))
        few = strategy == "single_pass"
        layout = rng.choice(LAYOUTS)
        rows = rng.choice(SIZES[:4] if few else SIZES)
        case = (
            1 if layout == "1d" else rows,
            rng.choice(SIZES),
            rng.choice(SIZES),
            rng.choice(RANKS[:6] if few else RANKS),
            dtype,
            rng.choice((dtype, FP32)),
            rng.choice((False, True)),
            0.0 if few else rng.choice((0.0, 0.3)),
            layout,
            strategy,
        )
        if work(case) <= MOST_WORK:
            cases.append(case)
    return cases


def values_and_pairs(case: tuple) -> set[tuple]:
    """Each column's value and, unless a size is 0, all pairs of the columns after the rank."""
    values = list(enumerate(case))
    empty = 0 in case[:3]
    return {*values, *(() if empty else itertools.combinations(values[4:], 2))}


def covering(cases: list[tuple]) -> list[tuple]:
    """A subset of ``cases`` with every value and pair: a greedy cover, of little work."""

    def gain(case):
        return len(values_and_pairs(case) & missing) / work(case)

    missing, chosen = set().union(*map(values_and_pairs, cases)), []
    while missing:
        chosen.append(max(cases, key=gain))
        missing -= values_and_pairs(chosen[-1])
    return chosen


SAMPLED = sample_cases(250, seed=2)


@pytest.fixture
def strategy(monkeypatch):
    """Force a kernel strategy and return the ``impl`` to request; "torch" needs no forcing."""

    def force(name: str) -> str:
        if name == "torch":
            return "torch"
        pytest.importorskip("triton")
        monkeypatch.setattr(cost, "choose_strategy", lambda *a, **k: (name, "forced"))
        dispatch.clear_decisions()
        return "triton"

    yield force
    monkeypatch.undo()
    dispatch.clear_decisions()


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x (M,K)`` in another shape or memory layout."""
    M, K = x.shape
    if layout == "1d":
        return x.view(K)
    if layout == "3d":
        return x.view(M, 1, K)
    if layout == "4d":
        return x.view(1, M, 1, K)
    if layout == "row-strided":
        return torch.cat([x, x], dim=1)[:, :K]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "offset":
        flat = torch.empty(M * K + 3, dtype=x.dtype)
        flat[3:].copy_(x.reshape(-1))
        return flat[3:].view(M, K)
    return x


def draw(case, impl) -> tuple[dict, dict, dict]:
    """Results of one draw of ``case``: ours, exact, and eager PyTorch's."""
    M, K, N, R, dtype, adapter_dtype, bias, p, layout, _ = case
    inputs = make_inputs(M, K, N, R, dtype, adapter_dtype, bias)
    dy = torch.randn(M, N).to(dtype)
    if layout == "expanded-dy":
        dy = torch.ones((), dtype=dtype).expand(M, N)
    mask = None
    if p:
        seed = torch.initial_seed() + 1  # seeds every device's generator
        torch.manual_seed(seed)
        keep = dropout.keep_count(p)
        keep_bits = dropout.make_keep_bits(dropout.draw_seed(dy.device), M, K, keep)
        mask = dropout.keep_mask(keep_bits, K, torch.float64) * (dropout.KEEP_ALL / keep)
        torch.manual_seed(seed)
    x = arrange(inputs["x"], layout)
    shaped_dy = dy if x.dim() == 2 else dy.reshape(*x.shape[:-1], N)
    ours = run(
        lambda **kw: fused_lora_linear(**kw, dropout_p=p, impl=impl), inputs | {"x": x}, shaped_dy
    )
    assert ours["y"].shape == shaped_dy.shape
    assert ours["dx"].shape == x.shape
    ours |= {"y": ours["y"].reshape(M, N), "dx": ours["dx"].reshape(M, K)}
    return ours, in_float64(inputs, dy, mask), in_eager(inputs, dy, mask)


@pytest.mark.parametrize("case", by_default(covering(SAMPLED), SAMPLED), ids=str)
def test_sampled(case, strategy):
    impl = strategy(case[-1])
    draws = [draw(case, impl) for _ in range(draws_of(case))]
    assert_as_good_as_eager(*(pooled(list(results)) for results in zip(*draws, strict=True)))


@pytest.mark.parametrize("how", [*TRITON, "torch"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_float32_adapters_stay_near_all_float32(how, dtype, strategy):
    """Relative RMS error of at most 2⁻⁷, as documented: unlike PEFT we do not upcast x."""
    impl = strategy(how)
    inputs = make_inputs(63, 123, 80, 8, dtype, FP32)
    dy = torch.randn(63, 80).to(dtype)
    got = run(lambda **kw: fused_lora_linear(**kw, impl=impl), inputs, dy)
    expected = in_float64(inputs, dy)
    for name, value in got.items():
        assert relative_rms(value, expected[name]) <= 2.0**-7, name
    assert got["dA"].dtype == got["dB"].dtype == FP32


@pytest.mark.parametrize(
    ("how", "p"), [*((how, 0.0) for how in (*TRITON, "torch")), ("split", 0.3), ("torch", 0.3)]
)
def test_repeats_bitwise(how, p, strategy):
    impl = strategy(how)
    inputs = make_inputs(63, 300, 123, 8, BF16)
    dy = torch.randn(63, 123).to(BF16)
    results = []
    for _ in range(3):
        torch.manual_seed(5)
        results.append(
            run(lambda **kw: fused_lora_linear(**kw, dropout_p=p, impl=impl), inputs, dy)
        )
    for again in results[1:]:
        for name, value in again.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy under the interpreter
@pytest.mark.parametrize("how", [*TRITON, "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_propagate_as_in_eager(how, value, strategy):
    impl = strategy(how)
    inputs = make_inputs(17, 63, 40, 4, FP32)
    inputs["x"][3, 5] = value
    dy = torch.randn(17, 40)
    dy[7, 2] = value
    got = run(lambda **kw: fused_lora_linear(**kw, impl=impl), inputs, dy)
    expected = run(lambda **kw: fused_lora_linear(**kw, impl="reference"), inputs, dy)
    for name, tensor in got.items():
        assert torch.equal(tensor.isfinite(), expected[name].isfinite()), name
        assert torch.equal(tensor.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("how", [*TRITON, "torch"])
@pytest.mark.parametrize("needs", ["x", "lora_A", "lora_B", "bias", "x lora_B", "lora_A bias"])
def test_only_the_gradients_asked_for(how, needs, strategy):
    impl = strategy(how)
    inputs = make_inputs(17, 63, 40, 4, FP32)
    everything = run(
        lambda **kw: fused_lora_linear(**kw, impl="reference"), inputs, torch.ones(17, 40)
    )
    for name in needs.split():
        inputs[name].requires_grad_()
    fused_lora_linear(**inputs, impl=impl).sum().backward()
    names = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "bias": "dbias"}
    for name, key in names.items():
        if name in needs.split():
            torch.testing.assert_close(inputs[name].grad, everything[key])
        else:
            assert inputs[name].grad is None


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("how", [*TRITON, "torch", "reference"])
def test_strided_parameters(how, dtype, strategy):
    """Every tensor, dY included, is a strided view; the reference must meet the same bound."""
    impl = how if how == "reference" else strategy(how)
    inputs = make_inputs(63, 40, 24, 8, dtype)
    views = {
        name: inputs[name].t().contiguous().t() for name in ("x", "weight", "lora_A", "lora_B")
    }
    views["bias"] = inputs["bias"].repeat_interleave(2)[::2]
    dy = torch.randn(24, 63).to(dtype).t()
    got = run(lambda **kw: fused_lora_linear(**kw, impl=impl), inputs | views, dy)
    assert_as_good_as_eager(got, in_float64(inputs, dy), in_eager(inputs, dy))


@needs_triton
@pytest.mark.parametrize("how", TRITON)
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_a_bias_of_any_stride(how, layout, strategy):
    impl = strategy(how)
    inputs = make_inputs(17, 40, 24, 4, FP32)
    inputs["bias"] = torch.randn(48)[::2] if layout == "strided" else torch.randn(1).expand(24)
    got = fused_lora_linear(**inputs, impl=impl)
    torch.testing.assert_close(got, fused_lora_linear(**inputs, impl="reference"))


@needs_triton
@pytest.mark.parametrize("how", TRITON)
def test_a_single_column_whose_stride_means_nothing(how, strategy):
    """``(16, 1)`` with strides ``(1, 16)`` is contiguous to PyTorch, transposed to launchers."""
    impl = strategy(how)
    inputs, dy = make_inputs(16, 1, 1, 4, FP32), torch.randn(16, 16).t()[:, :1]
    inputs["x"] = torch.randn(16, 16).t()[:, :1]
    got = run(lambda **kw: fused_lora_linear(**kw, impl=impl), inputs, dy)
    expected = run(lambda **kw: fused_lora_linear(**kw, impl="reference"), inputs, dy)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_gradients_of_the_adapter_are_contiguous(impl):
    """With M >= 128 and 1 < R <= 16 a CPU computes the transposed product."""
    inputs, dy = make_inputs(130, 40, 24, 8, FP32), torch.randn(130, 24)
    got = run(lambda **kw: fused_lora_linear(**kw, impl=impl), inputs, dy)
    assert got["dA"].is_contiguous()
    assert got["dB"].is_contiguous()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy under the interpreter
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_scale_of_zero_hides_no_infinity(impl):
    """0·∞ is NaN, as in eager; BLAS skips the product when alpha is 0."""
    inputs = make_inputs(17, 40, 24, 4, FP32, scaling=0.0)
    inputs["x"][3, 5] = float("inf")
    got, expected = (fused_lora_linear(**inputs, impl=how) for how in (impl, "reference"))
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[3].isnan().all()
