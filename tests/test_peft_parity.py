"""Against PEFT's own layer with the same weights: the output and every gradient."""

import copy
import warnings

import pytest
import torch
from models import gpt2, llama, tokens
from torch import nn

from fused_lora import FusedLoRALinear, apply_lora, fused_lora_linear, lora_layers
from support import relative_rms, run

peft = pytest.importorskip("peft")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def pair(dtype, *, rank=8, alpha=16, dropout=0.0, rslora=False, bias=True, impl="torch"):
    """A PEFT layer with PEFT's default adapter dtype, and ours with the same values."""
    model = nn.Sequential(nn.Linear(40, 24, bias=bias)).to(dtype)
    config = peft.LoraConfig(
        target_modules=["0"], r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora
    )
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    nn.init.normal_(theirs.lora_B["default"].weight)
    ours = FusedLoRALinear.from_linear(
        theirs.base_layer, rank=rank, alpha=alpha, dropout=dropout, use_rslora=rslora, impl=impl
    )
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
    return theirs, (A, B), ours, (ours.lora_A, ours.lora_B)


def results(layer, adapter, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y, *torch.autograd.grad(y, (x, *adapter), dy))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_output_and_gradients(impl, dtype, training):
    if impl == "triton":
        pytest.importorskip("triton")
    theirs, their_adapter, ours, our_adapter = pair(
        dtype, dropout=0.0 if training else 0.5, impl=impl
    )
    theirs.train(training)
    ours.train(training)
    assert ours.lora_A.dtype == their_adapter[0].dtype == FP32
    assert ours.scaling == theirs.scaling["default"]
    x, dy = torch.randn(3, 17, 40).to(dtype), torch.randn(3, 17, 24).to(dtype)
    got, expected = results(ours, our_adapter, x, dy), results(theirs, their_adapter, x, dy)
    bound = 2.0**-20 if dtype == FP32 else 2.0**-7
    for name, a, b in zip(("y", "dx", "dA", "dB"), got, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert relative_rms(a, b) <= bound, name


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_merge_and_disabled(rslora):
    theirs, _, ours, _ = pair(FP32, alpha=5, rslora=rslora, bias=False)
    x = torch.randn(17, 40)
    assert ours.scaling == theirs.scaling["default"]
    base = nn.functional.linear(x, theirs.base_layer.weight)
    ours.merge()
    merged = ours.weight.clone()
    ours.unmerge()
    theirs.merge()
    torch.testing.assert_close(merged, theirs.base_layer.weight)
    theirs.unmerge()
    ours.enabled = False
    torch.testing.assert_close(ours(x), base)


def test_dropout_falls_where_pefts_does():
    """Dropout acts on the adapter branch only and divides by 1-p: equal masks, equal results."""
    theirs, (A, B), ours, _ = pair(FP32, dropout=0.4)
    x = torch.randn(17, 40)
    torch.manual_seed(8)
    shown = fused_lora_linear(
        torch.ones(17, 40), torch.zeros(40, 40), torch.eye(40), torch.eye(40), dropout_p=0.4
    )

    class SameMask(nn.Module):
        def forward(self, inputs):
            return inputs * shown

    theirs.lora_dropout["default"] = SameMask()
    inputs = {"x": x, "lora_A": ours.lora_A, "lora_B": ours.lora_B}
    dy = torch.randn(17, 24)
    torch.manual_seed(8)
    got = run(
        lambda **kw: fused_lora_linear(
            **kw, weight=ours.weight, bias=ours.bias, scaling=ours.scaling, dropout_p=0.4
        ),
        inputs,
        dy,
    )
    y, dx, dA, dB = results(theirs, (A, B), x, dy)
    for name, expected in (("y", y), ("dx", dx), ("dA", dA), ("dB", dB)):
        assert relative_rms(got[name], expected) <= 2.0**-20, name


@pytest.mark.parametrize("make", [gpt2, llama])
def test_twenty_training_steps_of_a_whole_model(make):
    """Losses and adapters equal PEFT's up to float32 rounding, which Adam's division amplifies."""
    base = make()
    ours = copy.deepcopy(base).train()
    apply_lora(ours, rank=4, alpha=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about Conv1D
        config = peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=8)
        theirs = peft.get_peft_model(copy.deepcopy(base), config).train()
    inner = dict(theirs.base_model.model.named_modules())
    pairs = {
        f"{name}.{which}": (getattr(layer, which), getattr(inner[name], which)["default"].weight)
        for name, layer in lora_layers(ours).items()
        for which in ("lora_A", "lora_B")
    }
    with torch.no_grad():
        for mine, other in pairs.values():
            other.copy_(mine)
    start = {name: mine.detach().clone() for name, (mine, _) in pairs.items()}
    optimizers = [
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        for model in (ours, theirs)
    ]
    first = last = None
    batch = tokens(4, 16)
    for _ in range(20):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        first, last = first or losses[0], losses[0]
    assert last < first - 0.01
    for name, (mine, other) in pairs.items():
        moved = (other - start[name]).norm()
        assert moved > 0, name
        assert (mine - other).norm() <= 0.01 * moved, name
