"""Layers other than nn.Linear: Conv1D, Conv2d, Embedding; modules that read weights directly."""

import copy
import warnings

import pytest
import torch
from models import ALL, Tiny, gpt2, tokens, train_like
from torch import nn

from fused_lora import (
    FusedLoRAConv1D,
    FusedLoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    apply_lora,
    disable_lora,
    unload_lora,
)


def test_conv1d_keeps_its_transposed_weight():
    model = gpt2()
    plain = copy.deepcopy(model)
    weight = model.transformer.h[0].attn.c_attn.weight
    apply_lora(model)
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is FusedLoRAConv1D
    assert layer.weight is weight
    assert layer.lora_A.shape == (8, 32)
    assert layer.lora_B.shape == (96, 8)
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert "nf=96, nx=32, rank=8" in repr(layer)
    assert set(plain.state_dict()) <= set(model.state_dict())
    model.load_state_dict(plain.state_dict())  # a plain model's state loads strictly


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_conv1d_gradients(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    from transformers.pytorch_utils import Conv1D

    plain = Conv1D(48, 40)
    nn.init.normal_(plain.bias)
    layer = FusedLoRAConv1D.from_conv1d(plain, rank=4, impl=impl)
    nn.init.normal_(layer.lora_B)
    linear = nn.Linear(40, 48)
    with torch.no_grad():
        linear.weight.copy_(plain.weight.t())
        linear.bias.copy_(plain.bias)
    twin = FusedLoRALinear.from_linear(linear, rank=4, impl="reference")
    twin.load_state_dict({"lora_A": layer.lora_A, "lora_B": layer.lora_B}, strict=False)
    x, dy = torch.randn(17, 40, requires_grad=True), torch.randn(17, 48)
    for got, expected in zip(
        torch.autograd.grad(layer(x), [x, layer.lora_A, layer.lora_B], dy),
        torch.autograd.grad(twin(x), [x, twin.lora_A, twin.lora_B], dy),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_multihead_attention_is_refused_with_the_reason():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        apply_lora(model, target_modules=["out_proj"])
    with pytest.warns(UserWarning, match=r"self_attn\.out_proj \(nn\.MultiheadAttention"):
        assert apply_lora(model) == ["linear1", "linear2"]
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(model, exclude_modules=["out_proj"])


@pytest.mark.parametrize("grad", [True, False])
def test_the_encoders_fast_path_sees_the_adapters(grad):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1:, 3:] = True
    apply_lora(model, rank=2, exclude_modules=["out_proj"])
    train_like(model, 1.0)
    with torch.set_grad_enabled(grad):
        base = copy.deepcopy(model)
        with disable_lora(base):
            off = base(x, src_key_padding_mask=mask)
        on = model(x, src_key_padding_mask=mask)
    # The same model with its adapters merged into plain layers, which may use the fast path.
    unload_lora(model)
    assert model.use_nested_tensor
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        merged = model(x, src_key_padding_mask=mask)
    real = ~mask
    torch.testing.assert_close(on[real], merged[real], rtol=1e-4, atol=1e-4)
    assert (on[real] - off[real]).abs().max() > 0.1


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(3, 8, 4, padding="same"),
        nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
    ],
    ids=str,
)
def test_conv2d_is_the_convolution_with_the_merged_weight(conv):
    layer = LoRAConv2d.from_conv2d(copy.deepcopy(conv), rank=4).double()
    for p in layer.adapter_parameters().values():
        nn.init.normal_(p)
    x = torch.randn(2, 3, 12, 11, dtype=torch.float64)
    on = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), on)


def test_compiles_whole():
    model, ids = Tiny(), tokens(4, 6, vocabulary=20)
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_conv2d_drops_entries_of_its_input_on_the_adapters_way():
    layer = LoRAConv2d.from_conv2d(nn.Conv2d(1, 2, 1), rank=1, dropout=0.5)
    nn.init.ones_(layer.lora_A)
    nn.init.ones_(layer.lora_B)
    base = nn.functional.conv2d(torch.ones(1, 1, 40, 40), layer.weight, layer.bias)
    added = (layer(torch.ones(1, 1, 40, 40)) - base) / layer.scaling
    assert set(added.round(decimals=4).unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (added == 0).float().mean() < 0.6
    layer.eval()
    torch.testing.assert_close(layer(torch.ones(1, 1, 40, 40)), base + layer.scaling)


@pytest.mark.parametrize("name", ["table", "conv"])
def test_half_precision_bases_keep_float32_adapters(name):
    model, ids = Tiny().bfloat16(), tokens(4, 6, vocabulary=20)
    apply_lora(model, target_modules=[name], rank=2)
    layer = getattr(model, name)
    assert layer.lora_A.dtype == torch.float32
    train_like(model)
    x = ids if name == "table" else torch.randn(2, 1, 6, 12).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()(x if name == "table" else x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_embedding_keeps_its_options():
    table = nn.Embedding(6, 4, padding_idx=2, scale_grad_by_freq=True)
    layer = LoRAEmbedding.from_embedding(table, rank=3)
    assert layer.lora_B.std() > 0.3
    nn.init.normal_(layer.lora_A)
    layer(torch.tensor([1, 1, 2, 3])).sum().backward()
    by_token = layer.lora_A.grad.t()
    assert not by_token[2].any()
    torch.testing.assert_close(by_token[1], by_token[3])  # token 1 occurs twice: halved
