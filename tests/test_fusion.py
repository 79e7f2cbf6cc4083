"""Layers of whole models that share an input, and gated MLPs, against the same layers alone."""

import copy
import gc
import io
import pickle
import random
import threading
import weakref
from collections import Counter
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from models import gpt2, llama, tokens, train_like
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fused_lora
from fused_lora import (
    FusedLoRALinear,
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
from fused_lora.layers import gated_block
from fused_lora.layers import shared_input as layers_shared_input
from fused_lora.layers.base import LoRALayer
from fused_lora.models.probe import shared_inputs
from fused_lora.models.symbolic import NotGatedError, prove
from fused_lora.ops import shared_input
from support import relative_rms, swept

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

rand = partial(torch.randn, dtype=torch.float64)
BATCH = (2, 20)  # 40 rows: enough to be grouped


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """How often a chain was opened, a layer computed its part of one, and a block ran."""
    counts = Counter()

    def counted(module, function, name):
        original = getattr(module, function)

        def count(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, count)

    counted(shared_input, "shrink", "chains")
    counted(shared_input, "expand", "layers")
    counted(gated_block, "as_block", "blocks")
    return counts


def adapted(make=llama, kind="ours", dtype=torch.float64, **options) -> nn.Module:
    """A model in training mode with trained adapters, its layers alone.

    In float64, where the order of sums hardly shows.
    """
    torch.manual_seed(0)
    model = make().to(dtype)
    if kind == "ours":
        options = {"rank": 4, "dropout": 0.0} | options
        apply_lora(model, fuse_projections=False, fuse_mlp=False, **options)
    else:
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", lora_dropout=options.get("dropout", 0.0)
        )
        model = peft.get_peft_model(model, config)
        patch_peft(model, projections=False, mlp=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def fused(model: nn.Module, **options) -> nn.Module:
    """A copy that computes layers together."""
    model = copy.deepcopy(model)
    if any(isinstance(m, LoRALayer) for m in model.modules()):
        fuse_projections(model, **options)
    else:
        patch_peft(model, **options)
    return model


def step(model, seed=7, ids=None, **inputs) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step, by name."""
    torch.manual_seed(3)
    ids = tokens(*BATCH) if ids is None else ids
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | named


def assert_same(got: dict, expected: dict, bound=1e-11) -> None:
    """Only rounding differs: products are added up in another order."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert relative_rms(value, expected[name]) <= bound, name


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


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
    assert (
        layers_shared_input._thread.chain is None or not layers_shared_input._thread.chain.waiting
    )


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


class Net(nn.Module):
    """Projections that are called as the arguments say."""

    def __init__(self, *calls):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))
        self.calls = calls or ("q_proj", "k_proj", "v_proj")

    def forward(self, x, other=None):
        y = 0
        for name in self.calls:
            given = x if other is None or name == "q_proj" else other
            y = y + getattr(self, name)(given)
        return y


class Top(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args):
        return self.net(*args)


GROUP = [("q_proj", "k_proj", "v_proj")]


def small(net=None, **options) -> Top:
    model = Top(Net() if net is None else net)
    apply_lora(model, rank=4, fuse_projections=False, **options)
    train_like(model.train().double())
    fuse_projections(model, GROUP)
    return model


