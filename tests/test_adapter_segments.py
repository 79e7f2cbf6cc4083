"""Many adapters in one batch, against a run of each adapter on its own samples."""

import pytest
import torch
import torch.nn.functional as F
from models import gpt2, llama, tokens
from torch import nn

from fused_lora import (
    FusedLoRALinear,
    adapter_losses,
    adapter_parameters,
    adapter_segments,
    add_adapter,
    apply_lora,
    clip_adapter_grad_norm_,
    lora_layers,
    patch_peft,
)

peft = pytest.importorskip("peft")
from mixed_batches import NAMES, K, N, apart, assert_equal, net, noisy, peft_net, samples, together  # noqa: E402

from support import needs_triton, relative_rms  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

SORTED = ["b", "b", "c", "default", "default"]


@pytest.mark.parametrize("make", [net, peft_net])
@pytest.mark.parametrize("names", [NAMES, SORTED, [None, "c"], ["b"]], ids=str)
def test_equals_a_run_for_each_adapter(make, names):
    model, x = make(), samples(names)
    got, expected = together(model, x, names), apart(model, x, names)
    assert_equal(got, expected)
    for name in ("default", "b", "c", "d"):
        assert (got[f"{name} 0"] is None) == (name not in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layers_bits_are_those_of_separate_calls(dtype):
    """With one segment of at least four rows per adapter."""
    layer = net(dtype=dtype, impl="torch")[:1]
    x = torch.randn(5, 4, K).to(dtype)
    got, expected = together(layer, x, SORTED), apart(layer, x, SORTED)
    for name, value in expected.items():
        if name in SORTED:
            continue  # a sum over the batch
        assert (got[name] is None) == (value is None), name
        assert value is None or torch.equal(got[name], value), name


@pytest.mark.parametrize("make", [gpt2, llama])
def test_whole_models(make):
    """Chains of one input and gated MLPs run layer by layer."""
    model, ids = make().double(), tokens(6, 9)
    apply_lora(model, rank=4)
    add_adapter(model, "b", rank=2, alpha=5)
    add_adapter(model, "c", rank=6, dropout=0.1)
    noisy(model)
    run = lambda model, ids: model(input_ids=ids).logits  # noqa: E731
    got, expected = together(model, ids, NAMES, run), apart(model, ids, NAMES, run)
    assert_equal(got, expected, 1e-12)


def test_whole_models_of_peft():
    model = peft_net(llama, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    ids = tokens(6, 9)
    run = lambda model, ids: model(input_ids=ids).logits  # noqa: E731
    got, expected = together(model, ids, NAMES, run), apart(model, ids, NAMES, run)
    assert_equal(got, expected, 1e-12)


@needs_triton
@pytest.mark.parametrize("impl", ["triton:split", "triton:addmm"])
def test_layers_run_on_the_kernels(impl):
    model = net(dtype=torch.float32, impl=impl)
    x = samples(dtype=torch.float32)
    found = []
    for name in (impl, "torch"):
        for layer in (model[0], model[2]):
            layer.impl = name
        with adapter_segments(model, NAMES):
            y = model(x)
            wanted = [t for own in adapter_parameters(model, ["b", "c"]).values() for t in own]
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    for value, expected in zip(*found, strict=True):
        assert relative_rms(value, expected.double()) <= 1e-6


def test_layers_run_one_by_one_inside_and_together_outside(ran):
    model, ids = llama(), tokens(4, 16)
    apply_lora(model, rank=4)
    names = ["default"] * 4
    outside = model(input_ids=ids).logits
    before = dict(ran)
    assert before["chains"] > 0
    assert before["blocks"] > 0
    with adapter_segments(model, names):
        inside = model(input_ids=ids).logits
    assert dict(ran) == before
    torch.testing.assert_close(inside, outside)
    model(input_ids=ids)
    assert ran["blocks"] == 2 * before["blocks"]


def test_adapters_of_other_layers_in_peft():
    """A layer that an adapter does not target computes its base for that adapter's samples."""
    model = peft_net()
    model.add_adapter("only", peft.LoraConfig(r=3, target_modules=["2"]))
    patch_peft(model)
    noisy(model)
    names = ["only", "b", "only", "default"]
    x = samples(names)
    assert_equal(together(model, x, names), apart(model, x, names))
    assert_equal(together(model, x, ["only"] * 4), apart(model, x, ["only"] * 4))


def test_peft_mixes_the_same_in_inference():
    model, x = peft_net().eval(), samples()
    theirs = model(x, adapter_names=[n or "__base__" for n in NAMES])
    with adapter_segments(model, [n or "__base__" for n in NAMES]), torch.no_grad():
        torch.testing.assert_close(model(x), theirs)
    with torch.inference_mode(), adapter_segments(model, NAMES):
        torch.testing.assert_close(model(x), theirs)


@pytest.mark.parametrize("make", [net, peft_net])
def test_dropout(make):
    """Equal to the reference's with its masks; a dropout of an adapter is that adapter's own."""
    model, x = make(dropout=0.3).train(), samples(rows=7)
    torch.manual_seed(5)
    got = together(model, x, NAMES)
    torch.manual_seed(5)
    again = together(model, x, NAMES)
    assert torch.equal(got["y"], again["y"])
    changed = (got["y"] != together(model, x, NAMES)["y"]).flatten(1).any(1)
    without = {None, "b"} if make is net else {None}  # one b without dropout
    assert changed.tolist() == [name not in without for name in NAMES]
    assert_equal(together(model.eval(), x, NAMES), apart(model, x, NAMES))


def test_dropout_equals_the_reference():
    model, x = net(dropout=0.3, impl="torch"), samples(rows=7)
    torch.manual_seed(5)
    got = together(model, x, NAMES)
    for layer in lora_layers(model).values():
        layer.impl = "reference"
    torch.manual_seed(5)
    assert_equal(got, together(model, x, NAMES))


def test_dropout_keeps_the_mean():
    layer = FusedLoRALinear(K, N, bias=False, rank=K, alpha=K, dropout=0.25)
    model = nn.Sequential(layer)
    add_adapter(model, "b", rank=K, alpha=K, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        for A, B in adapter_parameters(model).values():
            A.copy_(torch.eye(K))
            B.copy_(torch.eye(N, K))
    with adapter_segments(model, ["default", "b"]):
        y = model(torch.ones(2, 2000, K))
    for part, p in zip(y, (0.25, 0.5), strict=True):
        torch.testing.assert_close(part, (part > 0.5) / (1 - p), atol=1e-4, rtol=0)
        assert abs((part < 0.5).float().mean() - p) < 0.01


@pytest.mark.parametrize("make", [net, peft_net])
def test_shapes_of_inputs(make):
    model, x = make(), samples()
    with adapter_segments(model, NAMES), torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model(x.flatten(0, 1)), y.flatten(0, 1))
        torch.testing.assert_close(model(x.view(6, 1, 5, K)), y.view(6, 1, 5, N))
        torch.testing.assert_close(model(x[:, 0]), y[:, 0])
        for wrong in (x[:4], x.flatten(0, 1)[:-1], x.transpose(0, 1), x[0, 0]):
            with pytest.raises(ValueError, match="expected an input of 6 samples"):
                model(wrong)
    with adapter_segments(model, ["b"]), torch.no_grad():
        assert model(x[0, 0]).shape == (N,)


class Doubled(nn.Linear):
    """A base that computes its own product."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("of_peft", [False, True])
def test_bases_that_compute_their_own_product(of_peft):
    model = nn.Sequential(Doubled(K, N)).double()
    if of_peft:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4))
        model.add_adapter("b", peft.LoraConfig(target_modules=["0"], r=2))
        patch_peft(model)
    else:
        apply_lora(model, target_modules=["0"], rank=4)
        add_adapter(model, "b", rank=2)
    noisy(model)
    names = ["b", None, "default", "b"]
    x = samples(names)
    assert_equal(together(model, x, names), apart(model, x, names))


@pytest.mark.parametrize("make", [net, peft_net])
def test_zeros_for_absent_adapters(make):
    model, x = make(), samples()
    expected = together(model, x, NAMES)
    got = together(model, x, NAMES, zeros=True)
    for i in range(4):
        assert expected[f"d {i}"] is None
        assert not got[f"d {i}"].any()
        expected[f"d {i}"] = got[f"d {i}"]
    assert_equal(got, expected, 0.0)


def test_losses():
    logits, labels = torch.randn(6, 5, 9, dtype=torch.float64), torch.randint(9, (6, 5))
    labels[0, :3] = labels[2] = labels[4] = -100
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    for given in (losses, losses.view(6, 5)):
        found = adapter_losses(given, NAMES, labels)
        assert list(found) == ["default", "c", "b"]
        for name in ("default", "c"):
            own = [i for i, n in enumerate(NAMES) if n == name]
            expected = F.cross_entropy(logits[own].flatten(0, 1), labels[own].flatten())
            torch.testing.assert_close(found[name], expected)
        assert found["b"] == 0
    torch.testing.assert_close(adapter_losses(losses, NAMES)["c"], losses[5:15].mean())
    broken = losses.clone()
    broken[:5] = float("nan")
    assert adapter_losses(broken, NAMES)["c"].isfinite()
    for call, hint in (
        ((losses[:-1], NAMES), "expected losses of 6 samples"),
        ((losses.mean(), NAMES), "not reduced, got shape"),
        ((losses.view(5, 6), NAMES), "expected losses of 6 samples"),
        ((losses, NAMES, labels[:4]), "expected labels of 30 entries"),
    ):
        with pytest.raises(ValueError, match=hint):
            adapter_losses(*call)


@pytest.mark.parametrize("make", [net, peft_net])
def test_clipping(make):
    model, x = make(), samples()
    before = together(model, x, NAMES)
    norms = clip_adapter_grad_norm_(model, 0.1)
    assert set(norms) == {"default", "b", "c"}
    for name, parameters in adapter_parameters(model, list(norms)).items():
        own = torch.stack([before[f"{name} {i}"].norm() for i in range(4)]).norm()
        torch.testing.assert_close(norms[name], own)
        now = torch.stack([p.grad.norm() for p in parameters]).norm()
        torch.testing.assert_close(now, own.clamp(max=0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [net, peft_net])
def test_compiled_models(make, nothing_compiled):
    model, x = make(), samples()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(x)
        torch.testing.assert_close(compiled(x), plain)
        for names in (NAMES, ["b"] * 6, NAMES):
            with adapter_segments(model, names):
                torch.testing.assert_close(compiled(x), model(x))
                assert not torch.allclose(model(x), plain)
            torch.testing.assert_close(compiled(x), plain)


def test_autocast():
    model, x = net(dtype=torch.float32), samples(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = together(model, x, NAMES), apart(model, x, NAMES)
    assert_equal(got, expected, 0.02)
