"""Reports of users about adapter files: what PEFT and this library read of each other's.

Every test names its source. Right is what PEFT, or the model before saving, computes.
"""

import copy
import json
import sys

import peft
import pytest
import torch
from models import llama, tokens, train_like
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import apply_lora, load_adapter, lora_layers, save_adapter
from fused_lora.peft.base_model import describe
from support import by_default, warned

transformers = pytest.importorskip("transformers")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
BERT |= {"intermediate_size": 48}
T5 = {"vocab_size": 100, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8}
VIT |= {"patch_size": 4, "intermediate_size": 48}
HEADS = r".*(score|classifier|qa_outputs)"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No look-ups on the Hub, which PEFT makes for local directories too."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def edit_config(folder, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bert(kind="BertModel", **changes) -> nn.Module:
    return getattr(transformers, kind)(transformers.BertConfig(**BERT | changes)).eval()


def t5(kind="T5ForConditionalGeneration") -> nn.Module:
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    return getattr(transformers, kind)(config).eval()


def vit(kind="ViTModel") -> nn.Module:
    return getattr(transformers, kind)(transformers.ViTConfig(**VIT)).eval()


AUTO = {
    "causal": (llama, "AutoPeftModelForCausalLM", "CAUSAL_LM"),
    "sequence to sequence": (t5, "AutoPeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "features": (bert, "AutoPeftModelForFeatureExtraction", "FEATURE_EXTRACTION"),
    # PEFT expects the trained head of these tasks in the file: without it they have no task.
    "sequence": (lambda: bert("BertForSequenceClassification"), "AutoPeftModel", None),
    "tokens": (lambda: bert("BertForTokenClassification"), "AutoPeftModel", None),
    "question": (lambda: bert("BertForQuestionAnswering"), "AutoPeftModel", None),
    # PEFT has no such tasks, and passes a text's arguments to a model of the task for features.
    "masked": (lambda: bert("BertForMaskedLM"), "AutoPeftModel", None),
    "images": (vit, "AutoPeftModel", None),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", by_default(["causal", "features", "sequence", "images"], AUTO))
def test_peft_builds_the_base_model_from_the_file(case, tmp_path):
    """peft#694 introduces AutoPeftModelFor*, peft#707 ``auto_mapping``."""
    make, auto, task = AUTO[case]
    make().save_pretrained(tmp_path / "base")
    model = make()
    model = type(model).from_pretrained(tmp_path / "base").eval()
    apply_lora(model, rank=4, exclude_modules=None if task else HEADS)
    train_like(model)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["task_type"] == task
    assert (config["auto_mapping"] is None) == (task is not None)
    inputs = (
        {"input_ids": tokens()} if case != "images" else {"pixel_values": torch.randn(1, 3, 8, 8)}
    )
    if case == "sequence to sequence":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    built = getattr(peft, auto).from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(built(**inputs)[0], model(**inputs)[0], rtol=1e-6, atol=1e-6)


def test_the_description_is_pefts_own(tmp_path):
    """peft#707: ``auto_mapping`` names the class; here PEFT saves the same models."""
    for base, task in ((llama(), "CAUSAL_LM"), (bert("BertForMaskedLM"), None), (vit(), None)):
        targets = ["q_proj", "query", "q_proj"]
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(task_type=task, target_modules=targets)
        )
        theirs.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / CONFIG).read_text())
        ours = describe(base, dict(base.named_modules()))
        assert ours == {key: saved[key] for key in ours}


def test_a_classifier_has_its_task_once_the_file_holds_the_head():
    """peft/peft_model.py: the task SEQ_CLS adds "classifier" and "score" to modules_to_save."""
    model = bert("BertForSequenceClassification")
    names = dict(model.named_modules())
    assert describe(model, names)["task_type"] is None
    assert describe(model, names, ["classifier"])["task_type"] == "SEQ_CLS"
    fsdp = type("FSDPThing", (torch.distributed.fsdp.FSDPModule, type(model)), {})
    model.__class__ = fsdp  # as fully_shard does
    assert (
        describe(model, names)["auto_mapping"]["base_model_class"]
        == type(model).__mro__[2].__name__
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"], ["embed_tokens"]], ids=str)
def test_the_bases_own_tensors_in_the_file(targets, tmp_path):
    """peft#2092: with lm_head as a target PEFT saves its base weight; Phi's head has a bias too."""
    sizes = {**BERT, "num_hidden_layers": 1, "tie_word_embeddings": False}
    base = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes)).eval()
    nn.init.normal_(base.lm_head.bias)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert [key for key in keys if "lora_" not in key]
    if "embed_tokens" not in targets:
        assert [key for key in keys if key.endswith(("lm_head.bias", "lm_head.base_layer.bias"))]
    ours, ids = copy.deepcopy(base), tokens()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-6, atol=1e-6)
    if "embed_tokens" not in targets:
        with torch.no_grad():
            base.lm_head.bias.add_(1)
        with pytest.raises(ValueError, match=r"bias to be the model's own bias, got another"):
            load_adapter(base, tmp_path)


