"""Public reports of offloaded models and models on the meta device, each named at its test.

accelerate keeps an offloaded model's Parameters in CPU memory or on disk, and on the meta device
between calls. What is done to such a model must do what it does to the same model in memory.
Where a test names a function of accelerate, the source is its documentation, "Working with large
models": https://huggingface.co/docs/accelerate/package_reference/big_modeling; for hooks, its
https://github.com/huggingface/accelerate/blob/main/src/accelerate/hooks.py.
"""

import copy
from functools import partial

import pytest
import torch
from models import ALL, Tiny, llama, tokens, train_like
from torch import nn

import fused_lora
from fused_lora import (
    add_adapter,
    add_weighted_adapter,
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
    unmerge_lora,
)
from support import by_default, caught

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")
TARGETS = ["q_proj", "down_proj", "lm_head"]


def to_cpu(model, folder, **options):
    return accelerate.cpu_offload(model, execution_device="cpu", **options)


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def to_both(model, folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def to_chain(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)  # a SequentialHook
    return model


OFFLOADS = {
    "cpu": to_cpu,
    "buffers": partial(to_cpu, offload_buffers=True),
    "disk": to_disk,
    "dispatch": to_both,
    "chain": to_chain,
}
offloads = pytest.mark.parametrize("offload", list(OFFLOADS.values()), ids=list(OFFLOADS))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adapted(**options) -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    apply_lora(model, target_modules=TARGETS, rank=4, **options)
    return model if options else train_like(model)


def life(model, ids, folder):
    """Outputs after every operation that reads or writes an adapter or a weight."""
    torch.manual_seed(1)

    def y():
        with torch.no_grad():
            return model(ids).logits

    yield "loaded", y()
    merge_lora(model)
    yield "merged", y()
    with disable_lora(model):
        yield "merged and disabled", y()
    unmerge_lora(model)
    yield "unmerged", y()
    add_adapter(model, "b", rank=4)
    add_adapter(model, "dora", rank=6, use_dora=True)
    for name in ("b", "dora"):
        set_adapter(model, name)
        for layer in lora_layers(model).values():
            layer.scaling = 0.3
            assert layer.scaling == 0.3
        yield name, y()
    merge_lora(model)
    yield "dora merged", y()
    unmerge_lora(model)
    set_adapter(model, "default")
    yield "default again", y()
    add_weighted_adapter(model, "sum", {"default": 0.5, "b": 2.0})
    add_weighted_adapter(model, "svd", {"default": 0.5, "sum": 2.0}, combination="svd")
    set_adapter(model, "svd")
    yield "svd", y()
    save_adapter(model, folder)
    save_adapter(model, folder / "sum", name="sum")
    load_adapter(model, folder / "sum", name="new")
    set_adapter(model, "new")
    yield "read into a new adapter", y()
    set_adapter(model, "default")
    for layer in lora_layers(model).values():
        layer.reset_adapter()
    yield "reset", y()
    set_adapter(model, "svd")
    for layer in lora_layers(model).values():
        layer.reset_adapter()
    load_adapter(model, folder, name="svd")
    yield "read over the active adapter", y()


@offloads
@pytest.mark.filterwarnings("ignore:fused_lora. the adapter")
def test_an_offloaded_model_lives_as_one_in_memory(offload, tmp_path):
    """peft#868, peft#1190: merging offloaded weights; here the other operations too."""
    ids = tokens()
    expected = dict(life(adapted(), ids, tmp_path / "memory"))
    model = offload(adapted(), tmp_path / "offload")
    for name, y in life(model, ids, tmp_path / "adapter"):
        assert torch.equal(y, expected.pop(name)), name
    assert not expected
    layer = model.model.layers[0].self_attn.q_proj
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_merge_is_pefts(tmp_path):
    """peft#1190: merge_and_unload of an offloaded model, exact in PEFT."""
    peft = pytest.importorskip("peft")
    save_adapter(adapted(), tmp_path)
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    theirs, ours = to_cpu(theirs, None), to_cpu(adapted(), None)
    theirs.merge_adapter()
    merge_lora(ours)
    ids = tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@offloads
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_unloading_keeps_the_hooks(offload, merge, init, tmp_path):
    """peft#868: a merged model that was offloaded is saved whole."""
    ids, model = tokens(), adapted(init=init)
    expected = unload_lora(copy.deepcopy(model), merge=merge)(ids).logits
    model = offload(model, tmp_path / "offload")
    unload_lora(model, merge=merge)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model(ids).logits, expected)
    assert model.lm_head.weight.is_meta
    if offload is to_both:  # the only one of which transformers saves values
        model.save_pretrained(tmp_path / "plain")
        saved = type(model).from_pretrained(tmp_path / "plain").eval()
        assert torch.equal(saved(ids).logits, expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids).logits, expected)


