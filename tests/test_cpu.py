"""The PyTorch implementation on CPUs: half precision is widened where it is slow."""

import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd

from fused_lora import fused_lora_add, fused_lora_linear
from fused_lora.kernels.operands import ForwardOperands
from fused_lora.ops import cpu_gemm, torch_impl
from support import UNIT_ROUNDOFF, in_float64, make_inputs, relative_rms, run

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def with_instructions(monkeypatch):
    """A CPU with half-precision instructions, whatever this machine has."""
    monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset())


@pytest.fixture
def without_instructions(monkeypatch):
    """A CPU where half-precision products are plain loops; weights are split into many blocks."""
    monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset(HALF))
    for name, size in {"_WEIGHTS": 960, "_OUTPUTS": 256 * 8, "_COLUMNS": 7}.items():
        monkeypatch.setattr(cpu_gemm, f"_WIDE{name}", size)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_are_exact_but_for_the_base(rows, dtype, with_instructions):
    """float32 adapters, PEFT's default: gradients of float32 accuracy, and ``y`` rounded once."""
    inputs = make_inputs(rows, 96, 80, 8, dtype, adapter_dtype=torch.float32, bias=True)
    dy = torch.randn(rows, 80).to(dtype)
    actual, exact = run(fused_lora_linear, inputs, dy), in_float64(inputs, dy)
    for name in ("dA", "dB"):
        assert actual[name].dtype == torch.float32
        assert relative_rms(actual[name], exact[name]) < 1e-6
    base = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    branch = exact["y"] - in_float64(inputs | {"scaling": 0.0}, dy)["y"]
    once = {"rtol": UNIT_ROUNDOFF[dtype], "atol": 1e-6}
    torch.testing.assert_close(actual["y"].double(), base + branch, **once)


