"""Adapters that vanish: an adapted layer is an ``nn.Linear``, and other code replaces those.

Each test names the public source of the case.
"""

import copy
import pickle

import pytest
import torch
from models import Tiny, assert_unchanged, llama, snapshot, tokens, train_like
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fused_lora import (
    apply_lora,
    check_adapters,
    load_adapter,
    lora_layers,
    lora_param_groups,
    lora_parameters,
    merge_lora,
    parameter_summary,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from support import caught

CURE = "resize, quantise or convert before apply_lora, or call unload_lora first"


def pair() -> nn.Sequential:
    model = nn.Sequential()
    model.first = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.last = nn.Linear(8, 8)
    return model


def test_a_resized_head_is_missed(tmp_path):
    """sentence-transformers#3052: get_peft_model first, then resize_token_embeddings."""
    model = llama()
    apply_lora(model, include_head=True)
    assert check_adapters(model) == {}
    model.resize_token_embeddings(110)
    expected = {"lm_head": "its adapter is gone: the layer was replaced by an nn.Linear"}
    assert check_adapters(model) == expected
    for use in (
        lora_layers,
        lambda m: list(lora_parameters(m)),
        lambda m: lora_param_groups(m, lr=1e-3),
        parameter_summary,
        lambda m: save_adapter(m, tmp_path),
        merge_lora,
        unload_lora,
    ):
        _, log = caught(use, model)
        assert len(log) == 1
        assert log[0].startswith("fused_lora: adapted layers were replaced by an nn.Linear at lm_h")
        assert CURE in log[0]
    with pytest.raises(ValueError, match="without: apply_lora or load_adapter adds them"):
        lora_layers(model)


def test_the_order_that_the_warning_names_works(tmp_path):
    """peft#838: tokens are added before the adapters."""
    model = llama()
    model.resize_token_embeddings(110)
    apply_lora(model, include_head=True)
    train_like(model)
    _, log = caught(save_adapter, model, tmp_path)
    assert log == []
    assert check_adapters(model) == {}
    ids = tokens(vocabulary=110)
    other = llama()
    other.load_state_dict(llama().state_dict())
    other.resize_token_embeddings(110)
    other.load_state_dict(model.state_dict(), strict=False)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(ids).logits, model(ids).logits)


def test_float8_training_replaces_every_layer(tmp_path):
    """pytorch/ao#1132: convert_to_float8_training replaces each nn.Linear by a Float8Linear."""
    float8 = pytest.importorskip("torchao.float8")
    model = llama()
    names = apply_lora(model)
    optimizer = torch.optim.SGD(lora_parameters(model))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == 2 * len(names)
    assert held <= {id(p) for p in model.parameters()}
    float8.convert_to_float8_training(model)
    assert held.isdisjoint(id(p) for p in model.parameters())  # it would train orphans
    problems = check_adapters(model)
    assert list(problems) == names
    assert set(problems.values()) == {
        "its adapter is gone: the layer was replaced by a Float8Linear"
    }
    for use in (
        lora_layers,
        lambda m: list(lora_parameters(m)),
        parameter_summary,
        lambda m: save_adapter(m, tmp_path),
        merge_lora,
        unload_lora,
    ):
        with pytest.raises(ValueError, match=r"were all replaced by a Float8Linear at .*q_pr"):
            use(model)
        with pytest.raises(ValueError, match=CURE):
            use(model)


def test_quantization_aware_training_replaces_layers(tmp_path):
    """unsloth#2976: QAT with LoRA; torchao's prepare step swaps nn.Linear."""
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = QATConfig(
        weight_config=IntxFakeQuantizeConfig(torch.int8, group_size=16), step="prepare"
    )
    model = llama()
    names = apply_lora(model)
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "mlp" in name)
    gone = [name for name in names if "mlp" in name]
    assert list(check_adapters(model)) == gone
    _, log = caught(save_adapter, model, tmp_path)
    assert f"replaced by a FakeQuantizedLinear at {gone[0]}, {gone[1]}" in log[0]
    assert "and 1 more; their adapters are not trained, merged or saved" in log[0]