def alone(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    unfuse_projections(model)
    return model


def gradients(model, *inputs) -> dict:
    model.zero_grad()
    torch.manual_seed(2)
    y = model(*inputs)
    y.square().sum().backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | named


def test_cross_attention(ran):
    """k and v share another input than q, which then led in vain; self attention groups all."""
    model = small()
    x, other = rand(40, 64), rand(40, 64)
    assert_same(gradients(model, x, other), gradients(alone(model), x, other))
    assert ran == {"chains": 2, "layers": 3}
    ran.clear()
    assert_same(gradients(model, x), gradients(alone(model), x))
    assert ran == {"chains": 1, "layers": 3}


@pytest.mark.parametrize("make", ["group", "block"])
def test_selective_checkpointing_runs_layers_alone(make, ran):
    """Its dispatch mode keeps results of operators, which a chain must not see."""
    model, x = (small(dropout=0.3), rand(40, 64)) if make == "group" else (in_block(), rand(40, 32))
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def policy(context, operator, *args, **kwargs):
        save = operator in kept
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    region = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    wrapped = Top(model)
    wrapped.forward = lambda x: region(model, x)
    expected = gradients(alone(model), x)
    got = gradients(wrapped, x)
    assert_same({n.removeprefix("net."): g for n, g in got.items()}, expected)
    assert not ran


@pytest.mark.parametrize("calls", [("q_proj",), ("q_proj", "v_proj"), ("v_proj", "q_proj")])
def test_layers_that_never_come_or_come_late(calls):
    model = small(Net(*calls), dropout=0.3)
    x = rand(40, 64, requires_grad=True)
    got, expected = gradients(model, x), gradients(alone(model), x)
    assert got.keys() == expected.keys()
    if calls == ("q_proj",):  # the first seed is the same; of later ones some were drawn in vain
        assert_same(got, expected)


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept_of_a_layer_that_never_comes(grad):
    """x is freed after backward, or at once without gradients."""
    model = small(Net("q_proj", "k_proj"))
    x = rand(40, 64, requires_grad=grad) * 1
    storage = weakref.ref(x.untyped_storage()), weakref.ref(x)
    with torch.set_grad_enabled(grad):
        y = model(x)
    if grad:
        y.sum().backward()
    del x, y
    gc.collect()
    assert storage[1]() is None
    chain = layers_shared_input._thread.chain
    assert chain is None or (chain.alias is None and not chain.waiting)


def test_an_exception_between_two_layers():
    model = small(dropout=0.3)
    x = rand(40, 64)
    expected = gradients(model, x)

    def fail(*_):
        raise KeyError("planted")

    handle = model.net.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        gradients(model, x)
    handle.remove()
    assert_equal(gradients(model, x), expected)


class Changing(Net):
    """Changes its input, an adapter or a scale between the calls."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        with torch.no_grad():
            x = x * 1
            y = self.q_proj(x)
            if self.what == "x":
                x.add_(1)
            elif self.what == "lora_A":
                self.k_proj.lora_A.add_(1)
            elif self.what == "lora_B":
                self.k_proj.lora_B.add_(1)
            elif self.what == "scaling":
                self.k_proj.scaling = 9.0
            elif self.what == "enabled":
                self.k_proj.enabled = False
            elif self.what == "grad mode":
                with torch.enable_grad():
                    return y + self.k_proj(x) + self.v_proj(x)
            elif self.what == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    return y + self.k_proj(x) + self.v_proj(x)
            return y + self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize(
    "what", ["x", "lora_A", "lora_B", "scaling", "enabled", "grad mode", "autocast"]
)
def test_what_changes_between_the_calls_counts(what, ran):
    model = small(Changing(what))
    x = rand(40, 64)
    separate = alone(model)
    torch.testing.assert_close(model(x), separate(x), rtol=1e-5, atol=1e-5)
    assert ran["chains"] >= 1


def test_dropout_that_changes_between_the_calls():
    class Dropping(Net):
        def forward(self, x):
            y = self.q_proj(x)
            self.k_proj.dropout = 0.5
            return self.k_proj(x) if y is not None else y

    model = small(Dropping(), dropout=0.1)
    dropped = (model(rand(400, 64).fill_(1)) - model.net.k_proj.bias).std()
    model.net.k_proj.dropout = 0.1
    assert dropped > 0  # k ran with its own mask, not with the one that was drawn for 0.1


class Freezing(Net):
    """k's adapter and x begin to need gradients after q was called."""

    def forward(self, x):
        y = self.q_proj(x)
        self.k_proj.lora_A.requires_grad_(True)
        x.requires_grad_(True)
        return y + self.k_proj(x) + self.v_proj(x)


def test_gradients_that_are_wanted_later():
    model = small(Freezing())
    model.net.k_proj.lora_A.requires_grad_(False)
    separate, x = alone(model), rand(40, 64)
    assert_same(gradients(model, x.clone()), gradients(separate, x.clone()))


class Checkpointed(Net):
    """A checkpoint around some of the layers."""

    def forward(self, x):
        y = self.q_proj(x)
        return y + checkpoint(lambda x: self.k_proj(x) * self.v_proj(x), x, use_reentrant=False)


@pytest.mark.parametrize("grad", [False, True])
def test_a_checkpoint_around_some_layers(grad):
    model = small(Checkpointed())
    x = rand(40, 64, requires_grad=grad)
    assert_same(gradients(model, x), gradients(alone(model), x))


def test_heads_with_losses_of_their_own():
    """Two backward passes, which layers alone allow if x needs no gradient."""
    model = small()
    x = rand(40, 64)
    q, k = model.net.q_proj(x), model.net.k_proj(x)
    q.sum().backward()
    k.sum().backward()
    assert model.net.k_proj.lora_A.grad is not None


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


def test_pickles_of_one_layer():
    model = small()
    layer = model.net.q_proj
    place = pickle.loads(pickle.dumps(layer)).shared_input
    assert place is None or place._parent() is None
    del model
    gc.collect()
    assert pickle.loads(pickle.dumps(layer)).shared_input is None


def test_pickles_of_peft_models_do_not_name_this_library():
    model = fused(adapted(kind="peft"))
    assert b"fused_lora.layers" not in pickle.dumps(model)
    assert b"fused_lora.peft" not in pickle.dumps(model)


STATES = {
    "merged": lambda layer: layer.merge(),
    "disabled": lambda layer: setattr(layer, "enabled", False),
    "another impl": lambda layer: setattr(layer, "impl", "torch"),
    "reference": lambda layer: setattr(layer, "impl", "reference"),
    "own forward": lambda layer: setattr(
        layer, "forward", lambda x: 2 * type(layer).forward(layer, x)
    ),
}


@pytest.mark.parametrize("change", STATES.values(), ids=list(STATES))
@pytest.mark.parametrize("index", [0, 1])
def test_the_others_still_share(index, change, ran):
    model = small()
    separate = alone(model)
    for candidate in (model, separate):
        change([candidate.net.q_proj, candidate.net.k_proj][index])
    x = rand(40, 64)
    got, expected = gradients(model, x), gradients(separate, x)
    assert_same(got, expected)
    assert ran["chains"] == 1


def test_dora_runs_alone_and_is_reported(ran):
    model = adapted(use_dora=True)
    report = fuse_projections(model)
    assert "DoRA" in report.summary
    assert not report.groups
    step(model)
    assert not ran


def test_threads():
    model = small()
    x = [rand(40, 64) for _ in range(4)]
    expected = [gradients(copy.deepcopy(model), each)["y"] for each in x]
    results = {}

    def work(i):
        with torch.no_grad():
            results[i] = [model(x[i]) for _ in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, found in results.items():
        for y in found:
            torch.testing.assert_close(y, expected[i], rtol=1e-5, atol=1e-5)


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


def test_a_copy_of_one_layer_is_alone():
    model = small()
    layer = copy.deepcopy(model.net.q_proj)
    assert layer.shared_input is None
    assert model.net.q_proj.shared_input is not None
    x = rand(40, 64)
    torch.testing.assert_close(layer(x), model.net.q_proj(x))


def test_the_model_is_freed():
    """Places refer to modules weakly: no cycle delays it."""
    model = small()
    freed = weakref.ref(model.net.q_proj)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_a_replaced_layer_is_found():
    model = small()
    replacement = nn.Linear(64, 64).double()
    separate = alone(model)
    model.net.k_proj = separate.net.k_proj = replacement
    x = rand(40, 64)
    assert_same(gradients(model, x), gradients(separate, x))


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


WRONG_GROUPS = [
    ([["q_proj"]], "two or more"),
    ([["q_proj", "q_proj"]], "different names"),
    (["q_proj"], "groups of names"),
    ([["q_proj", "absent"]], "which no module has"),
    ([["q_proj", 3]], "groups of names"),
]


@pytest.mark.parametrize("case", WRONG_GROUPS, ids=lambda case: case[1])
def test_wrong_groups(case):
    groups, message = case
    with pytest.raises((TypeError, ValueError), match=message):
        fuse_projections(small(), groups)


def test_wrong_models():
    with pytest.raises(TypeError, match="expected a model"):
        fuse_projections("model")
    with pytest.raises(ValueError, match="patch_peft"):
        fuse_projections(adapted(kind="peft"))
    with pytest.raises(TypeError, match="fuse_mlp"):
        apply_lora(llama(), fuse_mlp="yes")


class MLP(nn.Module):
    """A gated MLP; subclasses have other forwards."""

    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.act = nn.SiLU() if act is None else act
        self.limit = 7.0

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Reversed(MLP):
    def forward(self, x):
        return self.down(torch.mul(self.up(x), F.gelu(self.gate(x), approximate="tanh")))


class Clamped(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x).clamp(max=7)) * self.up(x))