def test_hooks_that_only_move_inputs_go_to_the_plain_layer():
    """accelerate's dispatch_model over several devices: its hooks offload nothing."""
    model, ids = adapted(), tokens()
    expected = unload_lora(copy.deepcopy(model))(ids).logits
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    unload_lora(model)
    assert isinstance(model.lm_head._hf_hook, hooks.AlignDevicesHook)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("offload", [to_cpu, to_both])
def test_tied_weights_are_refused_offloaded_too(offload, tmp_path):
    """peft#2018: a merge into lm_head also changes the embedding that shares its weight."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    apply_lora(model, target_modules=TARGETS, rank=4)
    train_like(model)
    model, ids = offload(model, tmp_path), tokens()
    before = model(ids).logits
    with pytest.raises(ValueError, match="expected a weight used by lm_head alone"):
        merge_lora(model)
    assert torch.equal(model(ids).logits, before)


def test_layers_offloaded_as_parts_of_a_block_are_refused(tmp_path):
    """accelerate's cpu_offload(preload_module_classes=...): one hook loads a whole block."""
    model, ids = adapted(), tokens()
    expected = model(ids).logits
    to_cpu(model, None, preload_module_classes=["LlamaDecoderLayer"])
    for call in (merge_lora, unload_lora, partial(save_adapter, directory=tmp_path / "none")):
        with pytest.raises(ValueError, match=r"remove the hooks that offload it as a part"):
            call(model)
    assert torch.equal(model(ids).logits, expected)
    hooks.remove_hook_from_module(model, recurse=True)
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_an_offloaded_model_is_adapted_beside_its_layers_or_refused_with_a_cure_that_works():
    """accelerate's remove_hook_from_module leaves the class's own forward on the instance."""
    ids, model = tokens(), llama()
    plain = copy.deepcopy(model)
    to_cpu(model, None)
    with pytest.raises(TypeError, match=r"remove_hook_from_module\(model, recurse=True\)"):
        apply_lora(model, target_modules=[*TARGETS, "embed_tokens"])
    torch.manual_seed(1)
    apply_lora(model, target_modules=TARGETS)
    beside = train_like(model)(ids).logits
    model = to_cpu(plain, None)
    hooks.remove_hook_from_module(model, recurse=True)
    torch.manual_seed(1)
    apply_lora(model, target_modules=TARGETS)
    y = train_like(model)(ids).logits
    torch.testing.assert_close(beside, y)
    assert torch.equal(to_cpu(model, None)(ids).logits, y)


def on_meta() -> Tiny:
    with torch.device("meta"):
        model = Tiny()
        apply_lora(model, target_modules=ALL, rank=2)
    return model


def in_empty_weights(include_buffers: bool) -> Tiny:
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = Tiny()
        apply_lora(model, target_modules=ALL, rank=2)
    return model


EMPTY = {
    "meta": on_meta,
    "accelerate": partial(in_empty_weights, False),
    "with buffers": partial(in_empty_weights, True),
}
empties = pytest.mark.parametrize("empty", list(EMPTY.values()), ids=list(EMPTY))


@pytest.fixture
def source(tmp_path):
    """A trained model, its plain state, and its adapter in files."""
    plain = Tiny()
    state = plain.state_dict()
    model = copy.deepcopy(plain)
    apply_lora(model, target_modules=ALL, rank=2)
    save_adapter(train_like(model), tmp_path / "adapter")
    return model, state, tmp_path / "adapter"


@pytest.mark.parametrize("kind", by_default(["with buffers"], EMPTY))
def test_the_scale_never_goes_to_meta(kind, source, tmp_path):
    """transformers#34234, transformers#30703: buffers without values after a checkpoint load."""
    safetensors = pytest.importorskip("safetensors.torch")
    empty, ids = EMPTY[kind], tokens(4, 6, vocabulary=20)
    expected = source[0](ids)
    safetensors.save_file(source[0].state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    path = str(tmp_path / "model.safetensors")
    loads = {
        "assign": lambda model: model.load_state_dict(source[0].state_dict(), assign=True),
        "whole": partial(
            accelerate.load_checkpoint_in_model, checkpoint=path, device_map={"": "cpu"}
        ),
        "dispatch": partial(
            accelerate.load_checkpoint_and_dispatch, checkpoint=path, device_map={"": "cpu"}
        ),
    }
    for load in loads.values():
        model = empty()
        assert not any(buffer.is_meta for buffer in model.buffers())
        load(model)
        assert torch.equal(model.to("cpu")(ids), expected)
    places = dict.fromkeys(ALL, "cpu") | {"hidden": "disk"}
    model = accelerate.load_checkpoint_and_dispatch(
        empty(), path, places, offload_folder=tmp_path / "offload"
    )
    assert model.hidden.weight.is_meta
    merge_lora(model)
    merge_lora(source[0])
    assert torch.equal(model(ids), source[0](ids))


@empties
@pytest.mark.parametrize("load", ["state", "tensors"])
def test_adapters_on_meta_get_the_files_values(empty, load, source):
    """peft#1961: adapters that were created on meta are on the weight's device once loaded."""
    model, (trained, state, adapter) = empty(), source
    if load == "state":
        model.load_state_dict(state, assign=True, strict=False)
    else:  # as accelerate loads a checkpoint, one tensor after another
        for name, value in state.items():
            accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value)
        assert model.hidden.lora_A.is_meta
    load_adapter(model, adapter)
    assert all(p.device.type == "cpu" and p.requires_grad for p in lora_parameters(model))
    ids = tokens(4, 6, vocabulary=20)
    assert torch.equal(model(ids), trained(ids))
    assert torch.equal(model.to("cpu")(ids), trained(ids))


