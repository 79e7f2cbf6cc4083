"""PEFT's adapters on experts, patched: which of them keep PEFT's forward, and the report on it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_lora import adapter_segments, patch_peft
from fused_lora.peft import experts as peft_experts
from support import relative_rms

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
from expert_nets import (  # noqa: E402
    BF16,
    BOTH,
    FP32,
    FP64,
    E,
    Holder,
    T,
    adapted,
    assert_close,
    causal,
    experts_in,
    holder,
    results,
    routed,
    wrapper,
)
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from peft_nets import noisy  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")


def second(model: nn.Module) -> None:
    config = {"r": 2, "target_modules": [], "target_parameters": BOTH}
    model.add_adapter("other", peft.LoraConfig(**config))
    noisy(model)
    model.base_model.set_adapter(["default", "other"])


def implementation(name: str, function=None):
    def set_it(model):
        if function:
            moe.ALL_EXPERTS_FUNCTIONS.register(name, function)
        experts_in(model).config._experts_implementation = name

    return set_it


def another(self, hidden_states, top_k_index, top_k_weights):
    return 2 * moe.batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def replaced_forward(model: nn.Module) -> None:
    experts = experts_in(model)
    run = experts.forward
    experts.forward = lambda *args: 3 * run(*args)


class Clamped(nn.Module):
    """A loop of a library's own, under transformers' interface."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.randn(E, 48, 32, dtype=FP64), requires_grad=False)
        self.down_proj = nn.Parameter(torch.randn(E, 32, 24, dtype=FP64), requires_grad=False)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = moe.batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return y.clamp(-1, 1)


class Subclass(nn.Parameter):
    pass


def subclass(model: nn.Module) -> None:
    experts = experts_in(model)
    experts._parameters["down_proj"] = Subclass(experts.down_proj.data, requires_grad=False)


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(experts_in(model), "down_proj", nn.Tanh())


def exchanged(model: nn.Module) -> None:
    """As PEFT before 0.19.1 had it, where both sizes are equal."""
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module._did_swap_in_out_features = not module._did_swap_in_out_features


