"""PEFT's adapters on experts (``target_parameters``), patched: against PEFT's own forward."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tokens
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fused_lora import adapter_segments, patch_peft, unpatch_peft
from fused_lora.layers import experts as layer_experts
from fused_lora.layers.experts import ExpertAdapter, experts_forward
from fused_lora.peft import experts as peft_experts
from support import by_default, kept_bytes, relative_rms

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from peft_nets import noisy  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

E, TOP, T = 4, 2, 13
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 100,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": E},
    "Qwen2Moe": {
        "num_experts": E,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 24},
    "Olmoe": {"num_experts": E},
    "DeepseekV3": {
        "n_routed_experts": E, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "GraniteMoe": {"num_local_experts": E},
    "GptOss": {"num_local_experts": E, "head_dim": 8, "layer_types": ["full_attention"]},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch) -> list:
    """Gets the names of the adapted Parameters of each fused call."""
    found, run = [], peft_experts.fused

    def fused(parts, *args):
        found.append(sorted(parts.adapters))
        return run(parts, *args)

    monkeypatch.setattr(peft_experts, "fused", fused)
    return found


def adapted(model: nn.Module, targets=BOTH, cast=True, **config) -> nn.Module:
    options = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": targets}
    config = peft.LoraConfig(**(options | config))
    return noisy(peft.get_peft_model(model, config, autocast_adapter_dtype=cast))


def causal(family: str, implementation="eager", dtype=FP64, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.2 if p.dim() > 1 else 0.05) + ("norm" in name))
    return model.to(dtype)


class Holder(nn.Module):
    """Experts as a part of a model."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, shares):
        return self.experts(x, index, shares)


def experts_class(name: str) -> type[nn.Module]:
    folder = {"GptOss": "gpt_oss", "Qwen3Moe": "qwen3_moe", "NemotronH": "nemotron_h"}
    folder |= {"MuseSpark": "muse_spark", "Mixtral": "mixtral"}
    module = f"transformers.models.{folder[name]}.modeling_{folder[name]}"
    try:
        return getattr(importlib.import_module(module), f"{name}Experts")
    except ImportError:
        pytest.skip(f"transformers without {name}")


def experts_of(name="Qwen3Moe", implementation="eager", dtype=FP64) -> nn.Module:
    """A module of experts alone: 4 experts of 32 by 24, the Parameters frozen."""
    torch.manual_seed(0)
    numbers = ("num_experts", "num_local_experts", "n_routed_experts")
    config = SimpleNamespace(
        **dict.fromkeys(numbers, E), hidden_size=32, moe_hidden_size=32, intermediate_size=24,
        moe_intermediate_size=24, moe_latent_size=None, hidden_act="silu", mlp_hidden_act="silu",
        swiglu_alpha=1.7, swiglu_limit=7.0, post_norm_eps=1e-6,
        _experts_implementation=implementation,
    )  # fmt: skip
    module = experts_class(name)(config)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return module.to(dtype).requires_grad_(False)


def holder(name="Qwen3Moe", implementation="eager", dtype=FP64, **config) -> nn.Module:
    return adapted(Holder(experts_of(name, implementation, dtype)), **config)


def routed(dtype=FP64) -> tuple:
    """Inputs of experts; the last expert gets no token."""
    torch.manual_seed(1)
    x = torch.randn(T, 32).to(dtype).requires_grad_()
    shares, index = torch.rand(T, E - 1).topk(TOP)
    return x, index, shares.to(dtype).requires_grad_()


