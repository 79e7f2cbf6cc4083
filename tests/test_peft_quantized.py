"""The patch on quantised bases: the base runs its own product, the adapter is fused beside it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import llama, tokens
from torch import nn

from fused_lora import patch_peft, unpatch_peft
from fused_lora.ops import cpu_gemm
from support import UNIT_ROUNDOFF, kept_bytes, relative_rms

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("unpatched")

BF16, FP32 = torch.bfloat16, torch.float32


def nf4(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(
        *linear.weight.shape[::-1], bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")  # this quantises


def int8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(*linear.weight.shape[::-1], bias=False, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def torchao_int8(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


QUANTIZED = {
    "nf4": (nf4, "is_loaded_in_4bit", "Linear4bit"),
    "int8": (int8, "is_loaded_in_8bit", "Linear8bitLt"),
    "torchao": (torchao_int8, None, "TorchaoLoraLinear"),
}


def adapted(how: str, dtype, cast=True, **config) -> nn.Module:
    """A quantised layer, a plain one that stays in full precision, and their adapters."""
    quantize, flag, _ = QUANTIZED[how]
    torch.manual_seed(0)
    first = nn.Linear(128, 64, bias=False, dtype=dtype)
    second = nn.Linear(64, 8, dtype=dtype)
    model = nn.Sequential(quantize(first.requires_grad_(False)), nn.Tanh(), second)
    if flag:
        setattr(model, flag, True)
    options = {"r": 4, "target_modules": ["0", "2"]} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao: PEFT cannot merge a bare layer
        model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=cast)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
    return model


def exact(model: nn.Module, x: torch.Tensor) -> dict:
    """Results in float64, with the first layer's dequantised weight."""
    wide = copy.deepcopy(model)
    layer = wide.base_model.model[0]
    linear = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        linear.weight = nn.Parameter(layer.base_layer(torch.eye(128, dtype=x.dtype)).t())
    layer.base_layer = linear.requires_grad_(False)
    return results(wide.double(), x.double())


def results(model: nn.Module, x: torch.Tensor, context=None) -> dict:
    x = x.clone().requires_grad_()
    model.zero_grad()
    with context or torch.enable_grad():
        y = model(x)
    y.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


CASES = [(FP32, True), (BF16, True), (BF16, False)]


@pytest.mark.parametrize(("dtype", "cast"), CASES, ids=["fp32", "bf16, fp32 adapters", "bf16"])
@pytest.mark.parametrize("how", QUANTIZED)
@pytest.mark.parametrize("everywhere", [True, False], ids=["class", "model"])
def test_parity(how, dtype, cast, everywhere):
    model = adapted(how, dtype, cast)
    layer = model.base_model.model[0]
    assert type(layer).__name__ == QUANTIZED[how][2]
    x = torch.randn(5, 128).to(dtype)
    expected = results(model, x)
    patch_peft(None if everywhere else model)
    got = results(model, x)
    assert "_LoRALinear" in type(model(x).grad_fn).__name__
    assert "_LoRALinear" in type(layer(x).grad_fn).__name__
    assert got.keys() == expected.keys()
    unpatch_peft()
    wide = exact(model, x)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        theirs = relative_rms(value, wide[name])
        assert relative_rms(got[name], wide[name]) <= 2 * theirs + UNIT_ROUNDOFF[dtype], name
    assert all(torch.equal(v, expected[n]) for n, v in results(model, x).items())


@pytest.mark.parametrize("how", QUANTIZED)
def test_autocast(how):
    model, x = adapted(how, FP32), torch.randn(5, 128)
    expected = results(model, x, torch.autocast("cpu", BF16))
    patch_peft(model)
    got = results(model, x, torch.autocast("cpu", BF16))
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert relative_rms(got[name], value) <= 2.0**-6, name


@pytest.mark.parametrize("how", QUANTIZED)
def test_less_is_kept_for_backward(how):
    """With PEFT's default float32 adapters on a half-precision model, and with dropout."""
    model = adapted(how, BF16, lora_dropout=0.1).train()
    x = torch.randn(256, 128, dtype=BF16, requires_grad=True)
    expected = kept_bytes(model, x)
    patch_peft(model)
    assert kept_bytes(model, x) < 0.6 * expected


@pytest.mark.parametrize("how", QUANTIZED)
def test_report(how, monkeypatch):
    monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset())
    report = patch_peft(adapted(how, BF16))
    name = "base_model.model.0"
    assert report.layers == {name: None, "base_model.model.2": None}
    assert list(report.beside) == [name]
    assert len(report.narrowed) == 2
    monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset([BF16]))
    assert "base_model.model.2" not in patch_peft(adapted(how, BF16)).narrowed
    assert report.summary.startswith(
        "2 of 2 LoRA layers fused, 1 of them beside their base layer's own forward: "
    )
    assert f"  {name}: fused beside its base: {report.beside[name]}" in str(report).splitlines()


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_merging_and_disabling_stay_pefts(how):
    x, outputs = torch.randn(5, 128), {}
    for patched in (False, True):
        model = adapted(how, FP32).eval()
        if patched:
            patch_peft(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about rounding
            with model.disable_adapter():
                disabled = model(x)
            model.merge_adapter()
            merged = model(x)
            model.unmerge_adapter()
            outputs[patched] = disabled, merged, model(x)
    assert all(map(torch.equal, outputs[True][:2], outputs[False][:2]))
    torch.testing.assert_close(outputs[True][2], outputs[False][2])
    assert not torch.equal(outputs[True][0], outputs[True][1])


def test_qlora_trains_alike(tmp_path):
    """The usual QLoRA steps: quantise while loading, then prepare by PEFT, with checkpointing."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    llama().save_pretrained(tmp_path)
    ids, losses = tokens(), {}
    for patched in (False, True):
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=FP32
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map="cpu"
        )
        model = peft.prepare_model_for_kbit_training(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        if patched:
            report = patch_peft(model)
            assert None not in report.beside.values()
            assert len(report.beside) == len(report.layers) > 0
            assert set(report.layers.values()) == {None}
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[patched] = []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[patched].append(loss.item())
    assert losses[False][-1] < losses[False][0]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=0)
