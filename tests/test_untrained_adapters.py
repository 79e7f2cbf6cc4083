"""``untrained_adapters``: which adapters got no gradient, down to single experts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import ALL, Tiny, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    add_adapter,
    apply_lora,
    fuse_projections,
    patch_peft,
    set_adapter,
    unload_lora,
    untrained_adapters,
)
from support import by_default, caught

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")
from expert_nets import BF16, BOTH, FP32, FP64, E, adapted, causal, holder, routed  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

BLOCK = "base_model.model.model.layers.0.mlp.experts."
STACKS = [f"{BLOCK}down_proj", f"{BLOCK}gate_up_proj"]
HELD = [f"base_model.model.{name}" for name in BOTH]


def each(names: list[str], missing: list[int]) -> dict:
    return dict.fromkeys(names, missing)


@pytest.fixture
def chosen(monkeypatch) -> set[int]:
    """Gets the experts that the router of a fused call selects."""
    from fused_lora.peft import experts as peft_experts

    found, run = set(), peft_experts.fused

    def fused(parts, x, index, shares):
        if torch.is_grad_enabled():
            found.update(index.flatten().tolist())
        return run(parts, x, index, shares)

    monkeypatch.setattr(peft_experts, "fused", fused)
    return found


FAMILIES = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "GptOss"]
RUNS = [(family, "grouped_mm", FP32) for family in FAMILIES]
MORE = [(family, "eager", dtype) for family in FAMILIES for dtype in (FP64, BF16)]


@pytest.mark.parametrize("case", by_default(RUNS, RUNS + MORE), ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("noise", [True, False])  # False: lora_B is zero, as when training begins
def test_experts_that_no_token_reached(case, noise, chosen):
    """One token reaches two of four experts; the others follow, one step after another."""
    family, implementation, dtype = case
    model = causal(family, implementation, dtype)
    if noise:
        model = adapted(model)
    else:
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH)
        model = peft.get_peft_model(model, config)
    patch_peft(model)
    assert untrained_adapters(model) == each(STACKS, list(range(E)))
    seen = []
    for token in range(40):
        model.zero_grad()
        model(torch.tensor([[token]])).logits.float().sum().backward()
        missing = [expert for expert in range(E) if expert not in chosen]
        seen.append(missing)
        assert untrained_adapters(model) == (each(STACKS, missing) if missing else {})
    assert len(seen[0]) == 2, seen
    assert seen[-1] == [], seen


def never(model: nn.Module, dead: int) -> None:
    """Keep the router from an expert, as one that has collapsed does."""

    def elsewhere(_, args, output):
        return tuple(
            t if t.is_floating_point() else t.masked_fill(t == dead, (dead + 1) % E) for t in output
        )

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(elsewhere)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("patched", [True, False])
def test_an_expert_that_the_router_never_selects(family, patched, chosen):
    model = adapted(causal(family, "eager", FP32, num_hidden_layers=1))
    never(model, 2)
    patch_peft(model)
    if not patched:  # PEFT's own forward
        layer = model.base_model.model.model.layers[0].mlp.experts
        layer.get_base_layer().register_forward_hook(lambda *args: None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(tokens(4, 20)).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool(chosen) is patched
    assert untrained_adapters(model) == each(STACKS, [2])
    report = patch_peft(model)
    assert report.experts == dict.fromkeys(STACKS, "1 of 4 experts got no gradient yet (2)")
    assert f"{STACKS[0]}: 1 of 4 experts got no gradient yet (2)" in report.summary
    assert f"  {STACKS[1]}: 1 of 4 experts got no gradient yet (2)" in str(report)
    assert "1 of 4 experts got no gradient yet (2)</td>" in report._repr_html_()


def test_reports_say_nothing_before_a_gradient():
    model = adapted(causal("Mixtral", "eager", FP32))
    assert patch_peft(model).experts == {}
    assert patch_peft(model).experts == {}
    model(tokens(4, 40)).logits.sum().backward()
    assert patch_peft(model).experts == {}


@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_checkpoints_and_accumulation(kind, reentrant):
    """``routed`` leaves the last expert out; the second call reaches the last two alone."""
    model = holder(kind, dtype=FP32)
    patch_peft(model)

    def step(index):
        x, _, shares = routed(FP32)
        if reentrant is None:
            y = model(x, index, shares)
        else:
            y = checkpoint(model, x, index, shares, use_reentrant=reentrant)
        y.square().sum().backward()

    step(torch.tensor([[0, 1]]).expand(13, 2))
    assert untrained_adapters(model) == each(HELD, [2, 3])
    step(torch.tensor([[0, 2]]).expand(13, 2))  # accumulates
    assert untrained_adapters(model) == each(HELD, [3])
    model.zero_grad()
    assert untrained_adapters(model) == each(HELD, [3])
    with torch.no_grad():
        model(*routed(FP32)[:1], torch.full((13, 2), 3), routed(FP32)[2])
    assert untrained_adapters(model) == each(HELD, [3])
    step(torch.tensor([[3, 2]]).expand(13, 2))
    assert untrained_adapters(model) == {}


def test_double_backward_and_nan_count():
    model = holder(dtype=FP64)
    patch_peft(model)
    x, index, shares = routed()
    (dx,) = torch.autograd.grad(model(x, index, shares).sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert untrained_adapters(model) == each(HELD, [3])
    model = holder(dtype=FP64)
    patch_peft(model)
    (model(x, index, shares) * float("nan")).sum().backward()
    assert untrained_adapters(model) == each(HELD, [3])


def test_only_lora_a_trains():
    model = holder(dtype=FP64)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)
    patch_peft(model)
    model(*routed()).sum().backward()
    assert untrained_adapters(model) == each(HELD, [3])


def test_the_hook_ends_when_every_expert_has_a_gradient():
    model = holder(dtype=FP32)
    patch_peft(model)
    layer = model.base_model.model.experts.lora_B.default.weight
    x, _, shares = routed(FP32)
    index = torch.arange(26).view(13, 2) % E
    assert len(layer._post_accumulate_grad_hooks) == 1
    patch_peft(model)
    assert len(layer._post_accumulate_grad_hooks) == 1
    model(x, index, shares).sum().backward()
    assert len(layer._post_accumulate_grad_hooks) == 0


def test_backward_keeps_one_bool_per_expert():
    from fused_lora.models.untrained import _watches

    model = holder(dtype=FP32)
    patch_peft(model)
    model(*routed(FP32)).sum().backward()
    weight = model.base_model.model.experts.lora_B.default.weight
    seen = _watches[weight].seen
    assert (seen.dtype, tuple(seen.shape), seen.untyped_storage().nbytes()) == (torch.bool, (E,), E)


class Mixture(nn.Module):
    """Experts that are linears; the last one gets no row."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts[0](x[:2]) + self.experts[1](x[2:]))


