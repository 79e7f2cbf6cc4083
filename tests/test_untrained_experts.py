"""Experts without an adapter are named when adapters are attached, and nothing else is."""

from __future__ import annotations

import json
import re

import pytest
import torch
from models import gpt2, llama, tokens
from torch import Tensor, nn

from fused_lora import apply_lora, fuse_projections, load_adapter, patch_peft, save_adapter
from fused_lora.models.expert_stacks import stacks_of, unadapted_experts
from support import caught, warned

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")
from expert_nets import FP32, causal  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

KINDS = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "GptOss"]
CONVERTED = ["Mixtral", "Qwen3Moe", "DeepseekV3"]  # of which PEFT's "all-linear" has the experts
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HABIT = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def model_of(family: str, **changes) -> nn.Module:
    return causal(family, "grouped_mm", FP32, **changes)


def given(model: nn.Module, targets="all-linear", **options) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


def named(*arguments, **keywords) -> list[str]:
    """The warnings of experts during a call."""
    return [t for t in warned(*arguments, **keywords) if "no adapter for the experts" in t]


def cure(text: str) -> dict:
    """The arguments that a warning names."""
    (written,) = re.findall(r"\(\.\.\., (.*?)\) adapts them", text)
    return eval(f"dict({written})")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("targets", [r".*\.(q|k|v|o)_proj|.*_a_proj.*", HABIT], ids=str)
def test_apply_lora_names_the_experts(family, targets):
    model = model_of(family)
    expected = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    share = 100 * expected / sum(p.numel() for p in model.parameters())
    texts = named(apply_lora, model, target_modules=targets)
    assert len(texts) == 1
    assert "model.layers.0.mlp.experts.gate_up_proj" in texts[0]
    assert "model.layers.0.mlp.experts.down_proj" in texts[0]
    assert f"{share:.0f} % of" in texts[0]
    assert "apply_lora(..., target_parameters=" in texts[0]
    # PEFT adapts all of them, and nothing else, by the names in the warning.
    fresh = model_of(family)
    options = {"target_modules": [], **cure(texts[0])}
    adapted = peft.get_peft_model(fresh, peft.LoraConfig(r=2, **options))
    assert unadapted_experts(adapted) is None
    assert len(adapted.base_model.targeted_parameter_names) == 2
    model = model_of(family)
    apply_lora(model, target_modules=["o_proj"], **cure(texts[0]))
    assert unadapted_experts(model) is None


@pytest.mark.parametrize("family", KINDS)
def test_this_librarys_all_linear_has_the_experts(family):
    model = model_of(family)
    assert named(apply_lora, model) == []
    assert unadapted_experts(model) is None
    assert named(apply_lora, model_of(family), target_parameters=[]) == []  # a choice


@pytest.mark.parametrize("family", KINDS)
def test_a_list_of_attention_is_a_choice(family):
    names = [n for n, m in model_of(family).named_modules() if isinstance(m, nn.Linear)]
    attention = {n.rpartition(".")[2] for n in names if "attn" in n}
    model = model_of(family)
    assert warned(apply_lora, model, target_modules=attention) == []
    (note,) = fuse_projections(model).experts.values()
    assert note.startswith("no adapter; target_parameters=")
    assert note in fuse_projections(model).summary
    assert note in str(fuse_projections(model))