def test_bitsandbytes_replaces_every_layer():
    """AutoGPTQ#50: quantising a model with an adapter; accelerate's function takes any linear."""
    pytest.importorskip("bitsandbytes")
    bnb = pytest.importorskip("accelerate.utils.bnb")
    from accelerate.utils import BnbQuantizationConfig

    model = llama()
    names = apply_lora(model)
    model = bnb.replace_with_bnb_layers(
        model, BnbQuantizationConfig(load_in_8bit=True), ["lm_head"]
    )
    expected = "its adapter is gone: the layer was replaced by a Linear8bitLt"
    assert check_adapters(model) == dict.fromkeys(names, expected)


def replace(model):
    model.last = nn.Linear(8, 8)
    return {"last": "replaced by an nn.Linear"}


def remove(model):
    del model.last
    return {"last": "removed"}


def prune(model):
    model.first = model.first[:1]
    return {"first.1": "removed"}


def drop_first(model):
    del model.first[0]  # the second layer takes the place of the first
    return {"first.0": "removed"}


def replace_parent(model):
    model.first = nn.Identity()
    return {"first.0": "removed", "first.1": "removed"}


def identity(model):
    model.first[1] = nn.Identity()
    return {"first.1": "replaced by an nn.Identity"}


def move(model):
    model.first, model.last = nn.Sequential(model.last, *model.first), nn.Identity()
    return {}


def swap(model):
    model.first[0], model.first[1] = model.first[1], model.first[0]
    return {}


def checkpointing(model):
    model.first[0] = checkpoint_wrapper(model.first[0])
    model.first = checkpoint_wrapper(model.first)
    return {}


def a_copy(model):
    model.last = copy.deepcopy(model.last)
    return {}