def test_layers_of_ones_own_model():
    model = Mixture()
    names = apply_lora(model)
    assert untrained_adapters(model) == each(names, [])
    with torch.no_grad():
        model(torch.randn(4, 6))
    assert untrained_adapters(model) == each(names, [])  # a forward is no training
    model(torch.randn(4, 6)).sum().backward()
    model.zero_grad()
    assert untrained_adapters(model) == {"experts.2": []}


def test_every_kind_of_layer():
    model = Tiny()
    apply_lora(model, target_modules=ALL)
    assert sorted(untrained_adapters(model)) == sorted(ALL)
    model(tokens(2, 7, vocabulary=20)).sum().backward()
    assert untrained_adapters(model) == {}
    add_adapter(model, "other")
    set_adapter(model, "other")
    assert untrained_adapters(model) == {}  # the same Parameters


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_models():
    model = Mixture()
    apply_lora(model)
    torch.compile(model, backend="aot_eager")(torch.randn(4, 6)).sum().backward()
    assert untrained_adapters(model) == {"experts.2": []}


def test_layers_of_peft():
    """Also of an adapter that was inactive, and so frozen, when the model was patched."""
    config = peft.LoraConfig(r=2, target_modules=["0", "1", "2", "out"])
    model = peft.get_peft_model(Mixture(), config)
    model.add_adapter("other", config)
    patch_peft(model)
    model(torch.randn(4, 6)).sum().backward()
    assert untrained_adapters(model) == {"base_model.model.experts.2": []}
    model.set_adapter("other")
    assert len(untrained_adapters(model)) == 4
    model(torch.randn(4, 6)).sum().backward()
    assert untrained_adapters(model) == {"base_model.model.experts.2": []}


