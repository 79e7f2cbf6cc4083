"""The patch as a whole: models that train, the life cycle, scopes, reports, compilers, Trainer."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from models import gpt2, llama, tokens
from torch import nn

from fused_lora import PatchReport, patch_peft, unpatch_peft
from fused_lora.ops import cpu_gemm
from support import kept_bytes

peft = pytest.importorskip("peft")
from peft.tuners.lora import Linear  # noqa: E402
from peft_nets import first, net, noisy, second_adapter  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

FORWARD = Linear.forward


def test_dropout_drops_on_the_adapters_way_alone():
    model = net(lora_dropout=0.25, r=24, lora_alpha=24)
    layer = first(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(24))
        layer.lora_B["default"].weight.copy_(torch.eye(16, 24))
    patch_peft(model)
    x = torch.ones(2000, 24)
    added = layer.train()(x) - layer.base_layer(x)
    torch.testing.assert_close(added, 4 / 3 * (added > 0.5), atol=1e-4, rtol=0)
    assert abs((added < 0.5).float().mean() - 0.25) < 0.01
    torch.manual_seed(3)
    once = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), once)
    assert not torch.equal(layer(x), once)


def test_a_patched_model_on_the_meta_device_gives_shapes():
    """PyTorch raises on a query of autocast for a device without it, such as meta."""
    model = net().to("meta")
    report = patch_peft(model)
    y = model(torch.empty(5, 24, device="meta"))
    assert "_LoRALinear" in type(first(model)(torch.empty(5, 24, device="meta")).grad_fn).__name__
    assert y.device.type == "meta", report


@pytest.mark.parametrize("make", [gpt2, llama])
def test_whole_models_train_alike(make):
    base, ids = make(), tokens()
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            copy.deepcopy(base),
            peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=make is gpt2),
        )
        if patched:
            report = patch_peft(model)
            fused = f"{len(report.layers)} of {len(report.layers)} LoRA layers fused"
            assert report.summary.partition(";")[0] == fused
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = []
        for _ in range(10):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert losses[0][-1] < losses[0][0] - 0.1


def test_the_life_cycle_is_pefts(tmp_path):
    model, x = net(), torch.randn(5, 24)
    keys = set(model.state_dict())
    patch_peft(model)
    on = model(x)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        off = model(x)
    assert (on - off).abs().max() > 0.1
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["first", "second"]))
    noisy(model)
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    patched = model(x)
    unpatch_peft(model)
    torch.testing.assert_close(model(x), patched)
    model.set_adapter("default")
    model.load_adapter(str(tmp_path), "loaded")
    model.set_adapter("loaded")
    patch_peft(model)
    torch.testing.assert_close(model(x), on)
    torch.testing.assert_close(model.merge_and_unload()(x), on)


def test_less_is_kept_for_backward():
    model = net(torch.bfloat16, lora_dropout=0.1).train()
    x = torch.randn(512, 24).bfloat16().requires_grad_()
    theirs = kept_bytes(first(model), x)
    patch_peft(model)
    assert kept_bytes(first(model), x) < 0.5 * theirs


def test_scopes():
    mine, other, x = net(), net(), torch.randn(5, 24)
    keys = set(vars(first(other)))
    patch_peft(mine)
    assert Linear.forward is not FORWARD
    report = patch_peft(mine)  # twice is once
    assert isinstance(report, PatchReport)
    assert set(vars(first(other))) == keys
    twin = copy.deepcopy(mine)
    torch.testing.assert_close(twin(x), other(x))
    unpatch_peft(other)
    assert Linear.forward is not FORWARD
    unpatch_peft(mine)
    assert Linear.forward is FORWARD
    assert set(vars(first(mine))) == keys
    patch_peft()
    with pytest.raises(ValueError, match=r"expected unpatch_peft\(\)"):
        unpatch_peft(mine)
    unpatch_peft()
    assert Linear.forward is FORWARD
    with pytest.raises(ValueError, match="a model with PEFT's LoRA layers, got a Sequential"):
        patch_peft(nn.Sequential(nn.Linear(3, 3)))


def test_a_later_replacement_is_not_overwritten(monkeypatch):
    patch_peft()
    mine = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: mine(self, x))
    with pytest.raises(RuntimeError, match="got another: undo first"):
        unpatch_peft()
    monkeypatch.undo()


def test_report_says_whose_adapters_are_narrowed(monkeypatch):
    said = "2 with float32 adapters compute in half precision"
    for emulated in (frozenset(), frozenset([torch.bfloat16])):
        monkeypatch.setattr(cpu_gemm, "EMULATED", emulated)
        assert (said in patch_peft(net(torch.bfloat16)).summary) is not bool(emulated)


def test_report():
    model = second_adapter(net())
    report = patch_peft(model)
    assert (
        report.summary == "0 of 2 LoRA layers fused; 2 keep PEFT's forward: 2 active adapters (2)"
    )
    model.base_model.set_adapter("default")
    report = patch_peft(model)
    assert str(report).splitlines() == [
        "2 of 2 LoRA layers fused",
        "  base_model.model.first: fused",
        "  base_model.model.second: fused",
    ]
    assert "<td>base_model.model.first</td><td>fused</td>" in report._repr_html_()
    assert patch_peft().summary.startswith("PEFT's LoRA layers run fused where they are plain")


def test_other_layers_are_named():
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["wte", "c_attn"]))
    report = patch_peft(model)
    assert (
        report.summary
        == "2 of 3 LoRA layers fused; 1 keep PEFT's forward: a lora.Embedding layer (1)"
    )


def test_compiled_models_see_the_patch():
    model, x = net(), torch.randn(5, 24)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    patch_peft(model)
    torch.testing.assert_close(compiled(x), expected)
    x = x.requires_grad_()
    compiled(x).sum().backward()
    grad = first(model).lora_A["default"].weight.grad.clone()
    model.zero_grad()
    unpatch_peft(model)
    model(x).sum().backward()
    torch.testing.assert_close(grad, first(model).lora_A["default"].weight.grad)


def test_pickles_load_where_nothing_is_patched():
    model, x = net(), torch.randn(5, 24)
    expected = model(x)
    patch_peft(model)
    file = io.BytesIO()
    torch.save(model, file)
    unpatch_peft()
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)


def test_the_trainer_runs(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    curves = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
        if patched:
            patch_peft(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
