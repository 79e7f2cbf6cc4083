"""``apply_lora`` on Parameters of no layer: experts, which run fused, and routers."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from models import tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    LoRAParameter,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    assert_only_lora_gradients,
    check_adapters,
    delete_adapter,
    disable_lora,
    explain,
    lora_layers,
    merge_lora,
    parameter_summary,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from fused_lora.layers import parameter_forward
from support import by_default, relative_rms

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")
from expert_nets import (  # noqa: E402
    BF16,
    BOTH,
    FAMILIES,
    FP32,
    FP64,
    E,
    Holder,
    assert_close,
    causal,
    experts_of,
    logits_and_gradients,
    results,
    routed,
)
from expert_nets import adapted as pefts  # noqa: E402
from parameter_nets import noisy, own  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore:fused_lora. "all-linear" has no adapter for')
KINDS = ["Qwen3Moe", "GptOss", "NemotronH", "MuseSpark"]


def summed(model: nn.Module) -> Holder:
    """The same experts, with ``W + s·B A`` in their Parameters, computed one by one."""
    layer = model.experts
    experts = copy.deepcopy(layer.holder)
    for part in layer.chain():
        weight = experts._parameters[part.parameter_name]
        rank = part.rank
        for e in range(E):
            delta = part.scaling * part.lora_B[:, e::E] @ part.lora_A[e * rank : (e + 1) * rank]
            with torch.no_grad():
                weight[e] += delta.mT if experts.is_transposed else delta
    return Holder(experts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_pefts(kind):
    """lora_A has the expert slowest, lora_B fastest."""
    model, inputs = own(kind), routed()
    assert relative_rms(model(*inputs), summed(model)(*inputs)) <= 1e-12
    with disable_lora(model):
        assert relative_rms(model(*inputs), summed(model)(*inputs)) > 0.01


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_sum(kind, implementation, monkeypatch):
    model = own(kind, implementation)
    got = results(model)
    monkeypatch.setattr(parameter_forward, "unfused_reason", lambda module: "a test")
    with pytest.warns(UserWarning, match=r"W \+ s·B A at every call \(a test\)"):
        expected = results(model)
    assert_close(got, expected, 1e-12)
    assert len(got) == 7


FAMILY = ["Qwen3Moe", "GptOss"]


@pytest.mark.parametrize("family", by_default(FAMILY, FAMILIES))
def test_whole_models_are_pefts(family):
    """Experts and the router: logits, and every gradient by the same names."""
    router = "router.weight" if family in ("GraniteMoe", "GptOss") else "gate.weight"
    targets = [*BOTH, router]
    model = causal(family)
    theirs = pefts(copy.deepcopy(model), targets=targets)
    apply_lora(model, rank=3, alpha=6, target_modules=[], target_parameters=targets)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                head, _, last = name.rpartition(".")
                p.copy_(theirs.get_parameter(f"base_model.model.{head}.{last}.default.weight"))
    torch.manual_seed(3)
    expected = logits_and_gradients(theirs)
    torch.manual_seed(3)
    got = logits_and_gradients(model)
    expected = {
        name.replace("base_model.model.", "").replace(".default.weight", ""): value
        for name, value in expected.items()
    }
    assert_close(got, expected, 1e-12)
    assert_only_lora_gradients_of(model, family)


def assert_only_lora_gradients_of(model: nn.Module, family: str) -> None:
    model(tokens(2, 9)).logits.square().mean().backward()
    assert_only_lora_gradients(model)
    assert check_adapters(model) == {}, family


def test_all_linear_takes_experts_with_twice_the_rank_and_names_the_routers():
    model = causal("Qwen3Moe")
    with pytest.warns(UserWarning, match='"all-linear" has no adapter for the routers') as found:
        names = apply_lora(model, rank=3, alpha=6)
    (said,) = (str(warning.message) for warning in found)
    share = 100 * E * 32 / sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert f"model.layers.0.mlp.gate.weight ({share:.2g} % of the weights)" in said
    assert "target_parameters=['experts.down_proj', 'experts.gate_up_proj', 'gate.weight']" in said
    assert names[-2:] == ["model.layers.0.mlp.experts.base_layer", "model.layers.0.mlp.experts"]
    first, last = (model.get_submodule(name) for name in names[-2:])
    assert (first.parameter_name, first.rank, first.scaling) == ("gate_up_proj", 6, 2)
    assert (last.parameter_name, last.rank, last.scaling) == ("down_proj", 3, 2)
    assert parameter_summary(model).adapters == sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )
    theirs = peft.get_peft_model(
        causal("Qwen3Moe"), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    )
    chain = theirs.base_model.model.model.layers[0].mlp.experts
    assert (chain.r["default"], chain.scaling["default"]) == (last.rank, last.scaling)
    inner = chain.base_layer
    assert (inner.r["default"], inner.scaling["default"]) == (first.rank, first.scaling)


def test_patterns_and_exclusion_name_parameters():
    options = {"rank": 3, "rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"down_proj": 9}}
    model = causal("Qwen3Moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(model, exclude_modules=[".mlp.gate", "mlp.gate"][1:], **options)
    first = model.get_submodule("model.layers.0.mlp.experts.base_layer")
    last = model.get_submodule("model.layers.0.mlp.experts")
    assert (first.rank, last.rank, last.alpha) == (5, 3, 9)
    model = causal("Qwen3Moe")
    names = apply_lora(model, exclude_modules=r".*\.gate_up_proj|.*\.mlp\.gate")
    assert model.get_submodule(names[-1]).chain()[-1].parameter_name == "down_proj"
    assert "model.layers.0.mlp.experts.base_layer" not in names
    model = causal("Qwen3Moe")
    names = apply_lora(model, target_modules=["q_proj"])
    assert names == ["model.layers.0.self_attn.q_proj"]  # a list takes no experts


class Calls(nn.Module):
    def forward(self, x):
        return x


WRONG = [
    ({"target_parameters": "experts.down_proj"}, TypeError, "a list of names"),
    ({"target_parameters": ["experts.down_prj"]}, ValueError, "similar: down_proj"),
    ({"target_parameters": [3]}, TypeError, "to be names"),
    ({"target_parameters": BOTH, "use_dora": True}, ValueError, "for use_dora"),
    ({"target_parameters": BOTH, "init": "pissa"}, ValueError, "default, gaussian"),
    ({"target_parameters": ["head.weight"]}, TypeError, "name the layer"),
    ({"target_parameters": ["norm.scale"]}, ValueError, "one of shape"),
    ({"target_parameters": ["own"]}, ValueError, "got own of the model itself"),
    ({"target_parameters": []}, ValueError, "expected"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_wrong_targets(options, error, message):
    model = Holder(experts_of(dtype=FP32))
    model.head, model.norm = nn.Linear(4, 4), Calls()
    model.norm.scale = nn.Parameter(torch.ones(4))
    model.own = nn.Parameter(torch.ones(4, 4))
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        apply_lora(model, target_modules=[], **options)
    assert type(model.experts) is not LoRAParameter
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[n][0] is p and after[n][1] == flag for n, (p, flag) in before.items())


def test_names_that_match_nothing_are_told():
    model = Holder(experts_of())
    with pytest.warns(UserWarning, match="target_parameters has gate_proj, which names no"):
        apply_lora(model, target_modules=[], target_parameters=["gate_proj", "down_proj"])


def test_a_parameter_around_an_adapted_layer_is_refused():
    """Its files would name the layer by another place."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4))
            self.proj = nn.Linear(4, 4)

    model = nn.Sequential(Block())
    with pytest.raises(ValueError, match="contains an adapted Linear"):
        apply_lora(model, target_parameters=["table"])


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("keep_base", [True, False])
def test_merging(kind, keep_base):
    model, inputs = own(kind), routed()
    plain = copy.deepcopy(model.experts.holder.state_dict())
    expected = model(*inputs)
    merge_lora(model, keep_base)
    assert relative_rms(model(*inputs), expected) <= 1e-12
    if keep_base:
        with disable_lora(model):
            assert torch.equal(model(*inputs), experts_of(kind)(*inputs))
        unmerge_lora(model)
        assert torch.equal(model(*inputs), expected)
    else:
        with disable_lora(model), pytest.raises(RuntimeError, match="keep_base=False"):
            model(*inputs)
    merged = unload_lora(model)
    assert type(merged.experts) is type(experts_of(kind))
    assert relative_rms(merged(*inputs), expected) <= 1e-12
    assert merged.experts.state_dict().keys() == plain.keys()
    restored = unload_lora(own(kind), merge=False).experts.state_dict()
    assert all(torch.equal(restored[name], plain[name]) for name in plain)