class Scaled(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * 2)


class Limited(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x).clamp(max=self.limit))


class Normed(MLP):
    def forward(self, x):
        return self.down(F.layer_norm(self.act(self.gate(x)) * self.up(x), (48,)))


class Residual(MLP):
    def forward(self, x):
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Branching(MLP):
    def forward(self, x):
        if x.shape[0] > 100:
            x = x * 2
        return self.down(self.act(self.gate(x)) * self.up(x))


class Typed(MLP):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x.float()
        return self.down(self.act(self.gate(x)) * self.up(x))


class TwoInputs(MLP):
    def forward(self, x, other):
        return self.down(self.act(self.gate(x)) * self.up(other))


class SameTwice(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.gate(x))


class InPlace(MLP):
    def forward(self, x):
        g = self.gate(x)
        g.clamp_(max=0.1)
        return self.down(self.act(g) * self.up(x))


class Dropped(MLP):
    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        _ = F.relu(h, inplace=True)
        return self.down(h)


class ItemSet(MLP):
    def forward(self, x):
        g = self.gate(x)
        g[..., :8] = 0
        return self.down(self.act(g) * self.up(x))


class Without(MLP):
    def forward(self, x):
        with torch.no_grad():
            u = self.up(x)
        return self.down(self.act(self.gate(x)) * u)


