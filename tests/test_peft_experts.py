"""PEFT's adapters on experts (``target_parameters``), patched: against PEFT's own forward."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import tokens
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fused_lora import patch_peft, unpatch_peft
from support import by_default, kept_bytes, relative_rms

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")
from expert_nets import (  # noqa: E402
    BF16,
    BOTH,
    FAMILIES,
    FP32,
    FP64,
    Holder,
    adapted,
    assert_close,
    causal,
    experts_class,
    experts_in,
    experts_of,
    holder,
    logits_and_gradients,
    results,
    routed,
)
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

RUNS = [("eager", FP64), ("batched_mm", FP64), ("grouped_mm", FP32)]
CASES = [(family, *run) for family in FAMILIES for run in RUNS]
KEPT = [case for case in CASES if case[0] in ("Qwen3Moe", "GptOss") or case[1] == "grouped_mm"]


@pytest.mark.parametrize("case", by_default(KEPT, CASES), ids=lambda c: "-".join(map(str, c)))
def test_whole_models_of_every_family(case, expert_calls):
    family, implementation, dtype = case
    model = adapted(causal(family, implementation, dtype)).eval()
    torch.manual_seed(3)
    expected = logits_and_gradients(model)
    with model.disable_adapter(), torch.no_grad():
        torch.manual_seed(3)
        embedded = model.get_input_embeddings()(tokens(2, 9))
        plain = model(inputs_embeds=embedded, use_cache=False).logits
    assert relative_rms(plain, expected["logits"]) > 0.01  # the adapters matter
    report = patch_peft(model)
    assert list(report.layers.values()) == [None, None], report
    torch.manual_seed(3)
    got = logits_and_gradients(model)
    assert expert_calls == [["down_proj", "gate_up_proj"]]
    assert len(got) == 6
    assert_close(got, expected, 1e-12 if dtype == FP64 else 1e-5)


KINDS = [
    ("Qwen3Moe", BOTH),
    ("GptOss", BOTH),
    ("Qwen3Moe", BOTH[:1]),
    ("GptOss", BOTH[1:]),
    ("NemotronH", ["experts.up_proj", "experts.down_proj"]),
    ("MuseSpark", BOTH),
]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize(("kind", "targets"), KINDS, ids=str)
def test_experts_alone(kind, targets, implementation, expert_calls):
    """Also those without a gate, those with a norm, and one adapter of two."""
    model = holder(kind, implementation, targets=targets)
    expected = results(model)
    patch_peft(model)
    assert_close(results(model), expected, 1e-12)
    assert expert_calls == [sorted(name.rpartition(".")[2] for name in targets)]


@pytest.mark.parametrize("weights", [BF16, FP32], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_half_precision_is_as_good_as_pefts(implementation, weights, expert_calls):
    """The router's weights may be in float32."""
    exact = results(holder())
    model = holder(implementation=implementation, dtype=BF16)
    x, index, shares = routed()
    inputs = [t.detach().to(d).requires_grad_() for t, d in ((x, BF16), (shares, weights))]
    inputs = inputs[0], index, inputs[1]
    theirs = results(model, inputs=inputs)
    report = patch_peft(model)
    assert report.narrowed == [f"base_model.model.{name}" for name in reversed(BOTH)]
    got = results(model, inputs=inputs)
    assert expert_calls
    for name, value in theirs.items():
        bound = 2 * relative_rms(value, exact[name]) + 2.0**-8
        assert got[name].dtype == value.dtype, name
        assert relative_rms(got[name], exact[name]) <= bound, name
    assert got["d base_model.model.experts.lora_A.default.weight"].dtype == FP32


@pytest.mark.parametrize(
    ("implementation", "bound"), [("eager", 0.02), ("batched_mm", 0.02), ("grouped_mm", 1e-5)]
)
@pytest.mark.parametrize("inputs", [FP32, BF16], ids=str)
def test_autocast(implementation, bound, inputs, expert_calls):
    """``grouped_mm`` does not follow autocast."""
    model = holder(implementation=implementation, dtype=FP32)

    def call(*args):
        with torch.autocast("cpu", BF16):
            return model(*args)

    expected = results(model, call, routed(inputs))
    patch_peft(model)
    got = results(model, call, routed(inputs))
    assert expert_calls
    assert_close(got, expected, bound if inputs == FP32 else 0.02)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_train_alike(reentrant, expert_calls):
    model = adapted(causal("Qwen3Moe")).train()
    patch_peft(model)
    torch.manual_seed(3)
    expected = logits_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    if not reentrant:
        got = logits_and_gradients(model)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    else:  # autograd.grad does not pass one of this kind
        embedded = model.get_input_embeddings()(tokens(2, 9)).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        torch.manual_seed(2)
        logits.backward(torch.randn_like(logits))
        assert torch.equal(embedded.grad, expected["d x"])
        for name, p in model.named_parameters():
            assert p.grad is None or torch.equal(p.grad, expected[f"d {name}"]), name
    assert len(expert_calls) == 3


