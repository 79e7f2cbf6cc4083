"""Whole models: what gets an adapter, what trains, what merging and unloading leave."""

import copy
import warnings

import pytest
import torch
from models import Tiny, assert_unchanged, gpt2, llama, snapshot, tokens, train_like
from torch import nn

import fused_lora
from fused_lora import (
    FusedLoRAConv1D,
    FusedLoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    apply_lora,
    assert_only_lora_gradients,
    disable_lora,
    lora_layers,
    lora_param_groups,
    lora_parameters,
    merge_lora,
    parameter_summary,
    unload_lora,
    unmerge_lora,
)

ALL = ["table", "conv", "hidden", "out"]


def stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["0", "2.0", "2.1"]),
        ({"target_modules": ["2.1"]}, ["2.1"]),
        ({"target_modules": ["0"]}, ["0", "2.0"]),
        ({"target_modules": r"2\.\d"}, ["2.0", "2.1"]),
        ({"target_modules": r"\d"}, TypeError),  # 1 is a ReLU
        ({"exclude_modules": ["2.0"]}, ["0", "2.1"]),
        ({"exclude_modules": r"2\..*"}, ["0"]),
        ({"exclude_modules": ".*"}, ValueError),
    ],
    ids=str,
)
def test_targets(arguments, expected):
    model = stack()
    if isinstance(expected, type):
        before = snapshot(model)
        with pytest.raises(expected):
            apply_lora(model, **arguments)
        assert_unchanged(model, before)
        return
    assert apply_lora(model, **arguments) == expected
    adapted = {n for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    assert adapted == set(expected)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        (["c_atn"], "near names: c_attn"),
        ("c_attn", "no name matches in full"),
        (["zzz"], "names there are: c_attn, c_fc, c_proj"),
        ("*", "regular expression"),
    ],
)
def test_no_match_lists_near_names(target, hint):
    model = gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=hint):
        apply_lora(model, target_modules=target)
    assert_unchanged(model, before)


def test_all_linear_is_pefts_choice():
    peft = pytest.importorskip("peft")
    for make in (gpt2, llama):
        theirs = peft.get_peft_model(make(), peft.LoraConfig(target_modules="all-linear"))
        expected = {
            name.removeprefix("base_model.model.")
            for name, module in theirs.named_modules()
            if hasattr(module, "base_layer")
        }
        model = make()
        assert set(apply_lora(model)) == expected
        assert type(model.lm_head) is nn.Linear
    model = llama()
    assert "lm_head" in apply_lora(model, include_head=True)


def test_patterns():
    model = llama()
    apply_lora(
        model,
        rank=4,
        alpha=8,
        rank_pattern={"q_proj": 2, "^model.layers.0.mlp.up_proj": 6, r"0\.mlp\..*": 1},
        alpha_pattern={"v_proj": 12},
        use_rslora=True,
    )
    layer = model.model.layers[0]
    assert [layer.self_attn.q_proj.rank, layer.mlp.up_proj.rank, layer.mlp.down_proj.rank] == [
        2,
        6,
        1,
    ]
    assert model.model.layers[1].mlp.up_proj.rank == 4
    assert layer.self_attn.v_proj.scaling == 12 / 2
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=rf"{name}'s 'q_porj' to match"):
            apply_lora(llama(), **{name: {"q_porj": 2}})


def test_every_kind_starts_as_the_plain_model_and_trains_alone():
    model, ids = Tiny(), tokens(4, 6, vocabulary=20)
    expected = model(ids)
    assert apply_lora(model, rank=2, target_modules=ALL) == ALL
    kinds = [type(getattr(model, name)) for name in ALL]
    assert kinds == [LoRAEmbedding, LoRAConv2d, FusedLoRALinear, FusedLoRALinear]
    torch.testing.assert_close(model(ids), expected)
    train_like(model)
    model(ids).sum().backward()
    assert_only_lora_gradients(model)
    model.hidden.weight.requires_grad_()
    model.out.lora_A.grad = None
    with pytest.raises(RuntimeError, match=r"only, got one at hidden\.weight.*out\.lora_A"):
        assert_only_lora_gradients(model)


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
    model.load_state_dict(plain.state_dict())  # a plain model's state fits, strictly


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


