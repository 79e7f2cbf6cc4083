"""Bad input: a ValueError or TypeError that names what was expected and what was passed."""

import pytest
import torch

from fused_lora import FusedLoRALinear, explain, fused_lora_add, fused_lora_linear
from fused_lora.ops.validation import check_tensors
from support import make_inputs

BF16, FP32 = torch.bfloat16, torch.float32


def tensors(**changes):
    good = {
        "x": torch.randn(5, 8),
        "weight": torch.randn(6, 8),
        "lora_A": torch.randn(2, 8),
        "lora_B": torch.randn(6, 2),
        "bias": torch.randn(6),
    }
    return good | changes


BAD_CALLS = [
    ({"x": torch.randn(5, 7)}, ValueError, r"x of shape \(\.\.\., 8\), got \(5, 7\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x of shape \(\.\.\., 8\), got \(\)"),
    ({"x": torch.ones(5, 8, dtype=torch.int64)}, TypeError, r"x in one of .*, got torch\.int64"),
    ({"x": torch.ones(5, 8, dtype=torch.complex64)}, TypeError, r"got torch\.complex64"),
    ({"x": [1.0]}, TypeError, "x to be a Tensor, got list"),
    ({"x": torch.randn(5, 8).half()}, TypeError, r"dtype torch\.float32, got torch\.float16"),
    ({"x": torch.randn(5, 8, device="meta")}, ValueError, "on x's device meta, got cpu"),
    ({"weight": torch.randn(6)}, ValueError, r"weight of shape \(out, in\), got \(6,\)"),
    ({"weight": torch.randn(6, 8, requires_grad=True)}, ValueError, "a frozen weight"),
    ({"lora_A": torch.randn(2, 9)}, ValueError, r"lora_A of shape \(rank, 8\), got \(2, 9\)"),
    ({"lora_A": torch.randn(0, 8)}, ValueError, r"rank >= 1, got \(0, 8\)"),
    ({"lora_A": torch.ones(2, 8, dtype=torch.int8)}, TypeError, r"lora_A in one of"),
    ({"lora_B": torch.randn(2, 6)}, ValueError, r"lora_B of shape \(6, 2\), got \(2, 6\)"),
    ({"bias": torch.randn(5)}, ValueError, r"bias of shape \(6,\), got \(5,\)"),
    ({"bias": torch.randn(6).long()}, TypeError, "bias in one of"),
    ({"bias": 0.0}, TypeError, "bias to be a Tensor or None, got float"),
    ({"scaling": "2"}, TypeError, "scaling to be a float or a 0-d Tensor, got str"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling of shape \(\), got \(2,\)"),
    ({"scaling": torch.tensor(1.0, requires_grad=True)}, ValueError, "a constant scaling"),
    ({"dropout_p": 1.0}, ValueError, r"dropout in \[0, 1\), got 1\.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout in \[0, 1\), got -0\.1"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout in \[0, 1\), got nan"),
    ({"dropout_p": "half"}, TypeError, "dropout to be a number"),
    (
        {"impl": "cuda"},
        ValueError,
        "impl to be one of auto, triton, .*reference, got 'cuda'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=[c[2] for c in BAD_CALLS])
def test_bad_calls(changes, error, message):
    with pytest.raises(error, match=message):
        fused_lora_linear(**tensors(**changes))


def test_plain_tensors_need_no_further_checks():
    """The fast check accepts the common cases and leaves the others to the full check."""
    good = tensors(scaling=2.0)
    parameters = {
        name: torch.nn.Parameter(t, requires_grad=name != "weight") if name != "scaling" else t
        for name, t in good.items()
    }
    for usual in (good, parameters, good | {"bias": None}, good | {"scaling": torch.tensor(2.0)}):
        assert check_tensors(**usual)
    subclass = torch.randn(6, 8).as_subclass(type("Special", (torch.Tensor,), {}))
    for unusual in ({"weight": subclass}, {"bias": torch.randn(6).half()}, {"x": good["x"].half()}):
        assert not check_tensors(**good | unusual)


BAD_LAYERS = [
    ({"rank": 0}, ValueError, "rank >= 1, got 0"),
    ({"rank": 1.5}, TypeError, r"rank to be an int, got 1\.5"),
    ({"rank": True}, TypeError, "rank to be an int, got True"),
    ({"alpha": "16"}, TypeError, "alpha to be a number"),
    ({"alpha": float("nan")}, ValueError, "a finite alpha, got nan"),
    ({"dropout": 1}, ValueError, r"dropout in \[0, 1\), got 1"),
    ({"impl": "fast"}, ValueError, "got 'fast'"),
    ({"dtype": torch.int32}, TypeError, r"dtype to be one of .*, got torch\.int32"),
    ({"dtype": torch.complex64}, TypeError, r"got torch\.complex64"),
    ({"adapter_dtype": torch.int8}, TypeError, r"adapter_dtype to be one of .*, got torch\.int8"),
    ({"in_features": -1}, ValueError, "in_features >= 0, got -1"),
    ({"out_features": 2.0}, TypeError, r"out_features to be an int, got 2\.0"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD_LAYERS, ids=[c[2] for c in BAD_LAYERS]
)
def test_bad_layers(changes, error, message):
    with pytest.raises(error, match=message):
        FusedLoRALinear(**{"in_features": 8, "out_features": 6} | changes)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_plain_states_check_alike(state):
    layer = FusedLoRALinear(8, 6, rank=2)
    if state == "merged":
        layer.merge()
    layer.enabled = state != "disabled"
    with pytest.raises(ValueError, match=r"x of shape \(\.\.\., 8\), got \(5, 7\)"):
        layer(torch.randn(5, 7))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        layer(torch.ones(5, 8, dtype=torch.int64))
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="a frozen weight"):
        layer(torch.randn(5, 8))


def test_from_linear_refuses_a_computed_weight():
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 6))
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got ParametrizedLinear"):
        FusedLoRALinear.from_linear(linear)


def test_explain_checks_its_arguments():
    x, weight, lora_A = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8)
    with pytest.raises(TypeError, match="expected an adapted layer"):
        explain(torch.nn.Linear(8, 6))
    with pytest.raises(ValueError, match="got 'bogus'"):
        explain(x, weight, lora_A, impl="bogus")
    with pytest.raises(ValueError, match=r"lora_A of shape \(rank, 8\), got \(2, 7\)"):
        explain(x, weight, torch.randn(2, 7))
    for odd in (torch.randn(8), torch.randn(1, 6, 8)):
        with pytest.raises(ValueError, match=r"expected weight \(out, in\) and lora_A"):
            explain(x, odd, lora_A)
    with pytest.raises(ValueError, match="tokens >= 0"):
        explain(FusedLoRALinear(8, 6), tokens=-1)
    with pytest.raises(ValueError, match=r"got 7\.0"):
        explain(x, weight, lora_A, dropout_p=7.0)


def test_a_layer_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="x to be a Tensor, got list"):
        FusedLoRALinear(8, 6)([1.0])


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "base"])
def test_what_has_a_device_need_not_be_a_tensor(name):
    """NumPy's arrays have one, and so have many modules."""
    inputs = make_inputs(5, 8, 6, 2, FP32) | {"base": torch.randn(5, 6)}
    inputs[name] = inputs[name].numpy()
    x, weight, A, B, base = (inputs[n] for n in ("x", "weight", "lora_A", "lora_B", "base"))
    expected = pytest.raises(TypeError, match=f"expected {name} to be a Tensor, got ndarray")
    if name != "base":
        with expected:
            fused_lora_linear(x, weight, A, B)
    if name != "weight":
        with expected:
            fused_lora_add(base, x, A, B)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "bias", "scaling"])
def test_every_tensor_must_be_on_the_device_of_x(name):
    inputs = make_inputs(5, 8, 6, 2, FP32, scaling=torch.tensor(1.0))
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"expected {name} on x's device cpu, got meta"):
        fused_lora_linear(**inputs)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_plain_states_check_the_dtype_of_x(state):
    layer = FusedLoRALinear(8, 6, rank=2)
    if state == "merged":
        layer.merge()
    layer.enabled = state != "disabled"
    with pytest.raises(TypeError, match=r"dtype torch\.float32, got torch\.float16"):
        layer(torch.randn(5, 8).half())
    with torch.autocast("cpu", dtype=BF16):
        assert layer(torch.randn(5, 8).half()).dtype == BF16
