"""Modules in ``modules_to_save`` that are replaced, or stop training, after ``apply_lora``.

Each test names the public source of the case.
"""

import copy
import json
import pickle

import pytest
import torch
from models import assert_unchanged, llama, snapshot
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from fused_lora import (
    add_adapter,
    apply_lora,
    check_adapters,
    disable_lora,
    load_adapter,
    lora_layers,
    lora_param_groups,
    lora_parameters,
    merge_lora,
    parameter_summary,
    save_adapter,
    set_adapter,
    unload_lora,
)
from support import warned

CURE = "resize, quantise or convert before apply_lora, or call unload_lora first"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Linear(8, 8)
    model.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return model


def trained(model=None, modules=("head",)) -> nn.Module:
    model = net() if model is None else model
    apply_lora(model, target_modules=["body"], modules_to_save=list(modules))
    return model


def replace(model):
    model.head = nn.Linear(8, 8)
    return "replaced by an nn.Linear"


def frozen(model):
    model.head = nn.Linear(8, 8).requires_grad_(False)
    return "replaced by an nn.Linear"


def identity(model):
    model.head = nn.Identity()
    return "replaced by an nn.Identity"


def remove(model):
    del model.head
    return "removed"


def checkpointing(model):
    model.head = checkpoint_wrapper(model.head)


def a_copy(model):
    model.head = copy.deepcopy(model.head)


def move(model):
    model.other = nn.Sequential(model.head)
    model.head = nn.Identity()


