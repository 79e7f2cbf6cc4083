"""Whole models with layers computed together, against the same layers alone."""

import copy
import io
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from models import gpt2, llama, tokens
from safetensors.torch import load_file
from together import BATCH, adapted, alone, assert_equal, assert_same, fused, step
from torch import nn

import fused_lora
from fused_lora import (
    apply_lora,
    fuse_projections,
    lora_layers,
    lora_parameters,
    merge_lora,
    patch_peft,
    unfuse_projections,
    unload_lora,
    unmerge_lora,
    unpatch_peft,
)
from fused_lora.layers import gated_block, shared_input
from support import relative_rms, swept

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_step_equals_that_of_single_layers(p, kind, ran):
    model = adapted(kind=kind, dropout=p)
    together = fused(model)
    expected = step(model)
    assert not ran
    assert_same(step(together), expected)
    # Two decoder layers: q, k and v in one chain, the MLP as a block.
    assert ran == {"chains": 2, "layers": 6, "blocks": 2}


FAMILIES = {}


def family(function):
    FAMILIES[function.__name__] = function
    return function


@family
def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 100}
    return Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()


@family
def gemma():
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    return GemmaForCausalLM(GemmaConfig(**sizes, **heads)).eval()


@family
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"num_layers": 2, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}
    config = T5Config(
        **sizes, vocab_size=100, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        decoder_start_token_id=0, initializer_factor=0.1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


FAMILIES |= {"llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=list(FAMILIES))
def test_training_follows_single_layers(make, ran):
    """20 steps: the losses agree. With SGD, since Adam magnifies the rounding of gradients."""
    model = adapted(make)
    losses = []
    for candidate in (model, fused(model)):
        optimizer = torch.optim.SGD(lora_parameters(candidate), lr=0.01, momentum=0.9)
        torch.manual_seed(0)
        found = []
        for _ in range(20):
            ids = tokens(*BATCH)
            loss = candidate(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] != losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    if make is not gpt2:  # its projections are one already
        assert ran["chains"] > 0


def test_autocast(ran):
    model = adapted(dtype=torch.float32)
    together = fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = step(model), step(together)
    assert_same(got, expected, bound=0.1)
    assert ran == {"chains": 2, "layers": 6, "blocks": 2}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_checkpointing_repeats_the_masks(mlp, reentrant, ran):
    model = fused(adapted(dropout=0.3), mlp=mlp)
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    ran.clear()
    assert_equal(step(model), expected)
    assert ran["chains"] == (4 if mlp else 8)  # forward, and again in backward
    assert shared_input._thread.chain is None or not shared_input._thread.chain.waiting


VARIANTS = {
    "ranks and scales": {
        "rank_pattern": {"k_proj": 7, "up_proj": 3},
        "alpha_pattern": {"v_proj": 3.0},
    },
    "q and v only": {"target_modules": ["q_proj", "v_proj"]},
    "half of the MLP": {"target_modules": ["q_proj", "up_proj", "down_proj"]},
    "gate and up only": {"target_modules": ["gate_proj", "up_proj"]},
    "half-precision adapters": {"adapter_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_ranks_scales_and_targets(options):
    model = adapted(**options)
    bound = 0.02 if "adapter_dtype" in options else 1e-11  # gradients in bfloat16
    assert_same(step(fused(model)), step(model), bound)


def test_trained_biases_and_frozen_adapters():
    model = adapted(partial(llama, attention_bias=True, mlp_bias=True))
    for layer in model.model.layers:
        for linear in (layer.self_attn.v_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.bias.requires_grad_(True)
        layer.self_attn.k_proj.lora_A.requires_grad_(False)
        layer.self_attn.q_proj.lora_B.requires_grad_(False)
        layer.mlp.up_proj.lora_A.requires_grad_(False)
    assert_same(step(fused(model)), step(model))


HOOKS = {
    # kind: how to register, chains and blocks that still run
    "forward": (lambda m, hook: m.register_forward_hook(lambda *_: hook()), 4, 0),
    "changes the output": (
        lambda m, hook: m.register_forward_hook(lambda _, args, y: (hook(), y * 2)[1]),
        4,
        0,
    ),
    "forward pre": (
        lambda m, hook: m.register_forward_pre_hook(lambda _, args: (hook(), (args[0] * 1.5,))[1]),
        2,
        0,
    ),
    "full backward": (lambda m, hook: m.register_full_backward_hook(lambda *_: hook()), 2, 0),
}


@pytest.mark.parametrize("case", HOOKS.values(), ids=list(HOOKS))
def test_hooks_fire_equally_often(case, ran):
    """Also those added after the layers were grouped."""
    register, chains, blocks = case
    model = adapted()
    together, calls = fused(model), [0, 0]
    for i, candidate in enumerate((model, together)):

        def hook(i=i):
            calls[i] += 1

        for layer in candidate.model.layers:
            register(layer.self_attn.k_proj, hook)
            register(layer.mlp.up_proj, hook)
    assert_same(step(together), step(model))
    assert calls[0] == calls[1] == 4
    assert (ran["chains"], ran["blocks"]) == (chains, blocks)


def test_adapters_made_in_inference_mode():
    with torch.inference_mode():
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    patch_peft(model)
    with torch.no_grad():
        model(input_ids=tokens(*BATCH))


def test_peft_hooks_on_every_module(ran):
    model = adapted(kind="peft")
    together, calls = fused(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m)))
    try:
        counts = []
        for candidate in (model, together):
            calls.clear()
            step(candidate)
            counts.append(Counter(calls))
    finally:
        handle.remove()
    assert counts[0] == counts[1]
    assert not ran


def test_pickles_of_peft_models_do_not_name_this_library():
    model = fused(adapted(kind="peft"))
    assert b"fused_lora.layers" not in pickle.dumps(model)
    assert b"fused_lora.peft" not in pickle.dumps(model)


def test_dora_runs_alone_and_is_reported(ran):
    model = adapted(use_dora=True)
    report = fuse_projections(model)
    assert "DoRA" in report.summary
    assert not report.groups
    step(model)
    assert not ran


def test_retained_graph_and_second_derivative():
    model = fused(adapted(partial(llama, attn_implementation="eager")))
    ids = tokens(*BATCH)
    parameters = list(lora_parameters(model))
    loss = model(input_ids=ids, labels=ids).loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    third = torch.autograd.grad(loss, parameters, create_graph=True)
    norm = sum(g.square().sum() for g in third)
    model_alone = alone(model)
    loss = model_alone(input_ids=ids, labels=ids).loss
    expected = torch.autograd.grad(loss, lora_parameters(model_alone), create_graph=True)
    norm_alone = sum(g.square().sum() for g in expected)
    got = torch.autograd.grad(norm, parameters)
    wanted = torch.autograd.grad(norm_alone, list(lora_parameters(model_alone)))
    for a, b in zip(got, wanted, strict=True):
        assert relative_rms(a, b) < 1e-10


def test_generation_with_cache(ran):
    model = fused(adapted()).eval()
    ids = tokens(2, 20)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(ids, **options)
    assert ran["chains"] == 2  # the prompt; one row per step runs alone
    assert torch.equal(got, alone(model).generate(ids, **options))


def test_copies_and_pickles(ran):
    model = fused(adapted(dropout=0.3))
    expected = step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        ran.clear()
        assert_equal(step(copied), expected)
        assert ran == {"chains": 2, "layers": 6, "blocks": 2}
        place = copied.model.layers[0].self_attn.q_proj.shared_input
        assert place._parent() is copied.model.layers[0].self_attn


def test_life_cycle(ran):
    """Merging, unmerging, other adapters and unloading, with layers that are grouped."""
    model = fused(adapted())
    ids = tokens(*BATCH)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merge_lora(model)
        ran.clear()
        merged = model(input_ids=ids).logits
        assert not ran
        unmerge_lora(model)
        again = model(input_ids=ids).logits
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(again, before)
        fused_lora.add_adapter(model, "other", rank=3, dropout=0.2)
        fused_lora.set_adapter(model, "other")
        model(input_ids=ids)
        fused_lora.set_adapter(model, "default")
        assert torch.equal(model(input_ids=ids).logits, before)
        with fused_lora.disable_lora(model):
            ran.clear()
            model(input_ids=ids)
            assert not ran
    unload_lora(model)
    assert not any(gated_block.block_of(module) for module in model.modules())
    assert all("shared_input" not in vars(module) for module in model.modules())


def test_saved_files_do_not_change(tmp_path):
    model = adapted()
    fused_lora.save_adapter(model, tmp_path / "alone")
    fused_lora.save_adapter(fused(model), tmp_path / "together")
    files = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "together")
    ]
    assert_equal(*files)
    configs = [
        (tmp_path / name / "adapter_config.json").read_bytes() for name in ("alone", "together")
    ]
    assert configs[0] == configs[1]
    assert model.state_dict().keys() == fused(model).state_dict().keys()


def test_loading_into_a_plain_model_fuses(tmp_path, ran):
    model = adapted()
    fused_lora.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = llama().double()
    fused_lora.load_adapter(loaded, tmp_path)
    loaded.train()
    assert_same(step(loaded), step(model))
    assert ran["blocks"] == 2


@swept
def test_compiled_models_run_layers_alone(ran):
    model = fused(adapted(partial(llama, num_hidden_layers=1)))
    expected = step(model)
    ran.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = step(compiled)
    assert_same({n.removeprefix("_orig_mod."): g for n, g in got.items()}, expected)
    assert not ran


def test_apply_lora_fuses_by_default(ran):
    model = llama()
    apply_lora(model, rank=4)
    step(model.train())
    assert ran == {"chains": 2, "layers": 6, "blocks": 2}
    for options, expected in (
        ({"fuse_projections": False}, {"blocks": 2}),
        ({"fuse_mlp": False}, {"chains": 4, "layers": 10}),
    ):
        model = llama()
        apply_lora(model, rank=4, **options)
        ran.clear()
        step(model.train())
        assert ran == expected


def test_every_layer_counts_as_run():
    model = fused(adapted())
    step(model)
    assert all(layer.has_run for layer in lora_layers(model).values())
    assert not fused_lora.check_adapters(model)


def test_reports():
    model = adapted()
    report = fuse_projections(model)
    assert report.summary == "2 groups share an input; 2 gated MLPs are one block"
    attention = "model.layers.0.self_attn"
    assert report.groups[0] == tuple(f"{attention}.{n}_proj" for n in "qkv")
    assert "model.layers.1.mlp: one block" in str(report)
    assert "<td>one block</td>" in report._repr_html_()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    report = fuse_projections(model)
    assert report.blocks["model.layers.0.mlp"] == "a hook on up_proj"
    assert "1 gated MLP is one block; 1 not: a hook on up_proj (1)" in report.summary
    unfuse_projections(model)
    assert not any(layer.shared_input for layer in lora_layers(model).values())


def test_explain():
    model = adapted()
    layer = model.model.layers[0]
    alone_reason = fused_lora.explain(layer.self_attn.q_proj).reason
    fuse_projections(model)
    found = fused_lora.explain(layer.self_attn.q_proj)
    assert found.reason == f"{alone_reason}; its x may be shared with k_proj and v_proj"
    assert fused_lora.explain(layer.self_attn.q_proj, tokens=8).reason == alone_reason
    assert fused_lora.explain(layer.mlp).reason.startswith("one block (silu), gate: ")
    assert "layer by layer (8 rows)" in fused_lora.explain(layer.mlp, tokens=8).reason
    layer.mlp.up_proj.enabled = False
    assert "layer by layer (up_proj: disabled)" in fused_lora.explain(layer.mlp).reason


def test_peft_report():
    model = adapted(kind="peft")
    report = patch_peft(model)
    assert report.summary == (
        "14 of 14 LoRA layers fused; 2 groups share an input; 2 gated MLPs are one block"
    )
    unpatch_peft(model)
    assert not any(gated_block.block_of(module) for module in model.modules())


def test_models_that_peft_adapts_later_are_fused(ran):
    """``patch_peft()`` before the model exists, and the same after it is undone."""
    patch_peft()
    try:
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
        step(model.train())
        assert ran == {"chains": 2, "layers": 6, "blocks": 2}
    finally:
        unpatch_peft()
    ran.clear()
    step(model)
    assert not ran
    later = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    assert not any(gated_block.block_of(module) for module in later.modules())


def test_peft_adapters_switch(ran):
    """Disabled, merged and other adapters are seen at every call."""
    model = adapted(kind="peft")
    together = fused(model)
    ids = tokens(*BATCH)
    together.add_adapter("other", peft.LoraConfig(r=3, target_modules="all-linear"))
    with torch.no_grad():
        before = together(input_ids=ids).logits
        with together.disable_adapter():
            ran.clear()
            plain = together(input_ids=ids).logits
            assert not ran
        together.set_adapter("other")
        other = together(input_ids=ids).logits
        together.set_adapter("default")
        assert torch.equal(together(input_ids=ids).logits, before)
    assert not torch.equal(plain, before)
    assert torch.equal(other, plain)  # a new adapter's B is zero


def test_wrong_models():
    with pytest.raises(TypeError, match="expected a model"):
        fuse_projections("model")
    with pytest.raises(ValueError, match="patch_peft"):
        fuse_projections(adapted(kind="peft"))
    with pytest.raises(TypeError, match="fuse_mlp"):
        apply_lora(llama(), fuse_mlp="yes")