FALLBACKS = {
    "two adapters": (second, "2 active adapters"),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "merged": (lambda m: m.merge_adapter(), "its adapters are merged"),
    "own forward": (replaced_forward, "a replaced forward (such as accelerate's)"),
    "hook": (lambda m: experts_in(m).register_forward_hook(lambda *_: None), "a hook"),
    "hook inside": (
        lambda m: experts_in(m).act_fn.register_forward_hook(lambda *_: None),
        "a hook in the experts",
    ),
    "hook between": (
        lambda m: wrapper(m).base_layer.register_forward_hook(lambda *_: None),
        "a hook",
    ),
    "trained": (
        lambda m: experts_in(m).gate_up_proj.requires_grad_(),
        "a trainable base weight",
    ),
    "subclass": (subclass, "a down_proj of class Subclass"),
    "parametrized": (parametrized, "a computed down_proj"),
    "unknown": (implementation("another", another), "the experts implementation another"),
    "renamed": (implementation("grouped_mm", another), "the experts implementation grouped_mm"),
    "none": (implementation(None), "the experts implementation None"),
    "bias": (
        lambda m: (
            wrapper(m)
            .lora_B["default"]
            .register_parameter(
                "bias", nn.Parameter(torch.ones(32, dtype=FP64), requires_grad=False)
            )
        ),
        "a bias in lora_B",
    ),
    "dropout": (
        lambda m: wrapper(m).lora_dropout.update({"default": nn.Dropout(0.5)}),
        "a dropout",
    ),
    "scale": (
        lambda m: wrapper(m).scaling.update(default=float("inf")),
        "a scale that is not a finite number",
    ),
    "adapter dtype": (
        lambda m: wrapper(m).lora_A.to(FP32) and wrapper(m).lora_B.to(FP32),
        "adapters in torch.float32 on experts in torch.float64",
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_fallbacks_are_pefts_own_forward(case, expert_calls, monkeypatch):
    known = dict(moe.ExpertsInterface._global_mapping)
    monkeypatch.setattr(moe.ExpertsInterface, "_global_mapping", known)  # register() writes to it
    spoil, reason = FALLBACKS[case]
    # Two models: a call of PEFT's leaves its adapter in a parameter that was parametrized before.
    model, other = holder(), holder()
    for each in (model, other):
        torch.manual_seed(7)
        spoil(each.train())
    if case in ("disabled", "merged"):
        inputs = routed()
        expected = other(*inputs)
    else:
        expected = results(other)
    report = patch_peft(model)
    assert set(report.layers.values()) == {reason}, report
    assert f"2 keep PEFT's forward: {reason} (2)" in report.summary
    if isinstance(expected, dict):
        got = results(model)
        assert all(torch.equal(got[n], v) or v.isnan().any() for n, v in expected.items())
    else:
        assert torch.equal(model(*inputs), expected)
    assert not expert_calls


def test_roles_of_an_older_peft_are_not_confused(expert_calls):
    """Where in and out are equal, the shapes of exchanged adapters are no sign of it."""
    model = holder(targets=BOTH[1:])
    exchanged(model)
    assert set(patch_peft(model).layers.values()) == {
        "adapters of PEFT before 0.19.1, with in and out exchanged"
    }
    with contextlib.suppress(RuntimeError):  # PEFT's own: of other sizes
        model(*routed())
    assert not expert_calls


def test_modules_that_only_look_like_experts(expert_calls):
    clamped = moe.use_experts_implementation(Clamped)(
        SimpleNamespace(_experts_implementation="eager")
    )
    linear = nn.Sequential()
    linear.add_module("experts", nn.Linear(32, 24, dtype=FP64))
    found = {}
    for name, model, targets in (
        ("loop", Holder(clamped), BOTH),
        ("linear", linear, ["experts.weight"]),
    ):
        model = adapted(model, targets=targets)
        inputs = routed() if name == "loop" else routed()[:1]
        expected = model(*inputs)
        report = patch_peft(model)
        assert torch.equal(model(*inputs), expected)
        found |= {name: set(report.layers.values())}
    assert found == {
        "loop": {"an eager forward of another library"},
        "linear": {"a parameter of a Linear"},
    }
    assert not expert_calls


def test_calls_that_run_pefts_own_forward(expert_calls):
    model = holder()
    x, index, shares = routed()
    parts = peft_experts.parts_of(wrapper(model))
    reason = peft_experts.call_reason
    assert reason(parts, x, index, shares) is None
    for args, expected in (
        ((x[None], index, shares), "an input that is not a dense matrix"),
        ((x, index.float(), shares), "an input in another dtype"),
        ((x.float(), index, shares), "an input in another dtype than the experts"),
        ((x[:3], index, shares), "inputs of different sizes"),
        ((x[:, :5], index, shares), "an input of another size"),
        ((x.to("meta"), index, shares), "an input on another device"),
        ((x, index, None), "an input that is not a plain tensor"),
    ):
        assert reason(parts, *args) == expected
    with torch.autocast("cpu", BF16):
        assert reason(parts, x, index, shares) == "float64 under autocast"
    patch_peft(model)
    names = {"top_k_index": index, "top_k_weights": shares}
    expected = model(x, index, shares)
    assert len(expert_calls) == 1
    assert relative_rms(wrapper(model)(x, **names), expected) <= 1e-12
    found = []
    torch.vmap(lambda t: found.append(reason(parts, x, index, shares)) or t)(x)
    with torch.autograd.forward_ad.dual_level():
        found.append(reason(parts, x, index, shares))
    assert found == ["a torch.func transform", "forward-mode differentiation"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        model(x, index, shares)
    finally:
        handle.remove()
    assert len(expert_calls) == 1
    assert model(x[:0], index[:0], shares[:0]).shape == (0, 32)
    assert torch.equal(model(x, index.int(), shares), expected)
    assert len(expert_calls) == 3


def test_an_outer_wrapper_without_an_adapter_leaves_the_inner_one_fused(expert_calls):
    model = holder()
    del wrapper(model).lora_A["default"], wrapper(model).lora_B["default"]
    expected = results(model)
    report = patch_peft(model)
    assert report.layers == {
        "base_model.model.experts.down_proj": "no active adapter",
        "base_model.model.experts.gate_up_proj": None,
    }
    assert_close(results(model), expected, 1e-12)
    assert expert_calls == [["gate_up_proj"]]


def test_the_report_names_parameters_and_counts_them():
    model = adapted(causal("Qwen3Moe", num_hidden_layers=2), target_modules=["q_proj"])
    report = patch_peft(model)
    layers = [f"base_model.model.model.layers.{i}." for i in range(2)]
    parts = ("self_attn.q_proj", "mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    assert report.layers.keys() == {layer + part for layer in layers for part in parts}
    assert report.summary == "6 of 6 LoRA layers fused"
    assert f"{layers[0]}mlp.experts.down_proj: fused" in str(report)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    wrapper.forward = wrapper.forward
    report = patch_peft(model)
    assert report.summary.startswith("4 of 6 LoRA layers fused; 2 keep PEFT's forward: a replaced")


def test_a_batch_of_many_adapters_is_refused():
    """Experts have no way through it: they would run the active adapter on every sample."""
    model = holder()
    patch_peft(model)
    inputs = routed()
    refused = pytest.raises(RuntimeError, match=r"got a lora\.ParamWrapper layer")
    with refused, adapter_segments(model, ["default"] * T):
        model(*inputs)