WRAPPERS = {
    "itself": lambda model: (model, ""),
    "copied": lambda model: (copy.deepcopy(model), ""),
    "pickled": lambda model: (pickle.loads(pickle.dumps(model)), ""),
    "compiled": lambda model: (torch.compile(model, backend="eager"), "_orig_mod."),
    "contained": lambda model: (nn.ModuleDict({"net": model, "other": net()}), "net."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "change", [replace, frozen, identity, remove, checkpointing, a_copy, move, lambda model: None]
)
def test_what_became_of_a_trained_module(change, wrapper):
    """sentence-transformers#3052 resizes the embeddings after get_peft_model."""
    model = trained()
    now = change(model)
    model, prefix = WRAPPERS[wrapper](model)
    log = warned(lora_layers, model)
    if now is None:
        assert log == []
        assert check_adapters(model) == {}
    else:
        assert check_adapters(model) == {
            f"{prefix}head": f"its trained copy is gone: the module was {now}"
        }
        assert log == [
            f"fused_lora: modules in modules_to_save were {now} at {prefix}head; their trained"
            f" copies are gone and not saved: {CURE}"
        ]


def test_a_replaced_module_is_told_wherever_it_matters(tmp_path):
    """peft#876: a head that trains, and that no file holds."""
    model = trained()
    add_adapter(model, "b")
    model.head = nn.Linear(8, 8)
    for use in (
        lambda m: list(lora_parameters(m)),
        lambda m: lora_param_groups(m, lr=1e-3),
        parameter_summary,
        lambda m: save_adapter(m, tmp_path),
        lambda m: merge_lora(copy.deepcopy(m)),
        lambda m: unload_lora(copy.deepcopy(m)),
    ):
        log = warned(use, model)
        assert len(log) == 1
        assert "modules in modules_to_save were replaced by an nn.Linear at head; th" in log[0]
        assert CURE in log[0]
    before = snapshot(model)
    for switch in (lambda m: disable_lora(m).__enter__(), lambda m: set_adapter(m, "b")):
        with pytest.raises(RuntimeError, match=r"got one replaced by an nn\.Linear at head, whose"):
            warned(switch, model)
        assert_unchanged(model, before)
    warned(lambda: unload_lora(model, merge=False))
    trained(model)
    assert check_adapters(model) == {}


def test_a_loaded_module_is_remembered_too(tmp_path):
    """peft#1070: a head that comes from an adapter's file."""
    save_adapter(trained(), tmp_path)
    other = net()
    load_adapter(other, tmp_path)
    assert check_adapters(other) == {}
    other.head = nn.Linear(8, 8)
    assert check_adapters(other) == {
        "head": "its trained copy is gone: the module was replaced by an nn.Linear"
    }


def test_layers_and_modules_are_told_apart():
    """unsloth#2976: a converter that replaces each nn.Linear."""
    model = trained(modules=["head.2"])
    model.body, model.head[2] = nn.Linear(8, 8), nn.Linear(8, 8)
    model.body.requires_grad_(False)
    assert check_adapters(model) == {
        "body": "its adapter is gone: the layer was replaced by an nn.Linear",
        "head.2": "its trained copy is gone: the module was replaced by an nn.Linear",
    }
    with pytest.raises(ValueError, match=r"layers were all replaced by an nn\.Linear at body"):
        lora_layers(model)


def test_new_tokens_after_the_adapters(tmp_path):
    """sentence-transformers#3052: get_peft_model first, then resize_token_embeddings."""
    model = llama(tie_word_embeddings=False)
    apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model.resize_token_embeddings(110)
    assert check_adapters(model) == {
        "lm_head": "its trained copy is gone: the module was replaced by an nn.Linear"
    }
    log = warned(save_adapter, model, tmp_path)
    assert len(log) == 1  # and no advice to name lm_head in modules_to_save
    assert "were replaced by an nn.Linear at lm_head; their trained copies are gone" in log[0]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.embed_tokens.weight"].shape[0] == 110


def test_float8_training_replaces_a_trained_head():
    """pytorch/ao#1132: convert_to_float8_training replaces each nn.Linear by a Float8Linear."""
    float8 = pytest.importorskip("torchao.float8")
    model = trained(modules=["head.0"])
    float8.convert_to_float8_training(model, module_filter_fn=lambda m, name: name == "head.0")
    assert check_adapters(model) == {
        "head.0": "its trained copy is gone: the module was replaced by a Float8Linear"
    }


def frozen_copy(model):
    model.head[2].weight.requires_grad_(False)
    return {"head.2": "its weight does not require grad: requires_grad_(True) lets it train"}


def frozen_module(model):
    model.head.requires_grad_(False)
    reason = "its bias does not require grad: requires_grad_(True) lets it train"
    return {"head.0": reason, "head.2": reason}


def frozen_part(model):
    model.head[2] = nn.Linear(8, 8).requires_grad_(False)
    return {"head.2": "its bias does not require grad: requires_grad_(True) lets it train"}


def codes(model):
    weight = torch.zeros(8, 8, dtype=torch.int8)
    model.head[0].weight = nn.Parameter(weight, requires_grad=False)
    model.head[0].forward = lambda x: x
    return {"head.0": "its weight is of torch.int8, which does not train"}


def as_buffer(model):
    weight = model.head[0].weight.detach()
    del model.head[0].weight
    model.head[0].register_buffer("weight", weight)
    return {"head.0": "its weight does not require grad: requires_grad_(True) lets it train"}


@pytest.mark.parametrize("change", [frozen_copy, frozen_module, frozen_part, codes, as_buffer])
def test_a_copy_that_does_not_train_is_named(change):
    """peft#2171: parts of a head that did not train, seen only in the results."""
    model = trained()
    assert check_adapters(model) == {}
    expected = change(model)
    found = check_adapters(model)
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert found[name].startswith(reason)
    (log,) = warned(lambda: model(torch.randn(2, 8)).sum().backward())
    assert log.startswith("fused_lora: after the first backward pass, head.")
    assert all(name in log and found[name] in log for name in found)


def test_a_model_that_is_frozen_on_purpose_is_not_named(tmp_path):
    """peft#2369: an adapter that is loaded for inference, and warnings that then mislead."""
    model = trained()
    model.requires_grad_(False)
    with disable_lora(model):
        assert check_adapters(model) == {}
    assert warned(save_adapter, model, tmp_path) == []
    model.body.requires_grad_(True)
    with disable_lora(model):
        assert check_adapters(model).keys() == {"head.0", "head.2"}


def test_a_quantised_head(tmp_path):
    """peft#1222 and peft#1720: a head that was quantised with the rest cannot require grad."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = trained()
    add_adapter(model, "b")
    save_adapter(model, tmp_path / "a")
    quantize_(model, Int8WeightOnlyConfig(), lambda m, name: name in ("body", "head.2"))
    words = "whose weight is of class .*Tensor: quantise before apply_lora"
    assert check_adapters(model).keys() == {"head.2"}
    (log,) = warned(lambda: model(torch.randn(2, 8)).sum().backward())
    assert "head.2: its weight is of class" in log
    assert "Tensor, which does not train: quantise before apply_lora" in log
    for use in (lambda: save_adapter(model, tmp_path / "c"), lambda: set_adapter(model, "b")):
        with pytest.raises(RuntimeError, match=f"got head.2, {words}.*filter_fn"):
            use()
    with pytest.raises(ValueError, match=r"expected float Parameters in modules_to_save, got head"):
        load_adapter(model, tmp_path / "a")
    assert not (tmp_path / "c").exists()
    warned(save_adapter, model, tmp_path / "b", "b")  # its copy is aside, and whole
    with disable_lora(model):
        assert check_adapters(model).keys() == {"head.2"}
    plain, x = net(), torch.randn(2, 8)
    quantize_(plain, Int8WeightOnlyConfig(), lambda m, name: name == "body")
    right = trained(plain)  # the order that the message names
    right(x).sum().backward()
    assert right.head[2].weight.grad is not None
    assert check_adapters(right) == {}
    assert warned(save_adapter, right, tmp_path / "right") == []


def test_a_tensor_subclass_that_trains_is_not_saved(tmp_path):
    """torchtitan#3150: MXFP8 training wraps any Parameter in a tensor subclass, and it trains."""
    model = trained()
    weight = model.head[0].weight.detach()
    model.head[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    assert check_adapters(model) == {}
    with pytest.raises(RuntimeError, match=r"got head\.0, whose weight is of class TwoTensor"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def classifier():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=30, num_hidden_layers=1, **sizes)
    return transformers.RobertaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("excluded", "silent"),
    [
        (["classifier"], True),
        ("classifier", True),
        (r"classifier\..*", True),
        (["dense", "out_proj"], True),
        (["classifier.dense"], False),
        (["value"], False),
        (None, False),
    ],
)
def test_a_head_that_stays_frozen_on_purpose(excluded, silent):
    """peft#2369: a warning of uninitialised weights that is nothing to worry about."""
    targets = {"target_modules": ["query"], "exclude_modules": excluded}
    log = warned(lambda: apply_lora(classifier(), **targets))
    if silent:
        assert log == []
    else:
        assert len(log) == 1
        assert log[0].endswith(
            "modules_to_save=['classifier'], or name them in exclude_modules to silence this"
            " warning"
        )


def test_excluding_does_not_hide_an_adapter_on_a_fresh_head():
    """peft#2027: an adapter on a head whose own weights no file holds."""
    log = warned(
        lambda: apply_lora(
            classifier(), target_modules=["query", "dense"], exclude_modules=["classifier"]
        )
    )
    assert len(log) == 1
    assert "an adapter on classifier, whose own weights its file lacks" in log[0]
    assert "exclude_modules" not in log[0]


def test_a_head_that_the_checkpoint_has(tmp_path):
    """peft#2369: only weights that from_pretrained did not find are fresh."""
    transformers = pytest.importorskip("transformers", minversion="5")
    cls = transformers.RobertaForSequenceClassification
    whole, base = classifier(), classifier().roberta
    whole.save_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    loaded = cls.from_pretrained(tmp_path / "whole").to(torch.bfloat16)
    found = []
    assert warned(lambda: found.extend(apply_lora(loaded))) == []
    assert any(name.startswith("classifier") for name in found)
    (log,) = warned(lambda: apply_lora(cls.from_pretrained(tmp_path / "base")))
    assert "no adapter for classifier, frozen" in log
    resized = cls.from_pretrained(tmp_path / "whole", num_labels=5, ignore_mismatched_sizes=True)
    (log,) = warned(lambda: apply_lora(resized))
    assert "no adapter for classifier, frozen" in log