def test_one_of_two_adapters_off():
    model, inputs = own(), routed()
    last, first = model.experts.chain()
    last.enabled = False
    expected = model(*inputs)
    first.merge()
    assert relative_rms(model(*inputs), expected) <= 1e-12
    last.enabled, first.enabled = True, False  # the kept base weight, beside a live adapter
    got = model(*inputs)
    first.unmerge()
    assert relative_rms(got, model(*inputs)) <= 1e-12


def test_an_overflow_leaves_the_weights():
    model = own(dtype=torch.float16, adapter_dtype=FP32)
    with torch.no_grad():
        model.experts.lora_B.fill_(6e4)
    before = model.experts.weight.clone()
    with pytest.raises(ValueError, match="float16"):
        merge_lora(model)
    assert torch.equal(model.experts.weight, before)
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_several_adapters():
    model, inputs = own(), routed()
    first = model(*inputs)
    add_adapter(model, "other", rank=2, alpha=5)
    assert set_adapter(model, "other") == ["experts", "experts.base_layer"]
    noisy(model)
    second = model(*inputs)
    with disable_lora(model):
        plain = model(*inputs)
    assert relative_rms(second, first) > 0.01
    add_weighted_adapter(model, "both", {"default": 0.5, "other": -2.0})
    add_weighted_adapter(model, "best", {"default": 0.5, "other": -2.0}, combination="svd", rank=5)
    layers = lora_layers(model)
    deltas = {n: layer._adapted_matrix() - layer.weight for n, layer in layers.items()}
    set_adapter(model, "default")
    for name, layer in layers.items():
        deltas[name] = 0.5 * (layer._adapted_matrix() - layer.weight) - 2 * deltas[name]
    for name in ("both", "best"):
        set_adapter(model, name)
        for place, layer in layers.items():
            assert layer.rank == 5
            got = layer._adapted_matrix() - layer.weight
            assert relative_rms(got, deltas[place]) <= 1e-12, (name, place)
    set_adapter(model, "default")
    delete_adapter(model, "both")
    assert torch.equal(model(*inputs), first)
    assert relative_rms(plain, first) > 0.01