def test_a_module_in_two_places_gets_one_adapter():
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, nn.ReLU(), nn.ModuleDict({"again": linear})["again"], linear)
    assert apply_lora(model, rank=2) == ["0"]
    assert model[0] is model[2] is model[3]
    assert len(list(lora_parameters(model))) == 2
    unload_lora(model)
    assert model[0] is model[2] is model[3]
    assert type(model[0]) is nn.Linear


def test_adapted_models_are_refused():
    model = stack()
    apply_lora(model)
    with pytest.raises(ValueError, match="got one at 0: add_adapter"):
        apply_lora(model)
    with pytest.raises(ValueError, match="a Linear itself"):
        apply_lora(nn.Linear(4, 4))
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(stack(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="PEFT's at base_model"):
        apply_lora(theirs)


def test_failure_in_the_middle_changes_nothing():
    model = Tiny()
    model.out.forward = model.out.forward  # as accelerate replaces it
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"out: expected the forward of nn\.Linear"):
        apply_lora(model, target_modules=ALL)
    assert_unchanged(model, before)
    for arguments, hint in (
        ({"init": "pissa"}, "table: expected init"),
        ({"use_dora": True}, "table: expected a linear layer for use_dora"),
        ({"rank": 0}, "rank >= 1"),
        ({"impl": "cuda"}, "expected impl"),
    ):
        with pytest.raises(ValueError, match=hint):
            apply_lora(model, target_modules=["table", "hidden"], **arguments)
        assert_unchanged(model, before)


def test_multihead_attention_is_refused_with_the_reason():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match="reads its weights past forward"):
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
    # The same model, its adapters merged into plain layers, on the fast path and off it.
    unload_lora(model)
    assert model.use_nested_tensor
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        merged = model(x, src_key_padding_mask=mask)
    real = ~mask
    torch.testing.assert_close(on[real], merged[real], rtol=1e-4, atol=1e-4)
    assert (on[real] - off[real]).abs().max() > 0.1


def test_hooks_stay_and_their_handles_remove():
    model, calls = stack(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    apply_lora(model)
    model(torch.randn(2, 8))
    assert len(calls) == 1
    unload_lora(model)
    model(torch.randn(2, 8))
    assert len(calls) == 2
    handle.remove()
    model(torch.randn(2, 8))
    assert len(calls) == 2


@pytest.mark.parametrize("merged", [False, True])
def test_disable_lora_is_the_base_and_comes_back(merged):
    model, ids = gpt2(), tokens()
    base = model(ids).logits
    apply_lora(model)
    train_like(model)
    if merged:
        merge_lora(model)
    on = model(ids).logits
    with disable_lora(model):
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, on)
    next(iter(lora_layers(model).values())).enabled = False
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    states = [layer.enabled for layer in lora_layers(model).values()]
    assert states == [False] + [True] * (len(states) - 1)


def test_merge_unmerge_and_unload():
    model, ids = Tiny(), tokens(4, 6, vocabulary=20)
    plain = copy.deepcopy(model)
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    on = model(ids)
    weights = {name: layer.weight.clone() for name, layer in lora_layers(model).items()}
    merge_lora(model)
    torch.testing.assert_close(model(ids), on, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(x.weight, weights[n]) for n, x in lora_layers(model).items())
    with pytest.raises(RuntimeError, match=r"table: .*merged already"):
        merge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(x.weight, weights[n]) for n, x in lora_layers(model).items())
    assert torch.equal(model(ids), on)
    with pytest.raises(RuntimeError, match=r"table: .*not merged"):
        unmerge_lora(model)
    off = copy.deepcopy(model)
    assert unload_lora(off, merge=False) is off
    assert torch.equal(off(ids), plain(ids))
    assert off.state_dict().keys() == plain.state_dict().keys()
    model.hidden.merge()  # one already, the rest by unloading
    unload_lora(model)
    torch.testing.assert_close(model(ids), on, rtol=1e-4, atol=1e-4)
    assert repr(model) == repr(plain)
    apply_lora(model, target_modules=ALL)
    merge_lora(model)  # the weights are nobody's


def test_unload_of_a_final_merge():
    model, x = stack(), torch.randn(2, 8)
    apply_lora(model)
    train_like(model)
    on = model(x)
    merge_lora(model, keep_base=False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"0: .*keep_base=False"):
        unload_lora(model, merge=False)
    with pytest.raises(RuntimeError, match=r"0: .*keep_base=False"):
        unmerge_lora(model)
    assert_unchanged(model, before)
    unload_lora(model)
    torch.testing.assert_close(model(x), on)