@pytest.mark.parametrize("family", KINDS)
def test_patch_peft_names_what_all_linear_left_out(family):
    model = given(model_of(family))
    report, texts = caught(patch_peft, model)
    if family in CONVERTED:
        assert (texts, report.experts) == ([], {})
        return
    (text,) = texts
    assert "LoraConfig(..., target_parameters=" in text
    options = {"target_modules": ATTENTION, **cure(text)}
    assert (
        unadapted_experts(peft.get_peft_model(model_of(family), peft.LoraConfig(**options))) is None
    )
    ((names, note),) = report.experts.items()
    assert names.startswith("base_model.model.model.layers.0.mlp.experts.gate_up_proj, ")
    assert f"{names}: {note}" in report.summary
    assert f"  {names}: {note}" in str(report)
    assert warned(patch_peft, model) == []  # once per model


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], 0),
        (r".*\.(q|v)_proj", 1),
        (HABIT, 1),
        ("all-linear", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("early", [True, False])
def test_what_peft_users_asked_for(targets, expected, early):
    model = model_of("GptOss")
    if early:
        patch_peft()
        texts = warned(given, model, targets)
    else:
        texts = warned(patch_peft, given(model, targets))
    assert len(texts) == expected, texts


def test_patched_before_a_full_list_is_a_choice():
    """Afterwards it looks like "all-linear", which PEFT has replaced by such a list."""
    assert len(warned(patch_peft, given(model_of("GptOss"), ATTENTION))) == 1
    patch_peft()
    assert warned(given, model_of("GptOss"), ATTENTION) == []


def test_a_router_is_none_of_the_mixtures_parts():
    model = given(model_of("GptOss"), ["q_proj"], target_parameters=["router.weight"])
    report, texts = caught(patch_peft, model)
    assert texts == []
    assert len(report.layers) == 2


def test_a_second_adapter_warns_no_more():
    patch_peft()
    model, texts = caught(given, model_of("GptOss"))
    assert len(texts) == 1
    config = peft.LoraConfig(target_modules="all-linear")
    assert warned(model.add_adapter, "other", config) == []


def test_some_experts_by_name_are_a_choice():
    model = given(model_of("GptOss"), target_parameters=["experts.down_proj"])
    report, texts = caught(patch_peft, model)
    assert texts == []
    (note,) = report.experts.values()
    assert "target_parameters=['experts.gate_up_proj']" in note


@pytest.mark.parametrize("exclude", [["experts"], r".*experts", ["experts.gate_up_proj"]], ids=str)
def test_exclude_modules_silences(exclude):
    whole = "gate_up" not in str(exclude)
    pattern = r".*\.(q|v)_proj"
    texts = named(apply_lora, model_of("GptOss"), target_modules=pattern, exclude_modules=exclude)
    assert len(texts) == (0 if whole else 1)
    if whole:
        assert warned(patch_peft, given(model_of("GptOss"), exclude_modules=exclude)) == []


def test_experts_that_train_whole_are_not_named():
    assert named(apply_lora, model_of("Qwen2Moe"), modules_to_save=["experts"]) == []
    model = given(model_of("GptOss"), modules_to_save=["experts"])
    assert warned(patch_peft, model) == []


def test_models_that_do_not_train_are_not_named():
    model = given(model_of("GptOss"), inference_mode=True)
    assert warned(patch_peft, model) == []


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("GptOss", "all-linear", 0),
        ("Qwen2Moe", r".*_proj", 1),
        ("Qwen2Moe", ["q_proj", "v_proj"], 0),
        ("Qwen2Moe", ["q_proj", "shared_expert.up_proj"], 1),  # reaches into the mixture
    ],
)
def test_load_adapter(family, targets, expected, tmp_path):
    model = model_of(family)
    assert len(named(apply_lora, model, target_modules=targets)) == expected
    save_adapter(model, tmp_path)
    assert len(named(load_adapter, model_of(family), tmp_path)) == expected


def test_load_adapter_knows_all_linear_by_its_layers(tmp_path):
    """PEFT's file of "all-linear" names every linear layer."""
    given(model_of("GptOss")).save_pretrained(tmp_path)
    (text,) = named(load_adapter, model_of("GptOss"), tmp_path)
    assert "apply_lora(..., target_parameters=" in text


def test_all_linear_beside_a_head_that_trains_whole():
    model = given(model_of("GptOss"), modules_to_save=["lm_head"])
    assert len(warned(patch_peft, model)) == 1


@pytest.mark.parametrize(("targets", "expected"), [(["q_proj"], 0), (["q_proj", "up_proj"], 1)])
def test_experts_beside_attention(targets, expected):
    """In Gemma 4 a decoder layer holds the experts, attention and a dense MLP."""
    parts = {"self_attn": {"q_proj": nn.Linear(6, 6)}, "mlp": {"up_proj": nn.Linear(6, 6)}}
    layer = nn.ModuleDict({name: nn.ModuleDict(part) for name, part in parts.items()})
    layer["experts"] = TinyExperts((4, 8, 6))
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    assert len(warned(apply_lora, model, target_modules=targets)) == expected