def test_models_that_peft_adapts_after_patch_peft():
    patch_peft()
    model = holder(dtype=FP32)
    model(*routed(FP32)).sum().backward()
    found, texts = caught(untrained_adapters, model)
    assert (found, texts) == (each(HELD, [3]), [])


def test_adapters_that_were_not_watched():
    """Of a copy, what is known now; the rest from now on."""
    model = Mixture()
    apply_lora(model)
    model(torch.randn(4, 6)).sum().backward()
    twin = copy.deepcopy(model)
    twin.out.lora_A.grad = twin.out.lora_B.grad = None
    found, (text,) = caught(untrained_adapters, twin)
    assert found == {}
    assert "experts.0, experts.1, experts.2, out are noted only from now on" in text
    found, texts = caught(untrained_adapters, twin)
    assert (sorted(found), texts) == (["experts.0", "experts.1", "experts.2", "out"], [])
    twin(torch.randn(4, 6)).sum().backward()
    assert untrained_adapters(twin) == {"experts.2": []}


def test_a_gradient_that_was_not_watched_counts():
    model = holder(dtype=FP32)
    model(*routed(FP32)).sum().backward()
    found, (text,) = caught(untrained_adapters, model)
    assert found == each(HELD, [3])
    assert "a model of PEFT before patch_peft(model)" in text
    assert caught(untrained_adapters, model) == (each(HELD, [3]), [])


def test_pickles_hold_nothing_of_it():
    model = holder(dtype=FP32)
    patch_peft(model)
    model(*routed(FP32)).sum().backward()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    torch.save(model.base_model.model.experts.lora_B, file)
    assert b"untrained" not in file.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_experts_of_this_librarys_models(family, dropout):
    """One token reaches two of four experts, which the router's weights show."""
    model = causal(family, "eager", FP32)
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    apply_lora(model, rank=2, dropout=dropout, target_modules=["o_proj"], target_parameters=BOTH)
    assert untrained_adapters(model) == {
        "model.layers.0.self_attn.o_proj": [], **each(names, list(range(E)))
    }  # fmt: skip
    chosen = set()
    layer = model.model.layers[0].mlp.experts
    layer.register_forward_pre_hook(lambda _, args: chosen.update(args[1].flatten().tolist()))
    model(torch.tensor([[5]])).logits.sum().backward()
    missing = [expert for expert in range(E) if expert not in chosen]
    assert len(missing) == 2
    assert untrained_adapters(model) == each(names, missing)
    note = f"2 of 4 experts got no gradient yet ({missing[0]}, {missing[1]})"
    assert fuse_projections(model).experts == dict.fromkeys(names, note)
    assert note in str(fuse_projections(model))


def test_what_is_refused():
    with pytest.raises(TypeError, match="expected a model"):
        untrained_adapters(3)
    model = Mixture()
    with pytest.raises(ValueError, match="expected a model with adapters, got a Mixture"):
        untrained_adapters(model)
    apply_lora(model)
    unload_lora(model)
    with pytest.raises(ValueError, match="expected a model with adapters"):
        untrained_adapters(model)
