"""What the PyTorch path does for a CPU's sake: few rows of half precision are widened."""

import pytest
import torch
import torch.nn.functional as F

from fused_lora import aten, fused_lora_add, fused_lora_linear
from support import in_float64, make_inputs, relative_rms, run

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_are_exact_but_for_the_base(rows, dtype):
    """float32 adapters, PEFT's default: gradients of float32 accuracy, and ``y`` rounded once."""
    inputs = make_inputs(rows, 96, 80, 8, dtype, adapter_dtype=torch.float32, bias=True)
    dy = torch.randn(rows, 80).to(dtype)
    actual, exact = run(fused_lora_linear, inputs, dy), in_float64(inputs, dy)
    for name in ("dA", "dB"):
        assert actual[name].dtype == torch.float32
        assert relative_rms(actual[name], exact[name]) < 1e-6
    base = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    branch = exact["y"] - in_float64(inputs | {"scaling": 0.0}, dy)["y"]
    torch.testing.assert_close(actual["y"], (base + branch).to(dtype), rtol=0, atol=1e-6)


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
def test_which_rows_are_few(rows, rank, adapter_dtype, widened):
    """As measured: where the products grow, what they take outgrows what they take to start."""
    x, weight = torch.randn(rows, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    A, B = torch.randn(rank, 40, dtype=adapter_dtype), torch.randn(24, rank, dtype=adapter_dtype)
    y, S = aten.forward(x, weight, A, B, None, 1.0, None, 1.0)
    assert y.dtype == torch.bfloat16
    assert S.dtype == (torch.float32 if widened else torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("rows", [3, 40])  # widened, and not
def test_dropout_in_half_precision_is_the_references(rows, adapter_dtype, dtype):
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