@pytest.mark.parametrize(
    "damage", [{"exclude_modules": "("}, {"exclude_modules": [3, ""]}], ids=str
)
def test_load_adapter_reads_no_more_than_names(damage, tmp_path):
    model = model_of("GptOss")
    apply_lora(model, target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert warned(load_adapter, model_of("GptOss"), tmp_path) == []


class Stacks(nn.Module):
    """Parameters of a module of one's own."""

    def __init__(self, *shapes: tuple, **attributes):
        super().__init__()
        vars(self).update(attributes)
        for index, shape in enumerate(shapes):
            self.register_parameter(f"w{index}", nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x


class TinyExperts(Stacks):
    pass


class SparseMoE(Stacks):
    pass


class MoeVisionEmbedder(Stacks):
    """Parts of a mixture's model have its name too."""


FOUND = {
    "attribute": Stacks((4, 8, 6), n_routed_experts=4),
    "class": TinyExperts((4, 8, 6), (4, 1, 6), (4, 6)),
    "block": SparseMoE((4, 8, 6)),
    "place": nn.ModuleDict({"experts": Stacks((4, 8, 6))}),
    "meta": TinyExperts((4, 8, 6)).to("meta"),
    "half": TinyExperts((4, 8, 6)).bfloat16(),
}


@pytest.mark.parametrize("part", FOUND)
def test_modules_of_ones_own(part):
    model = nn.ModuleDict({"linear": nn.Linear(6, 6), "part": FOUND[part]})
    (text,) = warned(apply_lora, model)
    assert re.search(r"the experts part\.(experts\.)?w0, ", text)
    (target,) = cure(text)["target_parameters"]
    assert target in ("part.w0", "experts.w0")


def test_names_are_as_long_as_they_must_be():
    """No ending selects another Parameter, nor begins with an index."""
    layers = [
        nn.ModuleDict({"proj": TinyExperts((4, 8, 6))}),
        nn.ModuleDict({"proj": nn.ModuleList([Stacks((4, 8, 6), num_experts=4)])}),
        nn.ModuleDict({"plain": nn.ModuleDict({"proj": Stacks((8, 6))})}),
    ]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "linear": nn.Linear(6, 6)})
    (text,) = warned(apply_lora, model)
    assert cure(text)["target_parameters"] == ["layers.0.proj.w0", "proj.0.w0"]


def with_weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3), dim=2)


def xlnet() -> nn.Module:
    config = transformers.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=16, vocab_size=50)
    return transformers.XLNetModel(config)


def convbert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 32, "num_groups": 2, "embedding_size": 32, "vocab_size": 50}
    return transformers.ConvBertModel(transformers.ConvBertConfig(**sizes))


ORDINARY = {
    "gpt2": gpt2,
    "llama": llama,
    "xlnet": xlnet,  # queries per head: (in, heads, size)
    "convbert": convbert,  # a grouped linear: (groups, in, out)
    "conv1d": lambda: nn.Conv1d(4, 8, 3),
    "transposed": lambda: nn.ConvTranspose1d(4, 8, 3),
    "weight norm": with_weight_norm,
    "bilinear": lambda: nn.Bilinear(4, 5, 6),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
    "recurrent": lambda: nn.LSTM(8, 8),
    "positions": lambda: Stacks((1, 9, 6), (4, 9, 6), (9, 1, 6)),
    "a batch of experts' biases": lambda: TinyExperts((4, 1, 6), (1, 4, 6), (4, 6)),
    "another part of a mixture": lambda: MoeVisionEmbedder((4, 8, 6)),
    "another number": lambda: Stacks((4, 8, 6), num_experts=8),
    "a convolution of an expert": lambda: nn.ModuleDict({"experts": nn.Conv1d(4, 8, 3)}),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_models_get_no_warning(kind):
    model = nn.ModuleDict({"part": ORDINARY[kind](), "own": nn.Linear(6, 6)})
    assert [n for n, m in model.named_modules() if stacks_of(n, m)] == []
    texts = warned(apply_lora, model, exclude_modules="part.*self_attn.out_proj|part.out_proj")
    assert [t for t in texts if "no adapter for the experts" in t] == []


@pytest.mark.parametrize("make", [gpt2, llama])
def test_ordinary_models_of_peft_get_no_warning(make):
    report, texts = caught(patch_peft, given(make()))
    assert (texts, report.experts) == ([], {})
    assert "expert" not in str(report)


def test_integers_and_scales_are_no_experts():
    module = TinyExperts((4, 8, 6))
    module.w0_scale_inv = nn.Parameter(torch.randn(4, 2, 2))
    module.packed = nn.Parameter(torch.zeros(4, 8, 6, dtype=torch.uint8), requires_grad=False)
    assert stacks_of("part", module) == ["w0"]


def test_the_warning_is_true():
    """Nothing of what it names trains."""
    model = model_of("GptOss")
    apply_lora(model, target_modules=ATTENTION)
    model(tokens(2, 5)).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters() if p.dim() == 3)