class Decorated(MLP):
    @torch.no_grad()
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Swallowing(MLP):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        try:
            y = y * self.scale
        except Exception:
            y = y * 2
        return y


class Random(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) if random.random() < 1 else x


class Monitored(MLP):
    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        print(h)
        return self.down(h)


class Reading(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * len(x.shape))


def helper(x):
    return F.silu(x)


class Helped(MLP):
    def forward(self, x):
        return self.down(helper(self.gate(x)) * self.up(x))


class OwnCall(MLP):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OwnAttribute(MLP):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Shadowed(MLP):
    act = staticmethod(torch.tanh)


def is_linear(module) -> bool:
    return isinstance(module, nn.Linear)


GATED = {
    "silu": (MLP(), "silu", ("gate", "up")),
    "gelu": (MLP(nn.GELU()), "gelu", ("gate", "up")),
    "gelu_tanh": (MLP(nn.GELU(approximate="tanh")), "gelu_tanh", ("gate", "up")),
    "relu": (MLP(nn.ReLU()), "relu", ("gate", "up")),
    "function": (MLP(F.silu), "silu", ("gate", "up")),
    "reversed": (Reversed(), "gelu_tanh", ("up", "gate")),
}


@pytest.mark.parametrize("case", GATED.values(), ids=list(GATED))
def test_gated_mlps_are_recognised_and_equal(case, ran):
    module, activation, order = case
    found = prove(module, gated_block.original_forward(module), is_linear)
    assert (found.gate, found.up, found.down) == ("gate", "up", "down")
    assert (found.activation, found.order) == (activation, order)
    model = nn.Sequential(copy.deepcopy(module))
    apply_lora(model, rank=4, dropout=0.3)
    train_like(model.train().double())
    x = rand(40, 32)
    separate = alone(model)
    assert_same(gradients(model, x), gradients(separate, x))
    assert ran["blocks"] == 1


LOOKALIKES = {
    Clamped: "clamp",
    Scaled: "multiplies or returns",
    Limited: "reads self.limit",
    Normed: "layer_norm",
    Residual: "add",
    Branching: "more than return one expression: ",
    Typed: "more than return one expression: ",
    TwoInputs: "cannot be followed",
    SameTwice: "more than once",
    InPlace: "more than return one expression: ",
    Dropped: "it drops the result of relu",
    ItemSet: "more than return one expression: ",
    Without: "try or with",
    Decorated: "try or with",
    Swallowing: "try or with",
    Random: "more than return one expression: ",
    Monitored: "more than return one expression: ",
    Reading: "reads the shape of a tensor",
    Helped: "its forward calls helper",
    OwnCall: "a __call__ of its own",
    OwnAttribute: "a __getattr__ of its own",
    Shadowed: "its class has another act",
}