def results(model: nn.Module, call=None, inputs=None) -> dict:
    """The output and every gradient."""
    x, index, shares = routed() if inputs is None else inputs
    wanted = {"x": x, "shares": shares} | {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    y = (model if call is None else call)(x, index, shares)
    torch.manual_seed(2)
    found = torch.autograd.grad(y, list(wanted.values()), torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach()} | {f"d {n}": g for n, g in zip(wanted, found, strict=True)}


def assert_close(got: dict, expected: dict, bound: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert value.norm() > 0, name
        assert relative_rms(got[name], value) <= bound, name


def logits_and_gradients(model: nn.Module, **options) -> dict:
    """Of a causal language model: logits, and gradients of its input and every adapter."""
    embedded = model.get_input_embeddings()(tokens(2, 9)).detach().requires_grad_()
    wanted = {"x": embedded} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    logits = model(inputs_embeds=embedded, use_cache=False, **options).logits
    torch.manual_seed(2)
    found = torch.autograd.grad(logits, list(wanted.values()), torch.randn_like(logits))
    return {"logits": logits.detach()} | {f"d {n}": g for n, g in zip(wanted, found, strict=True)}


RUNS = [("eager", FP64), ("batched_mm", FP64), ("grouped_mm", FP32)]
CASES = [(family, *run) for family in FAMILIES for run in RUNS]
KEPT = [case for case in CASES if case[0] in ("Qwen3Moe", "GptOss") or case[1] == "grouped_mm"]


@pytest.mark.parametrize("case", by_default(KEPT, CASES), ids=lambda c: "-".join(map(str, c)))
def test_whole_models_of_every_family(case, calls):
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
    assert calls == [["down_proj", "gate_up_proj"]]
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
def test_experts_alone(kind, targets, implementation, calls):
    """Also those without a gate, those with a norm, and one adapter of two."""
    model = holder(kind, implementation, targets=targets)
    expected = results(model)
    patch_peft(model)
    assert_close(results(model), expected, 1e-12)
    assert calls == [sorted(name.rpartition(".")[2] for name in targets)]


def test_every_class_of_experts_is_known():
    """Those of the installed transformers, by what they run; one computes in float32."""
    root, found = Path(transformers.__file__).parent / "models", {}
    pattern = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    for folder in ("mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "granitemoe", "gpt_oss"):
        for name in pattern.findall((root / folder / f"modeling_{folder}.py").read_text("utf-8")):
            module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
            experts = getattr(module, name)
            experts = experts.__new__(experts)
            vars(experts).update(num_experts=E, has_bias=False, is_transposed=False)
            for run in ("eager", "grouped_mm", "batched_mm"):
                vars(experts)["config"] = SimpleNamespace(_experts_implementation=run)
                found[name, run] = layer_experts.unsupported(experts)
    assert len(found) == 18
    assert set(found.values()) == {None}


@pytest.mark.parametrize("weights", [BF16, FP32], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_half_precision_is_as_good_as_pefts(implementation, weights, calls):
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
    assert calls
    for name, value in theirs.items():
        bound = 2 * relative_rms(value, exact[name]) + 2.0**-8
        assert got[name].dtype == value.dtype, name
        assert relative_rms(got[name], exact[name]) <= bound, name
    assert got["d base_model.model.experts.lora_A.default.weight"].dtype == FP32


@pytest.mark.parametrize(
    ("implementation", "bound"), [("eager", 0.02), ("batched_mm", 0.02), ("grouped_mm", 1e-5)]
)
@pytest.mark.parametrize("inputs", [FP32, BF16], ids=str)
def test_autocast(implementation, bound, inputs, calls):
    """``grouped_mm`` does not follow autocast."""
    model = holder(implementation=implementation, dtype=FP32)

    def call(*args):
        with torch.autocast("cpu", BF16):
            return model(*args)

    expected = results(model, call, routed(inputs))
    patch_peft(model)
    got = results(model, call, routed(inputs))
    assert calls
    assert_close(got, expected, bound if inputs == FP32 else 0.02)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_train_alike(reentrant, calls):
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
    assert len(calls) == 3


def test_generation_keeps_the_adapters(calls):
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
    assert len(calls) == 2 * 2 * 6


def second(model: nn.Module) -> None:
    config = {"r": 2, "target_modules": [], "target_parameters": BOTH}
    model.add_adapter("other", peft.LoraConfig(**config))
    noisy(model)
    model.base_model.set_adapter(["default", "other"])


def experts_in(model: nn.Module) -> nn.Module:
    return model.base_model.model.experts.get_base_layer()


def change(**attributes):
    return lambda model: vars(experts_in(model)).update(attributes)


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


def wrapper(model: nn.Module) -> nn.Module:
    return model.base_model.model.experts


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
def test_fallbacks_are_pefts_own_forward(case, calls, monkeypatch):
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
    assert not calls


def test_roles_of_an_older_peft_are_not_confused(calls):
    """Where in and out are equal, the shapes of exchanged adapters are no sign of it."""
    model = holder(targets=BOTH[1:])
    exchanged(model)
    assert set(patch_peft(model).layers.values()) == {
        "adapters of PEFT before 0.19.1, with in and out exchanged"
    }
    with contextlib.suppress(RuntimeError):  # PEFT's own: of other sizes
        model(*routed())
    assert not calls


def test_modules_that_only_look_like_experts(calls):
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
    assert not calls
    experts_in(
        adapted(Holder(copy.deepcopy(clamped)))
    ).config._experts_implementation = "batched_mm"


def test_words_that_transformers_may_add_later_are_refused():
    def grouped(self, x):
        return x * self.up_scale

    def loop(self, x):
        return x.tanh() @ self.down_proj

    assert layer_experts._words(grouped) == ({"up_scale"}, set())
    grouped.__module__, grouped.__name__ = moe.__name__, "grouped_mm_experts_forward"
    loop.__module__ = "transformers.models.new"
    assert layer_experts._function_reason("grouped_mm", grouped) == "experts that read up_scale"
    assert layer_experts._loop_reason(loop) == "an eager forward with tanh"
    assert layer_experts._words(print) == ({"what has no source"}, set())


def test_calls_that_run_pefts_own_forward(calls):
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
    assert len(calls) == 1
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
    assert len(calls) == 1
    assert model(x[:0], index[:0], shares[:0]).shape == (0, 32)
    assert torch.equal(model(x, index.int(), shares), expected)
    assert len(calls) == 3


def test_an_outer_wrapper_without_an_adapter_leaves_the_inner_one_fused(calls):
    model = holder()
    del wrapper(model).lora_A["default"], wrapper(model).lora_B["default"]
    expected = results(model)
    report = patch_peft(model)
    assert report.layers == {
        "base_model.model.experts.down_proj": "no active adapter",
        "base_model.model.experts.gate_up_proj": None,
    }
    assert_close(results(model), expected, 1e-12)
    assert calls == [["gate_up_proj"]]


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


def test_unpatched_experts_run_pefts_forward_again(calls):
    forward, model, other = ParamWrapper.forward, holder(), holder()
    expected = results(model)
    patch_peft(model)
    results(model)
    assert len(calls) == 1
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
    assert len(calls) == 2


def test_the_life_cycle_stays_pefts(tmp_path, calls):
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
    assert len(calls) == 3
    for name, p in model.named_parameters():
        assert relative_rms(p, state[name]) <= 1e-12, name
    merged = model.merge_and_unload()
    assert type(merged.experts) is experts_class("Qwen3Moe")
    assert relative_rms(merged(*inputs), expected) <= 1e-12


def test_a_batch_of_many_adapters_is_refused():
    """Experts have no way through it: they would run the active adapter on every sample."""
    model = holder()
    patch_peft(model)
    inputs = routed()
    refused = pytest.raises(RuntimeError, match=r"got a lora\.ParamWrapper layer")
    with refused, adapter_segments(model, ["default"] * T):
        model(*inputs)


def test_optimizers_train_alike(calls):
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
    assert len(calls) == 4
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


def test_double_backward():
    experts = experts_of("GptOss", "batched_mm")
    x, index, shares = routed()
    A, B = torch.randn(E, 2, 32, dtype=FP64) * 0.3, torch.randn(E, 48, 2, dtype=FP64)
    inputs = x[:5].detach(), shares[:5].detach(), A, B
    inputs = [t.requires_grad_() for t in inputs]

    def call(x, shares, A, B):
        return experts_forward(
            experts, x, index[:5], shares, {"gate_up_proj": ExpertAdapter(A, B, 0.5)}
        )

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_a_trained_bias_gets_its_gradient(calls):
    model = holder("GptOss")
    experts_in(model).down_proj_bias.requires_grad_()
    expected = results(model)
    patch_peft(model)
    assert_close(results(model), expected, 1e-12)
    assert calls
    assert sum("bias" in name for name in expected) == 1


def draw(experts: nn.Module, scale=0.3) -> dict[str, ExpertAdapter]:
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        _, N, K = layer_experts.weight_of(experts, name).shape
        A, B = (torch.randn(shape, dtype=FP64) * scale for shape in ((E, 3, K), (E, N, 3)))
        found[name] = ExpertAdapter(A, B, 0.7)
    return found


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "MuseSpark"])
def test_sentinels_of_expert_parallelism_add_nothing(kind):
    """Slots of other ranks' experts: what these would compute must not be read."""
    experts = experts_of(kind, "batched_mm")
    experts._is_expert_parallel = True
    x, index, shares = routed()
    index[::3, 0], index[4] = E, E
    with torch.no_grad():
        shares[index == E] = 0
    adapters = draw(experts)
    folded = copy.deepcopy(experts)
    for name, (A, B, s) in adapters.items():
        delta = s * (B @ A)
        folded._parameters[name] += delta.mT if experts.is_transposed else delta

    def grads(call):
        y = call(x, index, shares)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, shares))

    got = grads(lambda *inputs: experts_forward(experts, *inputs, adapters))
    expected = grads(folded)
    assert not got[0][4].any()
    for value, other in zip(got, expected, strict=True):
        assert relative_rms(value, other) <= 1e-12


