"""Heads in files: ``modules_to_save`` both ways with PEFT, and heads that no file holds.

Reports: peft#876, peft#1070 and transformers#26160 (a classifier reloaded with a random head),
peft#2027 and its fix peft#2033 ("all-linear" took the head), peft#1147 (embeddings of new tokens),
peft#2422 (adapters with other modules to save), peft#2803 (tied embeddings).
"""

import copy
import json
import warnings

import pytest
import torch
from models import assert_unchanged, snapshot
from safetensors.torch import load_file, save_file
from test_reports_heads import X, disturb, trained
from torch import nn

from fused_lora import (
    adapter_names,
    apply_lora,
    disable_lora,
    load_adapter,
    lora_layers,
    save_adapter,
    set_adapter,
    unload_lora,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.head.1.running_mean"


def tiny(name: str, **changes) -> nn.Module:
    """A transformers model of a class, of the smallest size."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 30}
    heads = {"num_attention_heads": 2, "pad_token_id": 0}
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    bart |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    bart |= {"max_position_embeddings": 32, "vocab_size": 30}
    own = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 30, "pad_token_id": 0}
    kinds = {"GPT2": own, "Bart": bart, "T5": t5}
    given = next((v for k, v in kinds.items() if name.startswith(k)), sizes | heads)
    return cls(cls.config_class(**(given | changes))).eval()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied and saved embeddings
        yield


MODELS = {
    "llama": ("LlamaForSequenceClassification", ["score"], {}),
    "gpt2": ("GPT2ForSequenceClassification", ["score"], {}),
    "bert": ("BertForTokenClassification", ["classifier"], {}),
    "roberta": ("RobertaForSequenceClassification", ["classifier"], {}),  # a head of two layers
    "bart": ("BartForSequenceClassification", ["classification_head"], {}),
    "qa": ("BertForQuestionAnswering", ["qa_outputs"], {}),
    "embeddings": ("LlamaForCausalLM", ["embed_tokens", "lm_head"], {}),
    "norms": ("LlamaForCausalLM", ["norm"], {}),  # all: "input_layernorm" ends so too
    "tied": ("LlamaForCausalLM", ["embed_tokens"], {"tie_word_embeddings": True}),
}


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 16).view(2, 7)
    if "Bart" in type(model).__name__:
        ids[:, -1] = 2  # the one end of each sequence
        ids[:, :-1] = torch.arange(3, 15).view(2, 6)
    found = model(input_ids=ids)
    return found.start_logits if hasattr(found, "start_logits") else found.logits


@pytest.mark.parametrize("case", MODELS)
def test_saved_here_and_loaded_in_peft_and_back(case, tmp_path, quiet):
    peft = pytest.importorskip("peft")
    name, modules, changes = MODELS[case]
    base = tiny(name, **changes)
    model = copy.deepcopy(base)
    apply_lora(model, rank=2, modules_to_save=modules)
    expected = outputs(disturb(model))
    assert (expected - outputs(base)).abs().max() > 0.1
    save_adapter(model, tmp_path)
    assert set(modules) <= set(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs.base_model.model), expected)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert torch.equal(outputs(loaded), expected)
    with disable_lora(loaded):
        assert torch.equal(outputs(loaded), outputs(base))
    torch.testing.assert_close(outputs(unload_lora(loaded)), expected, rtol=1e-4, atol=1e-4)


TASKS = {"score": "SEQ_CLS", "classifier": "TOKEN_CLS", "qa_outputs": "QUESTION_ANS"}


@pytest.mark.parametrize("case", MODELS)
def test_saved_in_peft_and_loaded_here(case, tmp_path, quiet):
    """With a ``task_type`` PEFT lists heads that the model may not have."""
    peft = pytest.importorskip("peft")
    name, modules, changes = MODELS[case]
    base = tiny(name, **changes)
    task = TASKS.get(modules[0]) if "Token" in name or modules[0] != "classifier" else None
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*\.(layers?|h)\..*(q_proj|query|c_attn)",
        task_type=task,
        modules_to_save=None if task else modules,
    )
    theirs = disturb(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    expected = outputs(theirs.base_model.model)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), expected)
    assert model.training is False
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trains
    assert all(any(f"{m}." in n for m in modules) for n in trains)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_both_ways(modules, tmp_path, quiet):
    """peft#2803: one copy trains in both places."""
    peft = pytest.importorskip("peft", minversion="0.18")
    base = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    model = copy.deepcopy(base)
    apply_lora(model, target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=True)
    expected = outputs(disturb(model))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(outputs(theirs.base_model.model), expected)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=modules[:], ensure_weight_tying=True
    )
    theirs = disturb(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder, values in (("ours", expected), ("theirs", outputs(theirs.base_model.model))):
        loaded = copy.deepcopy(base)
        load_adapter(loaded, tmp_path / folder)
        torch.testing.assert_close(outputs(loaded), values)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "tokens"])
    apart = disturb(peft.get_peft_model(copy.deepcopy(base), config))
    apart.save_pretrained(tmp_path / "apart")
    with pytest.raises(ValueError, match=r"expected equal values for .*, which the model has tied"):
        load_adapter(model, tmp_path / "apart")


