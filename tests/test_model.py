"""Whole models: which modules get adapters, what trains, what merging and unloading restore."""

import functools

import pytest
import torch
from models import ALL, Tiny, assert_unchanged, gpt2, llama, snapshot, stack, tokens, train_like
from torch import nn

import fused_lora
from fused_lora import (
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
        (["c_atn"], "similar names: c_attn"),
        ("c_attn", "no name matches in full"),
        (["zzz"], "available names: c_attn, c_fc, c_proj"),
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
    either = llama()
    apply_lora(either, rank_pattern={"q_proj|k_proj": 3})
    attention = either.model.layers[0].self_attn
    assert [attention.q_proj.rank, attention.k_proj.rank, attention.v_proj.rank] == [3, 3, 8]
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
    assert (model(ids) - expected).abs().max() > 0.01
    model(ids).sum().backward()
    assert_only_lora_gradients(model)
    model.hidden.weight.requires_grad_()
    model.out.lora_A.grad = None
    with pytest.raises(RuntimeError, match=r"only, got one at hidden\.weight.*out\.lora_A"):
        assert_only_lora_gradients(model)
    model.hidden.weight.requires_grad_(False)
    model.hidden.bias.grad = torch.zeros(16)
    with pytest.raises(RuntimeError, match=r"only, got one at hidden\.bias;"):
        assert_only_lora_gradients(model)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"target_modules": ["0", "2.9"]}, r"target_modules has '2\.9', which names no module"),
        ({"exclude_modules": ["2.0", "3"]}, "exclude_modules has '3', which"),
        ({"exclude_modules": "relu"}, "exclude_modules has 'relu', which"),
    ],
)
def test_names_that_match_nothing_are_told(arguments, hint):
    with pytest.warns(UserWarning, match=hint):
        apply_lora(stack(), **arguments)
    with pytest.warns(UserWarning, match="'q_porj', which names no module; similar: q_proj"):
        apply_lora(llama(), target_modules=["v_proj", "q_porj"])


@pytest.mark.parametrize("argument", ["use_rslora", "use_dora"])
def test_flags_are_flags(argument):
    with pytest.raises(TypeError, match=f"{argument} to be True or False, got 'no'"):
        apply_lora(stack(), **{argument: "no"})


@pytest.mark.parametrize("value", ["nan", float("nan"), True, None])
def test_scales_are_finite_numbers(value):
    model = stack()
    apply_lora(model)
    with pytest.raises((TypeError, ValueError), match="scaling"):
        model[0].scaling = value
    assert model[0].scaling == 2.0


def test_layers_that_are_compiled_themselves_are_refused():
    model = nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"not compiled themselves, got 0\._orig_mod"):
        apply_lora(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="a Linear itself"):
        apply_lora(torch.compile(nn.Linear(8, 8), backend="eager"))


def test_a_failure_restores_what_was_frozen_too(monkeypatch):
    model = Tiny()
    model.hidden.weight.requires_grad_(False)
    model.last = nn.Embedding(3, 4, max_norm=1.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="last: expected max_norm=None"):
        apply_lora(model, target_modules=[*ALL, "last"])
    assert_unchanged(model, before)


def test_adapters_made_in_inference_mode_train():
    model = stack()
    with torch.inference_mode():
        apply_lora(model)
        fused_lora.add_adapter(model, "b", rank=2)
        with pytest.warns(UserWarning, match="new optimizer"):
            fused_lora.set_adapter(model, "b")
    model(torch.randn(2, 8)).sum().backward()
    assert_only_lora_gradients(model)


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
    model.conv.forward = functools.partial(model.conv.forward)  # as accelerate replaces it
    before = snapshot(model)
    with pytest.raises(TypeError, match="conv: expected the forward of Conv2d, got one replaced"):
        apply_lora(model, target_modules=ALL)
    assert_unchanged(model, before)
    for arguments, hint in (
        ({"init": "pissa"}, "table: expected init"),
        ({"use_dora": True}, "table: expected a linear layer for use_dora"),
        ({"rank": 0}, "rank >= 1"),
        ({"impl": "cuda"}, "expected impl"),
        ({"init": "orthogonal", "rank": 3}, "an even rank"),
    ):
        with pytest.raises(ValueError, match=hint):
            apply_lora(model, target_modules=["table", "hidden"], **arguments)
        assert_unchanged(model, before)


def test_an_interruption_changes_nothing(monkeypatch):
    model = Tiny()

    def interrupted(*args):
        assert not model.conv.weight.requires_grad
        raise KeyboardInterrupt

    monkeypatch.setattr(FusedLoRALinear, "reset_adapter", interrupted)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        apply_lora(model, target_modules=["conv", "hidden"])
    assert_unchanged(model, before)


def test_a_weight_that_is_not_finite_has_no_principal_part():
    model = Tiny()
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="out: expected a finite weight for init='pissa', got NaN"):
        apply_lora(model, init="pissa", rank=2)
    assert all(p.requires_grad for p in model.parameters())


def run(model: nn.Module) -> None:
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("register", "call"),
    [
        ("register_forward_hook", run),
        ("register_forward_hook with_kwargs", run),
        ("register_forward_hook always_call", run),
        ("register_forward_pre_hook with_kwargs", run),
        ("register_forward_pre_hook", run),
        ("register_full_backward_hook", run),
        ("register_full_backward_pre_hook", run),
        ("register_state_dict_post_hook", nn.Module.state_dict),
        ("register_state_dict_pre_hook", nn.Module.state_dict),
        (
            "register_load_state_dict_post_hook",
            lambda model: model.load_state_dict(model.state_dict()),
        ),
    ],
)
def test_hooks_stay_and_their_handles_remove(register, call):
    model, calls = stack(), []
    register, _, option = register.partition(" ")
    options = {option: True} if option else {}
    handle = getattr(model[0], register)(lambda *_: calls.append(1), **options)
    for change in (lambda model: None, apply_lora, unload_lora):
        change(model)
        calls.clear()
        call(model)
        assert len(calls) == 1, change
    calls.clear()
    handle.remove()
    call(model)
    assert not calls


def test_attributes_and_buffers_of_others_stay():
    model = stack()
    model[0].note = "kept"
    model[0].register_buffer("mask", torch.ones(3))
    model[0].register_buffer("aside", torch.ones(2), persistent=False)
    keys = set(model.state_dict())
    apply_lora(model)
    assert set(model.state_dict()) == keys | {
        f"{name}.{adapter}" for name in ("0", "2.0", "2.1") for adapter in ("lora_A", "lora_B")
    }
    unload_lora(model)
    assert set(model.state_dict()) == keys
    assert vars(model[0]).keys() - vars(nn.Linear(1, 1)).keys() == {"note"}
    assert model[0].note == "kept"
    assert set(dict(model[0].named_buffers())) == {"mask", "aside"}


def test_parameter_groups():
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    with pytest.raises(TypeError, match="a list of names, got the str 'lora_B'"):
        lora_param_groups(model, 1e-3, no_decay="lora_B")
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