@pytest.mark.parametrize(
    ("rows", "rank", "adapter_dtype", "widened"),
    [
        (16, 32, torch.float32, True),
        (17, 8, torch.float32, False),
        (16, 33, torch.float32, False),
        (8, 8, torch.bfloat16, True),
        (4, 16, torch.bfloat16, True),
        (1, 17, torch.bfloat16, False),
        (9, 8, torch.bfloat16, False),
        (64, 1, torch.bfloat16, False),
    ],
)
def test_which_rows_are_few(rows, rank, adapter_dtype, widened, with_instructions):
    """Widen only small products, as measured: their overhead costs more than their arithmetic."""
    x, weight = torch.randn(rows, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    A, B = torch.randn(rank, 40, dtype=adapter_dtype), torch.randn(24, rank, dtype=adapter_dtype)
    y, S, _ = torch_impl.forward(ForwardOperands(x, weight, A, B, None, 1.0))
    assert y.dtype == torch.bfloat16
    assert S.dtype == (torch.float32 if widened else torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("rows", [3, 40])  # widened, and not
@pytest.mark.parametrize("cpu", ["with_instructions", "without_instructions"])
def test_dropout_in_half_precision_is_the_references(rows, adapter_dtype, dtype, cpu, request):
    request.getfixturevalue(cpu)
    inputs = make_inputs(rows, 70, 48, 4, dtype, adapter_dtype=adapter_dtype)
    base = F.linear(inputs["x"], inputs["weight"])
    dy = torch.randn(rows, 48).to(dtype)

    def added(impl):
        given = {name: t for name, t in inputs.items() if name not in ("weight", "bias")}
        return run(lambda **kw: fused_lora_add(base, **kw, dropout_p=0.4, impl=impl), given, dy)

    def whole(impl):
        return run(lambda **kw: fused_lora_linear(**kw, dropout_p=0.4, impl=impl), inputs, dy)

    for call in (added, whole):
        results = []
        for impl in ("torch", "reference"):
            torch.manual_seed(3)
            results.append(call(impl))
        for name, value in results[0].items():
            if value is not None:
                assert value.dtype == results[1][name].dtype
                assert relative_rms(value, results[1][name]) < 8 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize(("rows", "rank"), [(0, 4), (3, 4), (9, 17), (140, 8), (140, 40)])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_without_instructions_every_result_is_rounded_once(
    rows, rank, adapter_dtype, dtype, transposed, without_instructions
):
    """All but the base product of few rows and contiguous vectors, which is left to PyTorch."""
    inputs = make_inputs(rows, 96, 80, rank, dtype, adapter_dtype=adapter_dtype)
    if transposed:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    dy = torch.randn(rows, 80).to(dtype)
    actual, exact = run(fused_lora_linear, inputs, dy), in_float64(inputs, dy)
    plain = "dx" if transposed else "y"
    for name in ("y", "dx", "dA", "dB"):
        if name == plain and 0 < rows <= 8:
            assert relative_rms(actual[name], exact[name]) <= 2 * UNIT_ROUNDOFF[dtype]
        else:
            rounded = UNIT_ROUNDOFF[actual[name].dtype] * exact[name].abs()
            error = (actual[name] - exact[name]).abs()
            assert bool((error <= rounded + 1e-6 * exact[name].norm()).all()), name


@pytest.mark.parametrize("rows", [3, 40])
def test_without_instructions_gradients_come_in_batches(rows, without_instructions):
    inputs = make_inputs(rows, 96, 80, 8, torch.bfloat16)
    x = inputs["x"].requires_grad_()
    y = fused_lora_linear(**inputs, dropout_p=0.3)
    dys = torch.randn(3, rows, 80).bfloat16()
    (batched,) = torch.autograd.grad(y, [x], dys, is_grads_batched=True, retain_graph=True)
    for dy, dx in zip(dys, batched, strict=True):
        torch.testing.assert_close(dx, torch.autograd.grad(y, [x], dy, retain_graph=True)[0])


@pytest.mark.parametrize(
    ("rows", "transposed", "widened"),
    [(8, False, False), (9, False, True), (8, True, True), (1, True, True)],
)
def test_without_instructions_few_rows_are_left_to_dot_products(
    rows, transposed, widened, without_instructions, monkeypatch
):
    """With more rows, or vectors that are not contiguous, the weight is widened in blocks."""
    weight = torch.randn(80, 96).bfloat16()
    if transposed:
        weight = weight.t().contiguous().t()
    blocks = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: blocks.append(b.shape) or mm(a, b))
    A, B = torch.randn(4, 96), torch.randn(80, 4)
    x = torch.randn(rows, 96).bfloat16()
    torch_impl.forward(ForwardOperands(x, weight, A, B, None, 1.0))
    found = [columns for inner, columns in blocks if inner == 96 and columns != 4]
    assert found == ([10] * 8 if widened else [])
    blocks.clear()
    x = torch.randn(256, 96).bfloat16()
    torch_impl.forward(ForwardOperands(x, weight, A, B, None, 1.0))
    # The thin product has as many columns as there are rows: its transpose is computed.
    assert [columns for inner, columns in blocks if inner == 96 and columns != 256] == [8] * 10


def test_without_instructions_a_subclass_is_multiplied_by_itself(without_instructions):
    """A quantised weight, for example, may support neither slices nor casts."""

    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if args and args[0] is weight:  # the output, as nn.Linear's, is of the class too
                assert function not in (torch.Tensor.__getitem__, torch.Tensor.to), function
            return super().__torch_function__(function, types, args, kwargs)

    inputs = make_inputs(20, 40, 24, 4, torch.bfloat16)
    expected = run(fused_lora_linear, inputs, dy := torch.randn(20, 24).bfloat16())
    weight = inputs["weight"].as_subclass(Quantised)
    actual = run(fused_lora_linear, inputs | {"weight": weight}, dy)
    for name in ("y", "dx"):
        unit = UNIT_ROUNDOFF[torch.bfloat16]
        assert relative_rms(actual[name], expected[name]) <= 2 * unit


def test_compiled_autograd_follows_the_backward(without_instructions, nothing_compiled):
    inputs = make_inputs(20, 40, 24, 4, torch.bfloat16, adapter_dtype=torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    y = fused_lora_linear(**inputs, dropout_p=0.3)
    expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        y.sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_what_a_cpu_emulates_is_pytorchs_answer(monkeypatch):
    """On x86 with oneDNN, a dtype is emulated if PyTorch reports that oneDNN lacks it."""

    def ask(machine, has_mkldnn=True, **supported):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_mkldnn)
        answers = {f"_is_mkldnn_{k}_supported": lambda v=v: v for k, v in supported.items()}
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**answers))
        return cpu_gemm._emulated()

    none = {"bf16": False, "fp16": False}
    assert ask("AMD64", **none) == ask("x86_64", **none) == set(HALF)
    assert ask("x86_64", bf16=True, fp16=False) == {torch.float16}
    assert ask("x86_64", bf16=True, fp16=True) == set()
    assert ask("x86_64") == set()  # a PyTorch without these checks
    assert ask("x86_64", has_mkldnn=False, **none) == ask("arm64", **none) == set()  # not measured