def test_masks_belong_to_tokens_not_to_experts():
    """With equal experts the route does not matter, nor does dropout's mask depend on it."""
    experts = experts_of()
    adapters = {
        name: ExpertAdapter(*(t[:1].expand_as(t) for t in adapter[:2]), adapter.scaling)
        for name, adapter in draw(experts).items()
    }
    for p in experts.parameters():
        p.copy_(p[:1].expand_as(p))
    x, index, shares = routed()
    found = []
    for route in (index, (index + 1) % E, index.flip(0)):
        torch.manual_seed(4)
        found.append(experts_forward(experts, x, route, shares, adapters, dropout_p=0.4))
    whole = experts_forward(experts, x, index, shares, adapters)
    assert relative_rms(found[0], whole) > 0.05
    for y in found[1:]:
        assert relative_rms(y, found[0]) <= 1e-12


def test_checkpoints_repeat_the_mask():
    experts = experts_of()
    adapters = draw(experts)
    x, index, shares = routed()
    found = []
    for through in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(4)
        y = through(lambda x: experts_forward(experts, x, index, shares, adapters, 0.3), x)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*found)


def test_selective_checkpoints(calls):
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
    assert len(calls) == 3


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_models_run_fused_between_graphs(calls):
    model = holder()
    expected = results(model)
    patch_peft(model)
    assert_close(results(model, torch.compile(model, backend="eager")), expected, 1e-12)
    assert len(calls) == 1