def test_generation_keeps_the_adapters(expert_calls):
    """On a GPU ``generate`` switches to ``batched_mm``."""
    model = adapted(causal("Qwen3Moe", "grouped_mm", FP32, num_hidden_layers=2)).eval()
    options = {"input_ids": tokens(2, 5), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**options), expected)
    patch_peft(model)
    for implementation in ("grouped_mm", "batched_mm"):
        model.base_model.model.set_experts_implementation(implementation)
        assert torch.equal(model.generate(**options), expected)
    assert len(expert_calls) == 2 * 2 * 6


def test_unpatched_experts_run_pefts_forward_again(expert_calls):
    forward, model, other = ParamWrapper.forward, holder(), holder()
    expected = results(model)
    patch_peft(model)
    results(model)
    assert len(expert_calls) == 1
    results(other)  # not patched
    unpatch_peft(model)
    got = results(model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert ParamWrapper.forward is forward
    patch_peft()
    results(other)
    unpatch_peft()
    assert ParamWrapper.forward is forward
    results(other)
    assert len(expert_calls) == 2


def test_the_life_cycle_stays_pefts(tmp_path, expert_calls):
    model = holder()
    state = {n: p.clone() for n, p in model.named_parameters()}
    patch_peft(model)
    inputs = routed()
    expected = model(*inputs)
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(Holder(experts_of()), tmp_path)
    assert relative_rms(fresh(*inputs), expected) <= 1e-6  # the file is in float32
    model.merge_adapter()
    assert relative_rms(model(*inputs), expected) <= 1e-12
    model.unmerge_adapter()
    assert relative_rms(model(*inputs), expected) <= 1e-12
    with model.disable_adapter():
        assert relative_rms(model(*inputs), expected) > 0.01
    twin = copy.deepcopy(model)
    assert relative_rms(twin(*inputs), expected) <= 1e-12
    assert len(expert_calls) == 3
    for name, p in model.named_parameters():
        assert relative_rms(p, state[name]) <= 1e-12, name
    merged = model.merge_and_unload()
    assert type(merged.experts) is experts_class("Qwen3Moe")
    assert relative_rms(merged(*inputs), expected) <= 1e-12


def test_optimizers_train_alike(expert_calls):
    found = []
    for patched in (False, True):
        model = holder()
        if patched:
            patch_peft(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            model(*routed()).square().sum().backward()
            optimizer.step()
        found.append({n: p.detach() for n, p in model.named_parameters()})
    assert len(expert_calls) == 4
    assert_close(found[1], found[0], 1e-10)


def test_nothing_of_the_experts_size_is_kept():
    model = holder("Mixtral", dtype=FP32)
    x, index, shares = routed(FP32)
    size = sum(p.nbytes for p in experts_in(model).parameters())

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, index, shares)

    theirs = kept_bytes(Call(), x)
    patch_peft(model)
    ours = kept_bytes(Call(), x)
    assert theirs > size
    assert ours < theirs - size


def test_a_trained_bias_gets_its_gradient(expert_calls):
    model = holder("GptOss")
    experts_in(model).down_proj_bias.requires_grad_()
    expected = results(model)
    patch_peft(model)
    assert_close(results(model), expected, 1e-12)
    assert expert_calls
    assert sum("bias" in name for name in expected) == 1


def test_selective_checkpoints(expert_calls):
    model = holder()
    patch_peft(model)
    expected = results(model)
    keep = functools.partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten.mm.default, torch.ops.aten.silu.default],
    )
    options = {"use_reentrant": False, "context_fn": keep}
    got = results(model, lambda x, i, w: checkpoint(model, x, i, w, **options))
    assert_close(got, expected, 1e-12)
    assert len(expert_calls) == 3


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_models_run_fused_between_graphs(expert_calls):
    model = holder()
    expected = results(model)
    patch_peft(model)
    assert_close(results(model, torch.compile(model, backend="eager")), expected, 1e-12)
    assert len(expert_calls) == 1