def test_embeddings_of_new_tokens(tmp_path, quiet):
    """peft#1147: asked to save embeddings, PEFT also writes its wrapper's own copies."""
    peft = pytest.importorskip("peft")
    base = tiny("LlamaForCausalLM")
    base.resize_token_embeddings(34)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    theirs = disturb(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("original_module" in key for key in load_file(tmp_path / WEIGHTS))
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs.base_model.model))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight[-1] += 1
    with pytest.warns(UserWarning, match="originals of lm_head, with another weight than"):
        load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs.base_model.model))


def test_a_tie_restored_since_is_not_saved_in_silence(tmp_path, quiet):
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    apply_lora(model, modules_to_save=["embed_tokens"])
    model.tie_weights()
    with pytest.raises(ValueError, match=r"of their own .*embed_tokens.*got lm_head tied to them"):
        save_adapter(model, tmp_path)


def test_several_adapters_with_their_heads(tmp_path):
    """peft#2422; each file loads under any name, into a plain and an adapted model."""
    base, model = trained()
    expected = {"a": model(X)}
    save_adapter(model, tmp_path / "a")
    expected["b"] = disturb(model)(X)
    save_adapter(model, tmp_path / "b")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / "a", "a")
    weight = loaded.head[0].weight
    load_adapter(loaded, tmp_path / "b", "b")
    for name in ("b", "a"):
        set_adapter(loaded, name)
        torch.testing.assert_close(loaded(X), expected[name])
        save_adapter(loaded, tmp_path / "again", "a" if name == "b" else "b")
        first, again = (load_file(tmp_path / f / WEIGHTS) for f in ("ab".strip(name), "again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
    load_adapter(loaded, tmp_path / "b", "a")  # over the active adapter, in place
    torch.testing.assert_close(loaded(X), expected["b"])
    assert loaded.head[0].weight is weight
    assert adapter_names(loaded) == ["a", "b"]


def edit(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FAULTS = {
    "missing": (
        lambda t: t.pop(KEY),
        "expected .*head.1.running_mean, since .*none",
    ),
    "extra": (
        lambda t: t.update({KEY + "x": torch.ones(5)}),
        "expected no .*running_meanx: the",
    ),
    "shape": (
        lambda t: t.update({KEY: torch.ones(4)}),
        r"of shape \(5,\), as in the.*got .4",
    ),
    "kind": (
        lambda t: t.update({KEY.replace("running_mean", "num_batches_tracked"): torch.tensor(1.5)}),
        "num_batches_tracked of dtype torch.int64, got torch.float32",
    ),
    "integers": (lambda t: t.update({KEY: torch.ones(5).int()}), "running_mean in a float dtype"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("adapted", [False, True])
def test_damaged_files_leave_the_model_unchanged(fault, adapted, tmp_path):
    base, model = trained()
    save_adapter(model, tmp_path)
    change, message = FAULTS[fault]
    edit(tmp_path, change)
    target = model if adapted else base
    before = snapshot(target)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(target, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_unchanged(target, before)


def test_other_modules_than_the_models_are_refused(tmp_path):
    base, model = trained()
    _, plain = trained(modules_to_save=None)
    save_adapter(model, tmp_path / "head")
    save_adapter(plain, tmp_path / "plain")
    for target, folder, message in (
        (plain, "head", r"whole in the model, none, got \['head'\], which selects head"),
        (model, "plain", "whole in the model, head, got None, which selects none"),
    ):
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            load_adapter(target, tmp_path / folder, "b")
        assert_unchanged(target, before)
    config = json.loads((tmp_path / "head" / CONFIG).read_text())
    (tmp_path / "head" / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["head.0"]}))
    with pytest.raises(ValueError, match=r"expected the adapter_config\.json it was saved with"):
        load_adapter(base, tmp_path / "head")


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.body, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(self.body(x)))


def test_a_module_of_two_names(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = Shared(), torch.randn(3, 4)
    model = copy.deepcopy(base)
    apply_lora(model, target_modules=["body"], modules_to_save=["first"])
    expected = disturb(model)(x)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), expected)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["first"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="names first, second; .* in PEFT not under second"):
        load_adapter(copy.deepcopy(base), tmp_path)


HEADS = {  # class: the heads outside the pretrained base
    "LlamaForSequenceClassification": ["score"],
    "BertForSequenceClassification": ["classifier"],
    "BertForTokenClassification": ["classifier"],
    "BertForQuestionAnswering": ["qa_outputs"],
    "BertForMultipleChoice": ["classifier"],
    "RobertaForSequenceClassification": ["classifier.dense", "classifier.out_proj"],
    "BartForSequenceClassification": ["classification_head.dense", "classification_head.out_proj"],
    "DistilBertForSequenceClassification": ["pre_classifier", "classifier"],
    "ViTForImageClassification": ["classifier"],
    "T5ForQuestionAnswering": ["qa_outputs"],  # its base has no name
    "GPT2DoubleHeadsModel": ["multiple_choice_head.summary"],
}
PRETRAINED = {  # class: layers that a checkpoint has
    "BertForMaskedLM": ["cls.predictions.transform.dense"],
    "BertForPreTraining": ["cls.predictions.transform.dense", "cls.seq_relationship"],
    "RobertaForMaskedLM": ["lm_head.dense"],
    "CLIPTextModelWithProjection": ["text_projection"],
    "ElectraForPreTraining": ["discriminator_predictions.dense"],
}


@pytest.mark.parametrize("name", HEADS)
def test_fresh_heads_are_left_out(name):
    """peft#2033, where only the first of "score" and "classifier" and one task are known."""
    model = tiny(name)
    with pytest.warns(
        UserWarning, match="initialised them afresh, unless.*modules_to_save="
    ) as caught:
        found = apply_lora(model)
    assert len(caught) == 1
    assert __file__ == caught[0].filename
    for place in HEADS[name]:
        assert place not in found
        assert type(model.get_submodule(place)) is nn.Linear
    named = sorted({place.split(".")[0] for place in HEADS[name]})
    assert all(head in str(caught[0].message) for head in named)
    assert len(found) == len(list(lora_layers(model))) > 3
    again = tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply_lora(again, modules_to_save=named) == found


class Wrapped(nn.Module):
    """A head of one's own on a pretrained model."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny("BertModel")
        self.head = nn.Linear(16, 2)


@pytest.mark.parametrize("name", PRETRAINED)
def test_heads_of_the_pretraining_stay_targets(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = apply_lora(tiny(name))
    assert set(PRETRAINED[name]) <= set(found)


def test_layers_beside_a_pretrained_model_stay_targets():
    """Raschka's LoRA tutorial adapts every linear layer of a classifier, the new head too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "head" in apply_lora(Wrapped())


def test_a_fresh_head_can_be_named():
    model = tiny("LlamaForSequenceClassification")
    with pytest.warns(UserWarning, match="an adapter on score, whose own weights its file lacks"):
        assert "score" in apply_lora(model, target_modules=["q_proj", "score"])
    with pytest.warns(UserWarning, match="no adapter for score, frozen"):
        apply_lora(tiny("LlamaForSequenceClassification"), target_modules=["q_proj"])


def test_more_than_one_tied_embedding_is_told(tmp_path, quiet):
    """peft#2803: T5 and BART tie the encoder's and the decoder's embedding to the head."""
    peft = pytest.importorskip("peft")
    base = tiny("T5ForConditionalGeneration", decoder_start_token_id=0)
    model, ids = copy.deepcopy(base), torch.arange(8).view(2, 4)
    names = {"target_modules": ["q"], "modules_to_save": ["shared"]}
    apply_lora(model, **names, ensure_weight_tying=True)
    disturb(model)
    with pytest.warns(UserWarning, match="PEFT up to 0.21 cannot load ensure_weight_tying"):
        save_adapter(model, tmp_path)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["ensure_weight_tying"]  # the cure
    (tmp_path / CONFIG).write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [("GPT2LMHeadModel", "c_attn", "wte"), ("BertForMaskedLM", "query", "word_embeddings")],
)
def test_tying_that_peft_ignores_is_ignored(kind, target, name, tmp_path, quiet):
    """PEFT's EMBEDDING_LAYER_NAMES: under other names it ties nothing, and says so."""
    peft = pytest.importorskip("peft")
    base, ids = tiny(kind), torch.arange(8).view(2, 4)
    options = {"target_modules": [target], "modules_to_save": [name], "ensure_weight_tying": True}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits)


def test_a_head_with_nan_loads(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model = copy.deepcopy(base)
    apply_lora(model, target_modules=["0"], modules_to_save=["1"])
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base[1].weight, model[1].weight, equal_nan=True)


class Counting(nn.Linear):
    def get_extra_state(self):
        return torch.tensor(7)


def test_extra_state_is_refused():
    """No adapter's file holds ``get_extra_state``; PEFT's holds it, and only PEFT reads that."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Counting(8, 3)))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"without extra state, .* got 1\.0, a Counting"):
        apply_lora(model, target_modules=["0"], modules_to_save=["1"])
    assert_unchanged(model, before)
