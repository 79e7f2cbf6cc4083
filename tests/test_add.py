"""``fused_lora_add``, the adapter on a given base output: values, gradients, bytes, errors."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fused_lora import fused_lora_add, fused_lora_linear
from fused_lora.ops import cpu_gemm, dispatch, dropout
from support import by_default, relative_rms

HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLS = ["torch", "reference", *(["triton"] if HAS_TRITON else [])]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("base", "x", "lora_A", "lora_B")


def make(M=5, K=7, N=6, R=3, dtype=FP64, base_dtype=None, adapter_dtype=None) -> dict:
    tensors = {
        "base": torch.randn(M, N).to(base_dtype or dtype),
        "x": torch.randn(M, K).to(dtype),
        "lora_A": (torch.randn(R, K) / K**0.5).to(adapter_dtype or dtype),
        "lora_B": (torch.randn(N, R) / R**0.5).to(adapter_dtype or dtype),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def formula(base, x, lora_A, lora_B, scaling=1.3, mask=None):
    dropped = x if mask is None else x * mask.to(x.dtype)
    branch = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * scaling
    return (base + branch).to(base.dtype)


def results(function, tensors, dy) -> dict:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


NEEDS = [NAMES, ("base",), ("x",), ("lora_A",), ("base", "lora_B")]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", by_default([NAMES, ("base", "lora_B")], NEEDS))
def test_derivatives(impl, p, needs):
    tensors = make()

    def function(*leaves):
        torch.manual_seed(3)
        given = {name: t.detach() for name, t in tensors.items()}
        given |= dict(zip(needs, leaves, strict=True))
        return fused_lora_add(**given, scaling=0.7, dropout_p=p, impl=impl)

    leaves = tuple(tensors[name] for name in needs)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# M, K, N, R, dtype, base's dtype, adapters' dtype, dropout
CASES = [
    (123, 63, 80, 8, BF16, BF16, BF16, 0.0),
    (123, 64, 80, 8, BF16, BF16, FP32, 0.3),
    (65, 128, 64, 100, FP16, FP32, FP16, 0.3),
    (65, 65, 17, 16, FP32, BF16, FP32, 0.3),
    (33, 17, 123, 1, FP32, FP32, FP32, 0.0),
    (33, 17, 80, 16, BF16, FP16, BF16, 0.3),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_eager(case, impl):
    *shape, dtype, base_dtype, adapter_dtype, p = case
    tensors = make(*shape, dtype, base_dtype, adapter_dtype)
    dy = torch.randn(shape[0], shape[2]).to(base_dtype)
    mask = None
    if p:
        torch.manual_seed(5)
        keep = dropout.keep_count(p)
        keep_bits = dropout.make_keep_bits(dropout.draw_seed(dy.device), *shape[:2], keep)
        mask = dropout.keep_mask(keep_bits, shape[1], FP64) * (dropout.KEEP_ALL / keep)
    wide = {name: t.double() for name, t in tensors.items()}
    exact = results(lambda **kw: formula(**kw, mask=mask), wide, dy.double())
    eager = results(lambda **kw: formula(**kw, mask=mask), tensors, dy)
    torch.manual_seed(5)
    ours = results(
        lambda **kw: fused_lora_add(**kw, scaling=1.3, dropout_p=p, impl=impl), tensors, dy
    )
    unit = max(torch.finfo(t).eps for t in (dtype, base_dtype)) / 2
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, name
        error = relative_rms(value, exact[name])
        assert error <= 2 * relative_rms(eager[name], exact[name]) + unit, name


@pytest.mark.parametrize("impl", IMPLS)
def test_the_layer_is_its_base_and_the_adapter(impl):
    """For x of any number of dimensions, strided or empty; the mask is the whole layer's too."""
    weight, bias = torch.randn(6, 7), torch.randn(6)
    A, B = torch.randn(3, 7), torch.randn(6, 3)
    for x in (torch.randn(7), torch.randn(2, 5, 7), torch.randn(7, 5).t(), torch.randn(0, 7)):
        torch.manual_seed(2)
        expected = fused_lora_linear(x, weight, A, B, bias, scaling=0.5, dropout_p=0.4, impl=impl)
        base = F.linear(x, weight, bias)
        before = base.clone()
        torch.manual_seed(2)
        y = fused_lora_add(base, x, A, B, scaling=0.5, dropout_p=0.4, impl=impl)
        torch.testing.assert_close(y, expected)
        assert torch.equal(base, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strided_base_and_gradient(impl):
    tensors = make(5, 7, 6, 3, FP32)
    expected = results(lambda **kw: fused_lora_add(**kw), tensors, torch.ones(5, 6))
    tensors["base"] = tensors["base"].detach().t().contiguous().t()
    got = results(
        lambda **kw: fused_lora_add(**kw, impl=impl), tensors, torch.ones(()).expand(5, 6)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("emulated", "S_bytes"), [((), 2), ((BF16,), 4)], ids=["plain", "emulated"]
)
def test_keeps_x_the_thin_product_and_bits(emulated, S_bytes, monkeypatch):
    """Backward keeps x, S (in float32 if bfloat16 is emulated) and the packed mask, no more."""
    monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset(emulated))
    tensors = make(64, 256, 32, 8, BF16, adapter_dtype=FP32)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_lora_add(**tensors, dropout_p=0.1)
    own = {t.data_ptr() for t in (tensors["lora_A"], tensors["lora_B"])}
    size = sum(t.nbytes for t in kept if t.data_ptr() not in own)
    assert size == 64 * 256 * 2 + 64 * 8 * S_bytes + 64 * 256 // 8
    with torch.no_grad(), saved_tensors_hooks(lambda t: pytest.fail("kept"), lambda t: t):
        fused_lora_add(**tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_product_is_in_the_inputs_dtype(impl):
    """S = 160,000 overflows float16, the base's dtype; y = 160 does not."""
    x, A, B = torch.full((1, 16), 1e4), torch.ones(1, 16), torch.full((16, 1), 1e-3)
    y = fused_lora_add(torch.zeros(1, 16, dtype=FP16), x, A, B, impl=impl)
    assert torch.equal(y, torch.full((1, 16), 160.0, dtype=FP16))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_base_in_float64_is_not_for_triton():
    tensors = make(dtype=FP32, base_dtype=FP64)
    assert fused_lora_add(**tensors).dtype == FP64
    with pytest.raises(ValueError, match="got float64"):
        fused_lora_add(**tensors, impl="triton")


@pytest.mark.parametrize("base_dtype", [FP32, BF16])
def test_autocast(base_dtype):
    """The branch is computed in autocast's dtype, the sum in the base's."""
    tensors = make(33, 64, 16, 4, FP32, base_dtype)
    dy = torch.randn(33, 16).to(base_dtype)

    def autocast(**kw):
        with torch.autocast("cpu", BF16):
            return fused_lora_add(**kw, scaling=1.3)

    exact = results(formula, {n: t.double() for n, t in tensors.items()}, dy.double())
    for name, value in results(autocast, tensors, dy).items():
        assert value.dtype == tensors["base" if name == "y" else name].dtype
        assert relative_rms(value, exact[name]) < 2.0**-7, name


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_failure_falls_back_with_one_warning(monkeypatch):
    from fused_lora.kernels import strategies

    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    tensors = make(5, 7, 6, 3, FP32)
    expected = results(fused_lora_add, tensors, torch.ones(5, 6))
    monkeypatch.setattr(dispatch, "_may_run_triton", lambda *_: True)
    monkeypatch.setattr(dispatch, "_not_worth_it", lambda device: None)
    dispatch.clear_decisions()
    monkeypatch.setattr(strategies, "run_add", broken)
    with pytest.warns(UserWarning, match="no such kernel") as caught:
        got = results(fused_lora_add, tensors, torch.ones(5, 6))
    dispatch.clear_decisions()
    assert len(caught) == 1
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(backend):
    tensors = make(17, 40, 24, 4, FP32)

    def function(**kw):
        return fused_lora_add(**kw, dropout_p=0.3)

    outcomes = []
    for call in (function, torch.compile(function, backend=backend, fullgraph=True)):
        torch.manual_seed(4)
        outcomes.append(results(call, tensors, torch.ones(17, 24)))
    torch.testing.assert_close(*outcomes)


WRONG = {
    "base of shape (5, 6), got (5, 4)": {"base": torch.randn(5, 4)},
    "base of shape (5, 6), got (1, 6)": {"base": torch.randn(1, 6)},
    "x of shape (..., 7), got (5, 8)": {"x": torch.randn(5, 8)},
    "lora_B of shape (6, 3), got (6, 2)": {"lora_B": torch.randn(6, 2)},
    "lora_A (rank, in) and lora_B (out, rank), got (7,) and (6, 3)": {"lora_A": torch.randn(7)},
    "expected base in one of": {"base": torch.ones(5, 6, dtype=torch.int32)},
    "expected base to be a Tensor, got int": {"base": 0},
    "expected base on x's device cpu, got meta": {"base": torch.randn(5, 6, device="meta")},
    "expected dropout in [0, 1), got 1.5": {"dropout_p": 1.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError)) as error:
        fused_lora_add(**make(dtype=FP32) | WRONG[message])
    assert message in str(error.value)