def test_state_dicts_load_into_adapted_plain_and_merged_models():
    model, inputs = own(), routed()
    expected = model(*inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "experts.base_layer.base_layer.gate_up_proj" in state
    other = noisy(own(), scale=0.1)
    with torch.no_grad():
        for layer in lora_layers(other).values():
            layer.weight.mul_(2)
    other.load_state_dict(state)
    assert torch.equal(other(*inputs), expected)
    merge_lora(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    merge_lora(other)
    other.load_state_dict(state)
    assert all(layer.merged for layer in lora_layers(other).values())
    assert relative_rms(other(*inputs), expected) <= 1e-12
    plain = experts_of().state_dict()
    fresh = noisy(own(), scale=0.1)
    adapters = {n: p.clone() for n, p in fresh.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for layer in lora_layers(fresh).values():
            layer.weight.mul_(2)
    fresh.load_state_dict({f"experts.{name}": value for name, value in plain.items()})
    assert all(torch.equal(p, adapters[n]) for n, p in fresh.named_parameters() if n in adapters)
    assert torch.equal(fresh.experts.weight, plain["down_proj"])
    final = own()
    merge_lora(final, keep_base=False)
    with pytest.raises(RuntimeError, match="merged with keep_base=False, got it only in part"):
        final.load_state_dict({n: v for n, v in state.items() if "lora" in n}, strict=False)
    final.load_state_dict(state)
    assert relative_rms(final(*inputs), expected) <= 1e-12


def test_copies_and_pickles():
    model, inputs = own(), routed()
    expected = model(*inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), expected)
        assert other.experts.holder is not model.experts.holder


def test_dropout_belongs_to_tokens_and_is_refused_for_sums():
    model, inputs = own(dropout=0.4, parameters=BOTH[1:]), routed()
    torch.manual_seed(5)
    dropped = model.train()(*inputs)
    torch.manual_seed(5)
    assert torch.equal(model(*inputs), dropped)
    whole = model.eval()(*inputs)
    assert relative_rms(dropped, whole) > 0.05
    torch.manual_seed(6)
    mean = sum(model.train()(*inputs).detach() for _ in range(400)) / 400
    assert relative_rms(mean, whole) < 0.15 * relative_rms(dropped, whole)
    router = nn.Sequential(experts_router())
    apply_lora(router, target_modules=[], target_parameters=["weight"], dropout=0.1)
    with pytest.raises(RuntimeError, match="expected dropout=0, got dropout of the adapters"):
        router(torch.randn(3, 32))
    router.eval()(torch.randn(3, 32))


def experts_router() -> nn.Module:
    return causal("Qwen3Moe", dtype=FP32).model.layers[0].mlp.gate


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    found = []
    for through in (False, True):
        model, (x, index, shares) = own(dropout=0.3).train(), routed()
        args = x, index, shares
        torch.manual_seed(4)
        y = checkpoint(model, *args, use_reentrant=use_reentrant) if through else model(*args)
        y.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([y, x.grad, shares.grad, *gradients])
    assert len(found[0]) == 7
    assert all(map(torch.equal, *found))


def test_half_precision_with_float32_adapters():
    exact, model = own(), own(dtype=BF16, adapter_dtype=None)
    assert model.experts.lora_A.dtype == FP32
    x, index, shares = (t.detach() for t in routed())
    y = model(x.to(BF16), index, shares.to(BF16))
    assert y.dtype == BF16
    assert relative_rms(y, exact(x, index, shares)) < 0.03


def test_generation_switches_the_implementation_and_keeps_the_adapters():
    model = causal("Qwen3Moe", "grouped_mm", dtype=FP32)
    apply_lora(model, rank=3)
    noisy(model, scale=0.5).eval()
    prompt = tokens(2, 6)
    found = []
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        found.append(model.generate(prompt, max_new_tokens=6, do_sample=False))
    with disable_lora(model):
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain)


def test_another_implementation_computes_the_sum_and_says_so():
    from transformers.integrations import moe

    model, inputs = own(implementation="batched_mm"), routed()
    expected = model(*inputs)
    moe.ALL_EXPERTS_FUNCTIONS._global_mapping["mine"] = moe.batched_mm_experts_forward
    try:
        model.experts.holder.config._experts_implementation = "mine"
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            got = model(*inputs)
            model(*inputs)
        (said,) = found
        assert "(the experts implementation mine)" in str(said.message)
        assert relative_rms(got, expected) <= 1e-12
    finally:
        del moe.ALL_EXPERTS_FUNCTIONS._global_mapping["mine"]


def test_hooks_see_the_adapted_experts_and_survive():
    experts = experts_of()
    seen = []
    handle = experts.register_forward_hook(lambda module, args, y: seen.append((module, y)))
    model = Holder(experts)
    apply_lora(model, target_modules=[], target_parameters=BOTH, adapter_dtype=FP64)
    y = noisy(model)(*routed())
    assert seen == [(model.experts, y)]
    handle.remove()
    model(*routed())
    assert len(seen) == 1
    experts.register_forward_hook(lambda module, args, y: seen.append((module, y)))
    with pytest.warns(UserWarning, match="a hook"):
        assert relative_rms(model(*routed()), y) <= 1e-12
    assert seen[-1][0] is experts


def test_meta_devices_and_dtypes():
    with torch.device("meta"):
        model = Holder(experts_of())
    apply_lora(model, target_modules=[], target_parameters=BOTH, adapter_dtype=FP32)
    with pytest.raises(ValueError, match="meta device"):
        merge_lora(model)
    model.load_state_dict(
        {f"experts.{n}": v for n, v in experts_of(dtype=FP32).state_dict().items()}, assign=True
    )
    x, index, shares = (t.detach() for t in routed())
    x, shares = x.float(), shares.float()
    plain = experts_of(dtype=FP32)(x, index, shares)
    assert relative_rms(model(x, index, shares), plain) < 1e-6
    noisy(model)
    expected = model(x, index, shares)
    model.double()
    assert model.experts.scaling == 2
    assert relative_rms(model(x.double(), index, shares.double()), expected) < 1e-5


def test_the_router_trains():
    model = nn.Sequential(experts_router())
    apply_lora(model, target_modules=[], target_parameters=["weight"], rank=2)
    noisy(model)
    x = torch.randn(5, 32)
    logits, *_ = model(x)
    layer = model[0]
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    expected, *_ = experts_router()(x)
    assert relative_rms(logits, expected) > 0.01
    plain = experts_router()
    with torch.no_grad():
        plain.weight += delta
    assert relative_rms(logits, plain(x)[0]) < 1e-5
    logits.sum().backward()
    assert layer.lora_A.grad.norm() > 0


def test_compiled_models_run_experts_between_their_graphs(nothing_compiled):
    model, inputs = own(), [t.detach() for t in routed()]
    expected = model(*inputs)
    merge_lora(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    merged = torch.compile(model, backend=backend)(*inputs)
    unmerge_lora(model)
    got = torch.compile(model, backend=backend)(*inputs)
    assert torch.equal(got, expected)
    assert relative_rms(merged, expected) <= 1e-12
    assert lora_layers(model)["experts"].has_run


def test_the_kernels_run_on_request():
    model, inputs = own(dtype=FP32, impl="triton"), [t.detach() for t in routed()]
    inputs = [t if t.dtype == torch.int64 else t.float() for t in inputs]
    exact = own()(*routed())
    assert relative_rms(model(*inputs), exact) < 1e-6
    assert explain(model.experts).impl == "triton"


def test_explain():
    layer = own(dtype=FP32, dropout=0.1).experts
    assert explain(layer, tokens=64).reason == "the tensors are on a cpu device"
    assert explain(layer, impl="reference").impl == "reference"
    assert explain(layer, impl="triton").reason.startswith("segments: ")
    router = nn.Sequential(experts_router())
    apply_lora(router, target_modules=[], target_parameters=["weight"])
    assert "W + s·B A at every call" in explain(router[0]).reason
    with pytest.raises(ValueError, match="expected impl"):
        explain(layer, impl="cuda")
    with pytest.raises(ValueError, match="expected triton:split or triton:addmm"):
        explain(layer, impl="triton:seeded")


def test_exporting_computes_the_sum():
    model, inputs = own(implementation="batched_mm").eval(), [t.detach() for t in routed()]
    expected = model(*inputs)
    with pytest.warns(UserWarning, match=r"compute W \+ s·B A at every call"):
        program = torch.export.export(model, tuple(inputs), strict=False)
    assert relative_rms(program.module()(*inputs), expected) <= 1e-12