def peft_file(folder) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A base model, and an input and its output under PEFT's adapter saved in ``folder``."""
    base, ids = llama(), tokens()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(folder)
    return base, ids, theirs(ids).logits


def rename(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def named(name):
    return lambda key: key.replace("A.", f"A.{name}.").replace("B.", f"B.{name}.")


KEYS = {
    "default": named("default"),
    "another adapter's name": named("german"),
    "module first": lambda key: f"module.{key}",
    "module": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "compiled first": lambda key: f"_orig_mod.{key}",
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled between": lambda key: key.replace(PREFIX, "base_model._orig_mod.model."),
    "compiled inside": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "all": lambda key: "module._orig_mod." + named("default")(key),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", KEYS)
def test_keys_with_wrappers_and_adapter_names(case, tmp_path):
    """peft#2699: the adapter's name in keys; peft#2957: ``_orig_mod.`` of a compiled model.

    MakazhanAlpamys/Soup#335: an adapter with such keys loads as nothing, 0 of 96 ``lora_B`` set.

    PEFT reads a name in the keys if the adapter is loaded under it; keys with the parts of wrappers
    it drops with a warning, and the outputs are the base model's.
    """
    base, ids, right = peft_file(tmp_path)
    rename(tmp_path, KEYS[case])
    if case in ("default", "another adapter's name"):
        name = "default" if case == "default" else "german"
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, adapter_name=name)
        torch.testing.assert_close(theirs.eval()(ids).logits, right)
    assert not warned(load_adapter, base, tmp_path)
    torch.testing.assert_close(base(ids).logits, right, rtol=1e-6, atol=1e-6)


def test_keys_that_are_ambiguous_are_refused(tmp_path):
    """peft#2699: two names for one tensor would leave the choice to chance."""
    base, _, _ = peft_file(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    twice = tensors | {named("default")(key): tensor.clone() for key, tensor in tensors.items()}
    save_file(twice, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"expected one lora_[AB] for model.layers.*, got two"):
        load_adapter(base, tmp_path)
    first, second = named("one"), named("two")
    keys = {key: (first if "layers.0" in key else second)(key) for key in tensors}
    save_file({keys[key]: tensor for key, tensor in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="the tensors of one adapter, got those of one, two"):
        load_adapter(base, tmp_path)
    assert not any(hasattr(module, "lora_A") for module in base.modules())


# What PEFT 0.17 to 0.21 write for an untouched LoraConfig, where it is not false or null.
DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_file_of_default_settings_loads_silently(tmp_path):
    """peft#2038: files of newer versions have keys unknown to older ones."""
    base, ids, right = peft_file(tmp_path)
    edit_config(tmp_path, **DEFAULTS, a_key_to_come=None, another_key_to_come=False)
    assert not warned(load_adapter, base, tmp_path)
    torch.testing.assert_close(base(ids).logits, right, rtol=1e-6, atol=1e-6)


def test_an_unknown_key_with_the_default_of_the_installed_peft(tmp_path, monkeypatch):
    """peft#2038: a new setting's default leaves a plain LoRA as it was, another value may not."""
    base, ids, right = peft_file(tmp_path)
    edit_config(tmp_path, block_size_to_come=32)
    for default, loads in ((None, False), (16, False), (32, True)):
        newer = peft.LoraConfig
        if default is not None:
            from dataclasses import make_dataclass

            fields = [("block_size_to_come", int, default)]
            newer = make_dataclass("LoraConfig", fields, bases=(peft.LoraConfig,))
        monkeypatch.setattr(peft, "LoraConfig", newer)
        if not loads:
            with pytest.raises(
                ValueError, match=r"block_size_to_come = 32.*unknown here.*delete it"
            ):
                load_adapter(base, tmp_path)
        monkeypatch.undo()
    monkeypatch.setattr(peft, "LoraConfig", newer)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(ids).logits, right, rtol=1e-6, atol=1e-6)


CHANGING = {
    "alora_invocation_tokens": [1, 2],
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "monteclora_config": {"num_samples": 4},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"arrow_top_k": 2},
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


@pytest.mark.parametrize("key", CHANGING)
def test_settings_that_change_the_outputs_are_refused(key, tmp_path):
    """peft/tuners/lora/config.py, LoraConfig: each of these changes what the adapter computes."""
    base, _, _ = peft_file(tmp_path)
    edit_config(tmp_path, **{key: CHANGING[key]})
    with pytest.raises(ValueError, match=rf"{key} = .*not supported.*patch_peft"):
        load_adapter(base, tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settings_of_training_warn_and_load(tmp_path):
    """peft/tuners/lora/variants.py: VeLoRA and MiCA compute the same forward as LoRA."""
    if not hasattr(peft.LoraConfig, "velora_config"):
        pytest.skip("needs PEFT 0.20")
    for options, said in (
        ({"velora_config": {"num_groups": 4}}, "velora_config"),
        ({"init_lora_weights": "mica"}, None),
    ):
        base, ids = llama(), tokens()
        config = peft.LoraConfig(target_modules=["q_proj"], **options)
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        theirs.save_pretrained(tmp_path)
        texts = warned(load_adapter, base, tmp_path)
        assert [said in text for text in texts] == ([True] if said else [])
        torch.testing.assert_close(base(ids).logits, theirs(ids).logits, rtol=1e-6, atol=1e-6)


MOE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MOE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16}
MOE |= {"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MOE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEEPSEEK = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES = {
    "DeepseekV3": DEEPSEEK | {"n_shared_experts": 1},
    "Glm4Moe": {"first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "Qwen2Moe": {"shared_expert_intermediate_size": 24},
    "Mixtral": {},
    "GptOss": {"head_dim": 8},
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*did not match any targeted module")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("family", by_default(["DeepseekV3"], FAMILIES))
def test_adapters_that_peft_takes_for_fused_experts_are_named(family, tmp_path, monkeypatch):
    """peft#3711: dense and shared-expert targets are rewritten into those of the fused experts."""
    pytest.importorskip("peft.utils.transformers_weight_conversion")
    config = getattr(transformers, f"{family}Config")(**MOE | FAMILIES[family])
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model, ids = copy.deepcopy(base), tokens()
    apply_lora(model, rank=4)
    train_like(model)
    texts = warned(save_adapter, model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    gap = (theirs(ids).logits - model(ids).logits).abs().max().item()
    assert (gap > 1e-3) == bool(texts)
    kinds = peft.tuners.lora.Linear, peft.tuners.lora.layer.ParamWrapper
    dropped = [
        name
        for name in lora_layers(model)
        if not isinstance(theirs.get_submodule(PREFIX + name), kinds)
    ]
    assert bool(dropped) == bool(texts) == (family in ("DeepseekV3", "Glm4Moe"))
    if texts:
        assert all(name in texts[0] for name in dropped[:5])
        assert "load_adapter" in texts[0]
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    # Without PEFT's conversion the names decide, with the same result.
    monkeypatch.setitem(sys.modules, "peft", None)
    assert bool(warned(save_adapter, model, tmp_path)) == bool(dropped)


CONVOLUTIONS = {
    "dilated": ({"dilation": 2, "padding": "same"}, True),
    "dilated in one direction": ({"dilation": (1, 2), "padding": "same"}, True),
    "dilated, padded by a number": ({"dilation": 2, "padding": 2}, True),
    "dilated, not padded": ({"dilation": 2}, True),
    "dilated along a kernel of one": (
        {"kernel_size": (1, 3), "dilation": (2, 1), "padding": "same"},
        False,
    ),
    "one by one": ({"kernel_size": 1, "dilation": 2, "padding": "same"}, False),
    "same": ({"padding": "same"}, False),
    "valid": ({"padding": "valid", "stride": 2}, False),
    "strided": ({"stride": (2, 1), "padding": (1, 0)}, False),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_that_peft_computes_otherwise_are_named(case, tmp_path):
    """peft#3697: PEFT's lora_A has the convolution's stride and padding, not its dilation."""
    settings, differs = CONVOLUTIONS[case]
    base = nn.Sequential(nn.Conv2d(2, 4, **{"kernel_size": 3} | settings))
    model, x = copy.deepcopy(base), torch.randn(2, 2, 9, 9)
    apply_lora(model, target_modules=["0"], rank=2)
    train_like(model)
    right = nn.functional.conv2d(  # merged: the whole weight in the convolution's own geometry
        x,
        base[0].weight
        + model[0].scaling
        * (model[0].lora_B.flatten(1) @ model[0].lora_A.flatten(1)).view_as(base[0].weight),
        base[0].bias,
        base[0].stride,
        base[0].padding,
        base[0].dilation,
    )
    torch.testing.assert_close(model(x), right, rtol=1e-5, atol=1e-5)
    saving = warned(save_adapter, model, tmp_path)
    loading = warned(load_adapter, copy.deepcopy(base), tmp_path)
    for texts in (saving, loading):
        assert [("dilation" in text and "0:" in text) for text in texts] == [True] * differs
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    if differs and settings.get("padding") != "same":
        with pytest.raises(RuntimeError, match="size of tensor"):
            theirs(x)
    else:
        assert ((theirs(x) - model(x)).abs().max() > 1e-3).item() == differs