@empties
def test_adapters_on_meta_are_refused_or_initialised(empty, source, tmp_path):
    """pytorch#105963: copying into a meta tensor does nothing, without an error."""
    model, state = empty(), source[1]
    for name, value in state.items():
        accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value)
    ids = tokens(4, 6, vocabulary=20)
    add_adapter(model, "b", rank=2)
    held = lora_layers(model)
    inputs = {"table": ids, "conv": torch.randn(1, 1, 6, 6), "hidden": torch.randn(2, 36)}
    calls = {name: partial(held[name], x) for name, x in inputs.items()}
    calls |= {
        "merge": lambda: merge_lora(model),
        "unload": lambda: unload_lora(model),
        "save": lambda: save_adapter(model, tmp_path / "none"),
        "set": lambda: set_adapter(model, "b"),
        "sum": lambda: add_weighted_adapter(model, "c", {"default": 1.0}),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"load_adapter.*(model\.to)"):
            call()
        assert fused_lora.adapter_names(model) == ["default", "b"], name
        assert not (tmp_path / "none").exists()
        assert not any(layer.merged for layer in held.values())
    plain = Tiny()
    plain.load_state_dict(state)
    model.to("cpu")
    torch.testing.assert_close(model(ids), plain(ids))  # a new adapter adds nothing
    assert model.hidden.lora_A.std() > 0
    set_adapter(model, "b")
    torch.testing.assert_close(model(ids), plain(ids))


@empties
def test_a_whole_model_on_meta_is_refused(empty, source, tmp_path):
    """peft#868: "Cannot copy out of meta tensor"; here an error that says what to do, at once."""
    model = empty()
    add_adapter(model, "b", rank=2)
    stash = source[0].hidden.stash_adapter()
    calls = (
        lambda: merge_lora(model),
        lambda: unload_lora(model),
        lambda: save_adapter(model, tmp_path / "none"),
        lambda: load_adapter(model, source[2]),
        lambda: set_adapter(model, "b"),
        lambda: add_weighted_adapter(model, "c", {"default": 1.0}),
        lambda: model.hidden.activate_adapter(stash),
        lambda: model.hidden(torch.randn(2, 36)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"meta.*load"):
            call()
    assert fused_lora.adapter_names(model) == ["default", "b"]
    model.to_empty(device="cpu")
    model.load_state_dict(source[0].state_dict())
    ids = tokens(4, 6, vocabulary=20)
    assert torch.equal(model(ids), source[0](ids))


def test_there_and_back():
    """pytorch-image-models#2350: to_empty fills buffers that are not persistent with anything."""
    layer = nn.Sequential(nn.Linear(8, 8))
    apply_lora(layer, rank=2, alpha=3.0)
    train_like(layer)
    state, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 8)
    y = layer(x)
    layer.to("meta")
    assert layer[0].scaling == 1.5
    assert layer(x.to("meta")).shape == y.shape
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(x), y)


def test_training_an_offloaded_adapter_is_told(tmp_path):
    """accelerate's AlignDevicesHook computes with copies of the Parameters, and drops them."""
    model, ids = llama(), tokens()
    apply_lora(model, rank=4)
    copied = copy.deepcopy(model)
    to_cpu(model.train(), tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    for train in (lambda: list(lora_parameters(model)), lambda: lora_param_groups(model, lr=0.1)):
        (message,) = caught(train)[1]
        assert name in message
        assert "to train, offload before apply_lora" in message
    assert caught(parameter_summary, model)[1] == []
    model(ids, labels=ids).loss.backward()
    assert "gets no gradient" in check_adapters(model)[name]
    (message,) = caught(save_adapter, model, tmp_path)[1]
    assert message.count("offloaded by accelerate") == 1
    model.eval()  # as for inference
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []

    unload_lora(to_cpu(copied, tmp_path))  # offloaded first: trains
    apply_lora(copied, rank=4)
    parameters, log = caught(lambda: list(lora_parameters(copied)))
    copied.train()(ids, labels=ids).loss.backward()
    assert log == []
    assert check_adapters(copied) == {}
    assert all(parameter.grad is not None for parameter in parameters)