def test_a_tied_weight_is_not_merged():
    model, ids = gpt2(), tokens()
    apply_lora(model, target_modules=["c_attn", "wte"])
    train_like(model)
    before, on = snapshot(model), model(ids).logits
    for attempt in (merge_lora, unload_lora):
        with pytest.raises(
            ValueError, match=r"transformer\.wte alone, got one shared with lm_head"
        ):
            attempt(model)
        assert_unchanged(model, before)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, on, rtol=1e-4, atol=1e-4)


def test_two_linears_with_one_weight_have_adapters_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert apply_lora(model) == ["0", "1"]
    assert model[0].weight is model[1].weight
    assert model[0].lora_A is not model[1].lora_A
    with pytest.raises(ValueError, match="0 alone, got one shared with 1"):
        merge_lora(model)
    unload_lora(model, merge=False)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("change", ["dtype", "deepcopy", "state"])
def test_while_merged(change):
    model, ids = Tiny(), tokens(4, 6, vocabulary=20)
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    merge_lora(model)
    on = model(ids)
    base = {name: layer._base_weight.clone() for name, layer in lora_layers(model).items()}
    if change == "dtype":
        model.double()
        torch.testing.assert_close(model(ids), on.double(), rtol=1e-4, atol=1e-4)
        base = {name: weight.double() for name, weight in base.items()}
    elif change == "deepcopy":
        original, model = model, copy.deepcopy(model)
        unmerge_lora(original)
        assert torch.equal(model(ids), on)
    else:
        other = Tiny()
        apply_lora(other, target_modules=ALL, rank=2)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(ids), on, rtol=1e-4, atol=1e-4)
        model = other
        merge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(x.weight, base[n]) for n, x in lora_layers(model).items())


def test_parameter_groups():
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    model.out.bias.requires_grad_()
    groups = lora_param_groups(
        model, 1e-3, lr_ratio=16, weight_decay=0.1, no_decay=["bias", "lora_B"]
    )
    named = {id(p): n for n, p in model.named_parameters()}
    found = {
        (g["lr"], g["weight_decay"]): sorted(named[id(p)] for p in g["params"]) for g in groups
    }
    assert found == {
        (1e-3, 0.1): ["conv.lora_A", "hidden.lora_A", "out.lora_A", "table.lora_A"],
        (1e-3 * 16, 0.0): ["conv.lora_B", "hidden.lora_B", "out.lora_B"],
        (1e-3, 0.0): ["out.bias", "table.lora_B"],
    }
    torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match="lr_ratio >= 0"):
        lora_param_groups(model, 1e-3, lr_ratio=-1)


def test_summary_counts_shared_parameters_once():
    model = gpt2()
    total = sum(p.numel() for p in model.parameters())
    apply_lora(model, rank=4)
    adapters = 2 * 4 * ((32 + 96) + (32 + 32) + 2 * (32 + 128))
    summary = parameter_summary(model)
    assert (summary.trainable, summary.adapters, summary.total) == (
        adapters,
        adapters,
        total + adapters,
    )
    assert str(summary).startswith(f"{adapters:,} of {total + adapters:,} parameters train (")


@pytest.mark.parametrize(
    "function",
    [
        merge_lora,
        unmerge_lora,
        unload_lora,
        lora_layers,
        parameter_summary,
        assert_only_lora_gradients,
        lambda model: list(lora_parameters(model)),
        lambda model: lora_param_groups(model, 1e-3),
        lambda model: disable_lora(model).__enter__(),
        fused_lora.adapter_names,
    ],
)
def test_models_without_adapters_are_told(function):
    with pytest.raises(ValueError, match="a model with adapters, got a Sequential without"):
        function(stack())


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=1"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular"), "padding_mode"),
    ],
)
def test_what_cannot_be_adapted_says_why(layer, hint):
    model = nn.Sequential(layer)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"0: expected {hint}"):
        apply_lora(model, target_modules=["0"])
    assert_unchanged(model, before)


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
    layer = LoRAConv2d.from_conv2d(conv, rank=4).double()
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