WRAPPERS = {
    "itself": lambda model: (model, ""),
    "copied": lambda model: (copy.deepcopy(model), ""),
    "pickled": lambda model: (pickle.loads(pickle.dumps(model)), ""),
    "compiled": lambda model: (torch.compile(model, backend="eager"), "_orig_mod."),
    "averaged": lambda model: (torch.optim.swa_utils.AveragedModel(model), "module."),
    "contained": lambda model: (nn.ModuleDict({"net": model, "other": pair()}), "net."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "change",
    [
        *(replace, remove, prune, drop_first, replace_parent, identity),
        *(move, swap, checkpointing, a_copy),
    ],
)
def test_what_became_of_a_layer(change, wrapper):
    """pytorch/torchtitan#2488: converters of modules replace each nn.Linear that they find."""
    model = pair()
    apply_lora(model)
    gone = change(model)
    model, prefix = WRAPPERS[wrapper](model)
    layers, log = caught(lora_layers, model)
    assert len(layers) == 3 - len(gone)
    assert len(log) == bool(gone)
    assert check_adapters(model) == {
        prefix + name: f"its adapter is gone: the layer was {now}" for name, now in gone.items()
    }


def test_a_part_of_a_model_knows_its_own_layers():
    """sentence-transformers#3052 adapts ``model[0].auto_model``, one part of its model."""
    model = pair()
    apply_lora(model)
    model.first[0] = nn.Linear(8, 8)
    assert check_adapters(model.first).keys() == {"0"}
    assert check_adapters(model).keys() == {"first.0"}
    caught(unload_lora, model.first)  # on purpose: nothing is missed any more
    assert check_adapters(model) == {}
    unload_lora(model)
    apply_lora(model)
    assert check_adapters(model) == {}


def test_a_model_is_adapted_anew_after_all_layers_vanished():
    """pytorch/torchtitan#2488: after the converters have replaced each nn.Linear."""
    model = pair()
    apply_lora(model)
    for parent, name in ((model.first, "0"), (model.first, "1"), (model, "last")):
        setattr(parent, name, nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"adapted layers were all replaced by an nn\.Linear"):
        lora_layers(model)
    apply_lora(model.first)
    assert check_adapters(model).keys() == {"last"}
    with pytest.raises(
        ValueError, match="expected a model with adapters, got a Sequential without"
    ):
        check_adapters(pair())


def test_a_loaded_adapter_is_remembered_too(tmp_path):
    """peft#1932: load_adapter, and a base model that is no longer the one of the training."""
    model = pair()
    apply_lora(model)
    save_adapter(model, tmp_path)
    other = pair()
    load_adapter(other, tmp_path)
    assert "_adapted" not in str(other.state_dict().keys())
    other.last = nn.Linear(8, 8)
    assert check_adapters(other).keys() == {"last"}


@pytest.mark.parametrize("size", [110, 90])
def test_a_resized_embedding_is_refused_in_words(size, tmp_path):
    """peft#1457: embeddings and adapter of different sizes."""
    model, ids = llama(tie_word_embeddings=False), tokens(vocabulary=80)
    apply_lora(model, target_modules=["embed_tokens", "q_proj"])
    train_like(model)
    model.resize_token_embeddings(size)
    words = rf"expected lora_A of shape \(8, {size}\).*got \(8, 100\): resize the layer before"
    before = snapshot(model)
    for use in (
        lambda m: m(ids),
        merge_lora,
        lambda m: save_adapter(m, tmp_path / "a"),
        unload_lora,
    ):
        with pytest.raises(RuntimeError, match=words):
            use(model)
        assert_unchanged(model, before)
    assert not (tmp_path / "a").exists()
    assert "expected lora_A" in check_adapters(model)["model.embed_tokens"]
    unload_lora(model, merge=False)
    apply_lora(model, target_modules=["embed_tokens", "q_proj"])
    assert model(ids).logits.shape[-1] == size


def test_a_resized_merged_embedding_is_not_unmerged():
    """peft#2898: an adapter and new embedding tokens, whose sizes then differ."""
    model, ids = llama(), tokens(vocabulary=80)
    apply_lora(model, target_modules=["q_proj", "embed_tokens"])
    train_like(model)
    expected = model(ids).logits
    merge_lora(model)
    model.resize_token_embeddings(110)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for undo in (unmerge_lora, nn.Module.state_dict, lambda m: unload_lora(m, merge=False)):
        with pytest.raises(RuntimeError, match=r"embed_tokens: expected a base weight of shape"):
            undo(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(layer.merged for layer in lora_layers(model).values())
    unload_lora(model)
    torch.testing.assert_close(model(ids).logits[..., :100], expected, rtol=1e-4, atol=1e-4)


def test_unloading_before_a_resize_keeps_the_adapter():
    """peft#1367: the resize comes before the adapter."""
    model, ids = llama(), tokens(vocabulary=80)
    apply_lora(model, target_modules=["embed_tokens", "q_proj"])
    train_like(model)
    expected = model(ids).logits
    unload_lora(model)
    model.resize_token_embeddings(110)
    assert apply_lora(model, target_modules=["embed_tokens"])
    torch.testing.assert_close(model(ids).logits[..., :100], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape"), [("hidden", (20, 36)), ("out", (5, 20)), ("conv", (4, 1, 3, 3))]
)
def test_any_weight_of_another_shape_is_refused_in_words(name, shape, tmp_path):
    """peft#1746: an adapter of another shape than the pruned weight, and no error."""
    model = Tiny()
    apply_lora(model, target_modules=["hidden", "out", "conv"])
    layer = getattr(model, name)
    layer.weight.data = torch.randn(shape)
    for use in (merge_lora, lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(RuntimeError, match=rf"{name}: expected lora_[AB] of shape .* got"):
            use(model)
    assert name in check_adapters(model)
    x = torch.randn(3, shape[1], *shape[2:])
    with pytest.raises((ValueError, RuntimeError), match=r"expected lora_[AB] of shape"):
        layer(x)
