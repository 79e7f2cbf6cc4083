"""Initialisation as in PEFT, PiSSA's split of the weight, and DoRA against PEFT and its paper."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import Tiny, gpt2, tokens, train_like
from torch import nn

from fused_lora import FusedLoRALinear, apply_lora, explain, lora_parameters, unload_lora
from support import UNIT_ROUNDOFF, relative_rms, textbook

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_distributions_are_pefts(init):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["0"], r=16, init_lora_weights=True if init == "default" else init
    )
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(600, 400)), config).base_model.model[0]
    ours = FusedLoRALinear(600, 400, rank=16, init=init)
    pairs = [
        (ours.lora_A, theirs.lora_A["default"].weight),
        (ours.lora_B, theirs.lora_B["default"].weight),
    ]
    for mine, other in pairs:
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05)
        assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.3)
    update = ours.lora_B @ ours.lora_A
    assert update.abs().max() <= 1e-5 * (ours.lora_B.norm() * ours.lora_A.norm()).clamp_min(1e-30)
    assert (ours.lora_B.std() > 0) == (init == "orthogonal")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"init": "orthogonal", "rank": 3}, "even rank"),
        ({"init": "pissa", "rank": 9}, "rank <= 8 for init='pissa'"),
        ({"init": "pissa", "alpha": 0}, "alpha > 0"),
        ({"init": "olora"}, "default, gaussian, orthogonal, pissa, got 'olora'"),
    ],
)
def test_impossible_initialisations(arguments, hint):
    with pytest.raises(ValueError, match=hint):
        FusedLoRALinear(8, 8, **arguments)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_pissa_is_pefts(dtype):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(40, 24, dtype=dtype)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(linear)),
        peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, init_lora_weights="pissa"),
    ).base_model.model[0]
    ours = FusedLoRALinear.from_linear(linear, rank=4, alpha=6, init="pissa")
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    # PEFT rounds its factors to the base's dtype before it upcasts them.
    assert relative_rms(ours.lora_B @ ours.lora_A, product) <= 4 * UNIT_ROUNDOFF[dtype]
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight, rtol=1e-2, atol=1e-5)
    sigma = torch.linalg.svdvals(linear.weight.float())
    residual = torch.linalg.svdvals(ours.weight.float())
    torch.testing.assert_close(residual[:20], sigma[4:], rtol=0.02, atol=1e-3)


def test_pissa_never_edits_the_weight_it_came_from():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    weight, x = model[0].weight, torch.randn(5, 16)
    values, expected = weight.clone(), model(x)
    apply_lora(model, rank=4, init="pissa")
    assert torch.equal(weight, values)
    assert model[0].weight is not weight
    torch.testing.assert_close(model(x), expected)
    for layer in model:
        layer.enabled = False
    assert torch.equal(model(x), expected)
    for layer in model:
        layer.enabled = True
    train_like(model)
    on = model(x)
    model[0].merge()  # each layer has a weight of its own now, so the tie does not matter
    model[1].merge()
    torch.testing.assert_close(model(x), on, rtol=1e-4, atol=1e-4)
    model[0].unmerge()
    model[1].unmerge()
    merged = unload_lora(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), on, rtol=1e-4, atol=1e-4)
    assert torch.equal(weight, values)
    unload_lora(model, merge=False)
    assert model[0].weight is weight
    assert model[1].weight is weight
    assert torch.equal(model(x), expected)


def test_pissa_states_moves_and_copies():
    layer = FusedLoRALinear(16, 12, rank=4, init="pissa")
    twin, x = FusedLoRALinear(16, 12, rank=4, init="pissa"), torch.randn(5, 16)
    nn.init.normal_(layer.lora_B)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), layer(x))
    for call in (twin.plain, lambda: setattr(twin, "enabled", False) or twin(x)):
        with pytest.raises(RuntimeError, match="a base weight, got a PiSSA layer that loaded"):
            call()
    with pytest.raises(RuntimeError, match="together for a PiSSA layer"):
        layer.load_state_dict(nn.Linear(16, 12).state_dict())
    layer.load_state_dict(copy.deepcopy(layer).state_dict())  # its own state: the base stays known
    with pytest.raises(RuntimeError, match="got meta, where the weight it was made from"):
        copy.deepcopy(layer).to("meta")
    with pytest.raises(ValueError, match="a weight with values for init='pissa'"):
        FusedLoRALinear(16, 12, rank=4, init="pissa", device="meta")
    clone = copy.deepcopy(layer).double()
    original = layer.plain().weight
    assert clone.plain().weight.dtype == torch.float64
    assert torch.equal(clone.plain().weight, original.double())
    assert original.dtype == FP32


def test_gpt2_takes_pissa_in_its_transposed_weights():
    model, ids = gpt2(), tokens()
    expected = model(ids).logits
    apply_lora(model, rank=4, init="pissa")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(p.abs().sum() > 0 for p in lora_parameters(model))


def dora_in_float64(x, layer):
    """Equation 5 of the paper, with the norm treated as a constant."""
    W, A, B = (t.double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    V = W + layer.scaling * B @ A
    norm = V.detach().norm(dim=1, keepdim=True)
    y = F.linear(x.double(), layer.lora_magnitude_vector.double().unsqueeze(1) * V / norm)
    return y if layer.bias is None else y + layer.bias.double()


def dora_layer(dtype=FP32, **kwargs) -> FusedLoRALinear:
    layer = FusedLoRALinear(40, 24, rank=4, use_dora=True, dtype=dtype, **kwargs)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer.lora_magnitude_vector.mul_(torch.rand(24) + 0.5)
    return layer


@pytest.mark.parametrize("impl", ["torch", "reference", "triton"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dora_and_every_gradient(impl, dtype, bias):
    if impl == "triton":
        pytest.importorskip("triton")
    layer = dora_layer(dtype, impl=impl, bias=bias)
    x = torch.randn(3, 17, 40).to(dtype).requires_grad_()
    dy = torch.randn(3, 17, 24).to(dtype)
    inputs = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    y, exact = layer(x), dora_in_float64(x, layer)
    got = [y, *torch.autograd.grad(y, inputs, dy)]
    expected = [exact, *torch.autograd.grad(exact, inputs, dy.double())]
    assert y.dtype == dtype
    bound = 8 * UNIT_ROUNDOFF[dtype]
    for name, a, b in zip(("y", "dx", "dA", "dB", "dm"), got, expected, strict=True):
        assert relative_rms(a, b) <= bound, name


def test_dora_starts_as_the_plain_layer_merges_and_unmerges():
    linear, x = nn.Linear(40, 24), torch.randn(5, 40)
    layer = FusedLoRALinear.from_linear(linear, rank=4, use_dora=True)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.lora_magnitude_vector, linear.weight.norm(dim=1))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    ]
    layer = dora_layer()
    on, base = layer(x), layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), on)
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    fresh = FusedLoRALinear(40, 24, rank=4, use_dora=True)
    layer.merge(keep_base=False)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), on)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dora_is_pefts_with_dropout_too(dtype, training):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(40, 24, dtype=dtype)
    theirs = peft.get_peft_model(
        nn.Sequential(linear),
        peft.LoraConfig(target_modules=["0"], r=4, lora_dropout=0.4, use_dora=True),
    ).base_model.model[0]
    ours = FusedLoRALinear.from_linear(linear, rank=4, alpha=8, dropout=0.4, use_dora=True)
    adapter = dora_layer(dtype)
    with torch.no_grad():
        for mine, other, value in (
            (ours.lora_A, theirs.lora_A["default"].weight, adapter.lora_A),
            (ours.lora_B, theirs.lora_B["default"].weight, adapter.lora_B),
            (
                ours.lora_magnitude_vector,
                theirs.lora_magnitude_vector["default"].weight,
                adapter.lora_magnitude_vector,
            ),
        ):
            mine.copy_(value)
            other.copy_(value)
    x = torch.randn(64, 40).to(dtype)
    results = []
    for layer in (ours, theirs):
        layer.train(training)
        torch.manual_seed(3)  # both draw one F.dropout of x
        results.append(layer(x))
    assert results[0].dtype == results[1].dtype == dtype
    assert relative_rms(results[0], results[1]) <= 4 * UNIT_ROUNDOFF[dtype]


def test_dora_with_dropout_reaches_only_what_dora_adds():
    layer, x = dora_layer(dropout=0.5), torch.randn(64, 40)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    base = F.linear(x, layer.weight, layer.bias)
    norm = (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1)
    gain = layer.lora_magnitude_vector / norm
    zero_bias = torch.zeros(24)
    adapted = textbook(dropped, layer.weight, layer.lora_A, layer.lora_B, zero_bias, layer.scaling)
    expected = base + gain * adapted - F.linear(dropped, layer.weight)
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_dora_under_autocast_and_checkpointing():
    layer = dora_layer(dropout=0.3)
    x = torch.randn(8, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        assert layer(x).dtype == BF16
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        else:
            y = layer(x)
        grads.append(torch.autograd.grad(y.sum(), [x, *layer.adapter_parameters().values()]))
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_dora_takes_no_plain_state():
    layer = FusedLoRALinear(16, 12, rank=4, use_dora=True)
    with pytest.raises(RuntimeError, match="together for a DoRA layer"):
        layer.load_state_dict(nn.Linear(16, 12).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32], ids=str)
def test_dora_of_an_adapter_that_undoes_the_weight(dtype):
    layer = FusedLoRALinear(16, 64, bias=False, rank=16, alpha=16, use_dora=True, dtype=dtype)
    with torch.no_grad():  # s·B A = -0.99 W
        layer.lora_A.copy_(torch.eye(16))
        layer.lora_B.copy_(-0.99 * layer.weight)
    x = torch.randn(5, 16).to(dtype)
    unmerged = layer(x)
    exact = copy.deepcopy(layer).double()
    exact.merge()
    y, size = exact(x.double()), exact(x.double()).abs().max()
    assert (unmerged.double() - y).abs().max() <= 2 * torch.finfo(dtype).eps * 100 * size


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_computed_weight_is_computed_once_a_call(use_dora):
    """A stateful or random parametrization would otherwise differ between norm and product."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight * self.calls

    counted = Counted()
    layer = FusedLoRALinear(8, 6, rank=2, dropout=0.5, use_dora=use_dora)
    nn.utils.parametrize.register_parametrization(layer, "weight", counted, unsafe=True)
    before = counted.calls
    layer(torch.randn(5, 8))
    assert counted.calls == before + 1


def test_explain_says_what_dora_costs():
    assert "DoRA adds" in explain(dora_layer()).reason
    assert "second product" in explain(dora_layer(dropout=0.1)).reason
    layer = dora_layer()
    layer.merge()
    assert "DoRA" not in explain(layer).reason
    model = Tiny()
    apply_lora(model, target_modules=["table", "conv"])
    assert "look-up" in explain(model.table).reason
    assert "convolutions" in explain(model.conv).reason


def test_gaussian_spread():
    layer = FusedLoRALinear(4000, 8, rank=8, init="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert math.isclose(layer.lora_A.mean().item(), 0, abs_tol=0.01)