@pytest.mark.parametrize("cls", LOOKALIKES, ids=lambda cls: cls.__name__)
def test_lookalikes_are_refused_by_name(cls):
    with pytest.raises(NotGatedError, match=LOOKALIKES[cls]):
        prove(cls(), gated_block.original_forward(cls()), is_linear)
    model = nn.Sequential(cls())
    apply_lora(model, rank=4, fuse_projections=False)
    report = fuse_projections(model)
    assert LOOKALIKES[cls] in report.blocks["0"]
    assert gated_block.block_of(model[0]) is None


class ChangingActivation(nn.Module):
    def forward(self, x):
        x.clamp_(max=3)
        return F.silu(x)


class ModalActivation(nn.Module):
    def forward(self, x):
        return F.silu(x) if self.training else F.relu(x)


class PrivateActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self._approximate = ["tanh"]

    def forward(self, x):
        return F.gelu(x, approximate=self._approximate[0])


class CallingActivation(nn.SiLU):
    def __call__(self, x):
        return 2 * super().__call__(x)


ACTIVATION_LOOKALIKES = {
    "tanh": nn.Tanh(),
    "leaky": nn.LeakyReLU(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "in a container": nn.Sequential(nn.SiLU()),
    "scaled": lambda x: F.silu(x) * 2,
    "clamped": lambda x: F.silu(x, inplace=False).clamp(max=3),
    "of a scaled input": lambda x: F.gelu(2 * x),
    "in place": nn.SiLU(inplace=True),
    "changes its input": ChangingActivation(),
    "has modes": ModalActivation(),
    "reads a private attribute": PrivateActivation(),
    "has a call of its own": CallingActivation(),
}


@pytest.mark.parametrize("act", ACTIVATION_LOOKALIKES.values(), ids=list(ACTIVATION_LOOKALIKES))
def test_other_activations_are_refused(act):
    with pytest.raises(NotGatedError):
        prove(MLP(act), MLP.forward, is_linear)


class Twice(FusedLoRALinear):
    def forward(self, input):
        return 2 * super().forward(input)


def in_block(module=None, **options) -> nn.Sequential:
    model = nn.Sequential(MLP() if module is None else module)
    apply_lora(model, rank=4, **options)
    return train_like(model.train().double())


CHANGES = {
    "another activation": lambda m: setattr(m, "act", nn.Tanh()),
    "another setting": lambda m: setattr(m.act, "inplace", True),
    "a hook on the activation": lambda m: m.act.register_forward_hook(lambda _, a, y: y * 2),
    "a hook on a layer": lambda m: m.down.register_forward_hook(lambda _, a, y: y * 2),
    "a pre-hook on a layer": lambda m: m.up.register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
    "a forward of the layer": lambda m: setattr(
        m.gate, "forward", lambda x: 2 * F.linear(x, m.gate.weight)
    ),
    "its own forward": lambda m: setattr(m, "forward", lambda x: m.down(m.gate(x))),
    "a merged layer": lambda m: m.up.merge(),
    "a disabled layer": lambda m: setattr(m.gate, "enabled", False),
    "another impl": lambda m: setattr(m.gate, "impl", "reference"),
    "a layer of a subclass": lambda m: setattr(m.up, "__class__", Twice),
    "a layer replaced": lambda m: setattr(m, "up", nn.Linear(32, 48).double()),
    "a trained weight": lambda m: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_module_runs_its_own_forward(change, ran):
    model = in_block()
    separate = alone(model)
    torch.manual_seed(0)
    change(model[0])
    torch.manual_seed(0)
    change(separate[0])
    x = rand(40, 32)
    assert_same(gradients(model, x), gradients(separate, x))
    assert ran["blocks"] == (change is CHANGES["a trained weight"])


@pytest.mark.parametrize("value", [1.0, 1.5, -0.5, True])
def test_an_invalid_dropout_raises_as_alone(value):
    model, group = in_block(), small()
    model[0].up.dropout = group.net.k_proj.dropout = value
    for candidate, width in ((model, 32), (group, 64)):
        with pytest.raises((TypeError, ValueError), match="dropout"):
            candidate(rand(40, width))


def test_an_unknown_impl_raises_as_alone():
    model, group = in_block(), small()
    for layer in lora_layers(model).values():
        layer.impl = "nonsense"
    group.net.q_proj.impl = "nonsense"
    for candidate, width in ((model, 32), (group, 64)):
        with pytest.raises(ValueError, match="impl"):
            candidate(rand(40, width))


def test_a_block_called_by_keyword(ran):
    model = in_block()
    x = rand(40, 32)
    assert torch.equal(model[0](x=x), model[0](x))
    assert ran["blocks"] == 2
    with pytest.raises(TypeError, match="unexpected keyword"):
        model[0](y=x)


def test_the_class_gets_its_forward_back():
    class Own(MLP):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    before = Own.forward
    first, second = in_block(Own()), in_block(Own())
    assert Own.forward is not before
    unload_lora(first)
    assert Own.forward is not before  # the second one is a block still
    unfuse_projections(second)
    assert Own.forward is before


def test_a_forward_taken_from_a_class_with_blocks(ran):
    keep = in_block()

    class Borrowed(MLP):
        forward = type(keep[0]).forward

    model = in_block(Borrowed())
    model(rand(40, 32))
    assert ran["blocks"] == 1


def test_an_activation_without_members(ran):
    """An empty container is falsy."""

    class Empty(nn.Sequential):
        def forward(self, input):
            return F.silu(input)

    in_block(MLP(Empty()))(rand(40, 32))
    assert ran["blocks"] == 1


def test_a_hook_on_every_module(ran):
    model, calls = in_block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        model(rand(40, 32))
    finally:
        handle.remove()
    assert len(calls) == 6
    assert not ran["blocks"]


def test_wrong_input_has_the_layers_own_error():
    model = in_block()
    with pytest.raises(ValueError, match="expected x of shape"):
        model(rand(40, 31))
    with pytest.raises(TypeError, match="dtype"):
        model(torch.randn(40, 32))
    group = small()
    with pytest.raises(ValueError, match="expected x of shape"):
        group(rand(40, 63))


def test_a_forward_replaced_later_is_respected(ran):
    """Another library may patch the class after the blocks were found."""

    class Own(MLP):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    model = in_block(Own())
    Own.forward = lambda self, x: self.down(torch.tanh(self.gate(x)))
    x = rand(40, 32)
    expected = model[0].down(torch.tanh(model[0].gate(x)))
    torch.testing.assert_close(model(x), expected)
    assert not ran["blocks"]
    report = fuse_projections(model)
    assert "tanh" in report.blocks["0"]


def test_subclasses_derived_later_keep_the_block(ran):
    """FSDP2 swaps the class of a module for a subclass."""
    model = in_block()
    model[0].__class__ = type("Derived", (MLP,), {})
    model(rand(40, 32))
    assert ran["blocks"] == 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, x, mask, *, scale):
        x = self.norm(x)
        q, k = self.q(x), self.k(x)
        assert mask is not None, "stops here"
        return self.o(q + k + self.v(x))


class Noisy(Net):
    def __init__(self):
        super().__init__()
        self.count, self.log = 0, []
        self.register_buffer("cache", torch.ones(1))

    def forward(self, x):
        self.count += 1
        self.log.append(x)
        self.cache.zero_()
        random.random()
        numpy.random.rand()
        self.q_proj(x)
        self.k_proj(x)
        self.v_proj(x)
        raise SystemExit


def test_the_probe_sees_what_ran_and_leaves_no_trace():
    module = Attention()
    before = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    found = shared_inputs(module, Attention.forward, is_linear)
    assert found == [("q", "k")]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), before[1].values(), strict=True)
    )
    python, numpy_state = random.getstate(), numpy.random.get_state()[1].tolist()
    noisy = Noisy()
    assert shared_inputs(noisy, Noisy.forward, is_linear) == [("q_proj", "k_proj", "v_proj")]
    assert (noisy.count, noisy.log, noisy.cache.tolist()) == (0, [], [1.0])
    assert random.getstate() == python
    assert numpy.random.get_state()[1].tolist() == numpy_state
    assert shared_inputs(MLP(), gated_block.original_forward(MLP()), is_linear) == [("gate", "up")]
    assert shared_inputs(Net(), Net.forward, is_linear) == [("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("rows", [1, 31])
def test_few_rows_run_alone(rows, ran):
    small()(rand(rows, 64))
    in_block()(rand(rows, 32))
    assert not ran


def test_inference_mode_and_other_tensors_run_alone(ran):
    model = small()
    with torch.inference_mode():
        model(rand(40, 64))
    assert not ran
    jagged = torch.nested.nested_tensor([rand(30, 64), rand(9, 64)], layout=torch.jagged)
    model(jagged)
    assert not ran
