"""Reports of users about messages: what is merged, whose model it is, which argument is wrong.

Every test names its source.
"""

import copy
import inspect
import io
import json
import os
import pickle
from pathlib import Path

import peft
import pytest
import torch
from models import assert_unchanged, llama, snapshot, stack, tokens, train_like
from torch import nn

import fused_lora
from fused_lora import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    assert_only_lora_gradients,
    check_adapters,
    delete_adapter,
    disable_lora,
    explain,
    fuse_projections,
    load_adapter,
    lora_layers,
    lora_param_groups,
    lora_parameters,
    merge_lora,
    parameter_summary,
    patch_peft,
    save_adapter,
    set_adapter,
    unfuse_projections,
    unload_lora,
    unmerge_lora,
    unpatch_peft,
)
from support import warned

transformers = pytest.importorskip("transformers")

CONFIG = "adapter_config.json"


def adapted(make=stack, **arguments) -> nn.Module:
    model = make()
    apply_lora(model, **{"rank": 2} | arguments)
    return train_like(model.eval())


def test_a_merged_model_says_that_its_state_is_the_bases(tmp_path):
    """peft#868: save_pretrained after a merge wrote the model without the adapter."""
    model, ids = adapted(llama), tokens()
    right, base = model(ids).logits, copy.deepcopy(model.state_dict())
    assert not warned(merge_lora, model)
    (text,) = warned(model.save_pretrained, tmp_path)
    assert "base weights" in text
    assert "unload_lora(model) first, then save_pretrained" in text
    assert not warned(model.state_dict)  # once per merge
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())
    unmerge_lora(model)
    assert not warned(model.save_pretrained, tmp_path)
    merge_lora(model)
    assert len(warned(model.state_dict)) == 1
    unload_lora(model)
    assert not warned(model.save_pretrained, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_exports_the_merged_model(merged, tmp_path):
    """peft#868: exporting must leave a model that goes on training as it was."""
    model, ids = adapted(llama), tokens()
    right = model(ids).logits
    if merged:
        merge_lora(model)
    unload_lora(copy.deepcopy(model)).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, right, rtol=1e-5, atol=1e-5)
    assert lora_layers(model)
    assert bool(warned(model.state_dict)) == merged


def test_what_else_reads_a_merged_models_state():
    """peft#868: wrappers save the same state; copying, exporting and loading save nothing."""
    x = torch.randn(3, 8)
    model = adapted()
    right = model(x)
    merge_lora(model)
    assert not warned(copy.deepcopy, model)
    assert not warned(pickle.dumps, model)
    assert not warned(torch.export.export, model, (x,))
    assert not warned(model[0].state_dict)  # FSDP takes the states of single layers
    assert not warned(torch.compile(model, backend="eager", fullgraph=True), x)
    assert len(warned(copy.deepcopy(model).state_dict)) == 1
    assert len(warned(nn.DataParallel(model).state_dict)) == 1
    assert not warned(lambda: model.load_state_dict(model.state_dict()))
    torch.testing.assert_close(model(x), right, rtol=1e-5, atol=1e-5)
    for make in (torch.compile, nn.DataParallel):  # merged through a wrapper
        model = adapted()
        merge_lora(make(model))
        assert len(warned(torch.save, model.state_dict, io.BytesIO())) == 0
        assert len(warned(model.state_dict)) == 1
    inner = nn.ModuleDict({"inner": adapted(), "outer": nn.Linear(2, 2)})
    merge_lora(inner["inner"])
    assert len(warned(inner.state_dict)) == 1
    final = adapted()
    merge_lora(final, keep_base=False)  # its state is the merged one
    assert not warned(final.state_dict)


def peft_wrapped() -> nn.Module:
    return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))


def peft_injected() -> nn.Module:
    model = llama()
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


ON_A_MODEL = {
    "load_adapter": lambda model, folder: load_adapter(model, folder),
    "save_adapter": lambda model, folder: save_adapter(model, folder / "new"),
    "merge_lora": lambda model, folder: merge_lora(model),
    "unmerge_lora": lambda model, folder: unmerge_lora(model),
    "unload_lora": lambda model, folder: unload_lora(model),
    "add_adapter": lambda model, folder: add_adapter(model, "b"),
    "set_adapter": lambda model, folder: set_adapter(model, "b"),
    "lora_parameters": lambda model, folder: list(lora_parameters(model)),
    "lora_param_groups": lambda model, folder: lora_param_groups(model, 1e-3),
    "parameter_summary": lambda model, folder: parameter_summary(model),
    "apply_lora": lambda model, folder: apply_lora(model),
    "explain": lambda model, folder: explain(model),
    "adapter_names": lambda model, folder: adapter_names(model),
    "add_weighted_adapter": lambda model, folder: add_weighted_adapter(model, "b", {"default": 1}),
    "assert_only_lora_gradients": lambda model, folder: assert_only_lora_gradients(model),
    "check_adapters": lambda model, folder: check_adapters(model),
    "delete_adapter": lambda model, folder: delete_adapter(model, "b"),
    "disable_lora": lambda model, folder: disable_lora(model).__enter__(),
    "lora_layers": lambda model, folder: lora_layers(model),
    "fuse_projections": lambda model, folder: fuse_projections(model),
    "unfuse_projections": lambda model, folder: unfuse_projections(model),
}
OF_BOTH = {  # these take PEFT's models too
    *("patch_peft", "unpatch_peft", "untrained_adapters"),
    *("adapter_parameters", "adapter_segments", "clip_adapter_grad_norm_"),
}


def test_every_function_on_a_model_is_tested():
    """peft#1206: the tests below are of every public function whose first argument is a model."""
    first = {
        name: next(iter(inspect.signature(function).parameters), None)
        for name in fused_lora.__all__
        if inspect.isfunction(function := getattr(fused_lora, name))
    }
    of_models = {name for name, parameter in first.items() if parameter == "model"}
    assert of_models | {"explain"} == {*ON_A_MODEL, *OF_BOTH}


@pytest.mark.parametrize("make", [peft_wrapped, peft_injected])
@pytest.mark.parametrize("call", ON_A_MODEL)
def test_peft_models_are_named_as_pefts(call, make, tmp_path):
    """peft docs, "Model merging" and "Load adapters": PEFT's own methods for its own models."""
    save_adapter(adapted(llama), tmp_path)
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"PEFT's .*patch_peft\(model\).*merge_and_unload"):
        ON_A_MODEL[call](model, tmp_path)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert not (tmp_path / "new").exists()


WRONG = [
    None,
    3,
    -1.5,
    float("nan"),
    True,
    {},
    {"a": 1},
    [],
    [1],
    "",
    "(",
    b"x",
    object(),
    (),
    set(),
]
WRONG += [Path("nowhere"), nn.Linear(2, 2), nn.Sequential(), nn.Linear, torch.ones(2), torch.half]


def argument(function, changed, make=adapted, **others):
    return (lambda model, value: function(model, **others, **{changed: value})), make


ARGUMENTS = {}
for _function, _make, _names in (
    (
        apply_lora,
        stack,
        "rank alpha dropout target_modules exclude_modules include_head rank_pattern",
    ),
    (apply_lora, stack, "alpha_pattern use_rslora use_dora init impl adapter_dtype"),
    (merge_lora, adapted, "keep_base"),
    (unload_lora, adapted, "merge"),
    (set_adapter, adapted, "name"),
    (delete_adapter, adapted, "name"),
    (apply_lora, stack, "modules_to_save ensure_weight_tying"),
    (save_adapter, adapted, "directory"),
    (load_adapter, stack, "directory"),
):
    for _name in _names.split():
        ARGUMENTS[f"{_function.__name__} {_name}"] = argument(_function, _name, _make)
ARGUMENTS["save_adapter name"] = argument(save_adapter, "name", directory="nowhere")
for _name in ("name", "impl", "adapter_dtype"):
    ARGUMENTS[f"load_adapter {_name}"] = argument(load_adapter, _name, stack, directory="nowhere")
for _name in ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern", "use_dora", "init"):
    ARGUMENTS[f"add_adapter {_name}"] = argument(add_adapter, _name, name="new")
ARGUMENTS["add_adapter use_rslora"] = argument(add_adapter, "use_rslora", name="new")
ARGUMENTS["add_adapter name"] = argument(add_adapter, "name")
ARGUMENTS["add_weighted_adapter name"] = argument(
    add_weighted_adapter, "name", weights={"default": 1.0}
)
for _name in ("lr", "lr_ratio", "weight_decay", "no_decay"):
    others = {} if _name == "lr" else {"lr": 1.0}
    ARGUMENTS[f"lora_param_groups {_name}"] = argument(lora_param_groups, _name, **others)
for _name in ("weights", "combination", "rank"):
    others = {"name": "new", "weights": {"default": 1.0}, "combination": "svd"}
    others.pop(_name, None)
    ARGUMENTS[f"add_weighted_adapter {_name}"] = argument(add_weighted_adapter, _name, **others)
for _name in ("tokens", "dropout_p", "impl"):
    ARGUMENTS[f"explain {_name}"] = argument(lambda m, **k: explain(m[0], **k), _name)
# Values of the list above that are right for these arguments.
RIGHT = {
    "rank": [3, None],
    "alpha": [3, -1.5],
    "lr": [3],
    "lr_ratio": [3],
    "weight_decay": [3],
    "no_decay": [{}, {"a": 1}, [], "", (), set()],
    "exclude_modules": [None, [], (), set()],
    "rank_pattern": [None, {}],
    "alpha_pattern": [None, {}],
    "adapter_dtype": [None, torch.half],
    "tokens": [3],
    "dropout_p": [None],
    "impl": [None],
    "use_rslora": [True],
    "use_dora": [True],
    "include_head": [True],
    "keep_base": [True],
    "merge": [True],
    "modules_to_save": [None, [], (), set()],
    "ensure_weight_tying": [True],
    "save_adapter name": [None],
    "load_adapter name": ["("],
    "add_adapter name": ["("],
    "add_weighted_adapter name": ["("],
}


@pytest.mark.filterwarnings("ignore:fused_lora")
@pytest.mark.parametrize("case", ARGUMENTS)
def test_every_argument_of_the_wrong_type_is_refused_in_words(case, tmp_path, monkeypatch):
    """peft#1206, "Target modules not found": the message should say what was expected and given."""
    monkeypatch.chdir(tmp_path)
    call, make = ARGUMENTS[case]
    model, name = make(), case.split()[1]
    before = snapshot(model)
    for value in WRONG:
        if any(
            value is right or (type(value) is type(right) and value == right and right != "")
            for right in RIGHT.get(case, RIGHT.get(name, []))
            if not isinstance(value, torch.Tensor)
        ):
            continue
        if name == "directory" and isinstance(value, str | Path) and str(value):
            continue
        with pytest.raises((TypeError, ValueError), match="expected") as caught:
            call(model, value)
        assert "fused_lora" in caught.traceback[-1].path.parts
        assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [*ON_A_MODEL, "patch_peft", "unpatch_peft"])
def test_what_is_no_model_is_refused_in_words(call, tmp_path):
    """peft#1206: as above, for the model itself."""
    function = ON_A_MODEL.get(call) or (lambda model, folder: getattr(fused_lora, call)(model))
    for value in (3, {}, [], "model", b"x", Path("x"), nn.Linear, torch.float16):
        with pytest.raises(TypeError, match="expected"):
            function(value, tmp_path)
    assert patch_peft().everywhere  # without a model: every model
    unpatch_peft()


def encoder(**changes):
    return nn.Sequential(nn.Embedding(5, 4), nn.Conv2d(1, 1, 1), nn.LayerNorm(4))


NOTHING = {
    "no such name": (llama, {"target_modules": ["qproj"]}, "match a module.*similar names: q_proj"),
    "a name as a pattern": (llama, {"target_modules": "q_proj"}, r"in a list: \['q_proj'\]"),
    "a block": (llama, {"target_modules": ["mlp"]}, "LlamaMLP; name layers inside it: down_proj"),
    "a norm": (llama, {"target_modules": ["norm"]}, "to be Linear.*LlamaRMSNorm"),
    "all excluded": (
        llama,
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "exclude_modules.*leaves out all",
    ),
    "all linears excluded": (llama, {"exclude_modules": ".*"}, "found none besides those left out"),
    "no linear layer": (encoder, {}, "found none; target_modules may name its other layers: 0, 1"),
    "no layer": (lambda: nn.Sequential(nn.ReLU()), {}, "nor another layer that can be adapted"),
    "none": (llama, {"target_modules": None}, "target_modules.*'all-linear', got None"),
}


@pytest.mark.filterwarnings("ignore:fused_lora")
@pytest.mark.parametrize("case", NOTHING)
def test_models_in_which_nothing_matches(case):
    """peft#1206, peft#1959: targets that are not in the model."""
    make, arguments, hint = NOTHING[case]
    model = make()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=hint):
        apply_lora(model, **arguments)
    assert_unchanged(model, before)


def test_an_adapter_of_layers_that_the_model_does_not_have(tmp_path):
    """peft#1206: which model the adapter was made for, and what the names should have been."""
    source = adapted(llama)
    source.config._name_or_path = "someone/their-model"
    save_adapter(source, tmp_path)
    with pytest.raises(
        ValueError, match=r"similar: layers\.0\.mlp\.down_proj.*made for someone/th"
    ):
        load_adapter(llama().model, tmp_path)
    with pytest.raises(ValueError, match=r"14 of the adapter's 14 layers; .*names such as 0"):
        load_adapter(stack(), tmp_path)
    with pytest.raises(FileNotFoundError, match="on the Hub must be downloaded first"):
        load_adapter(llama(), "someone/their-adapter")


NUMBERS = {
    "r": ([4.0, "4", True, None, [4]], "an integer"),
    "lora_alpha": (["16", True, None, {}], "a number"),
    "lora_dropout": (["0.1", None, False], "a number"),
    "rank_pattern": ([{"q_proj": 4.0}, {"q_proj": "4"}, {"q_proj": None}], "an integer"),
    "alpha_pattern": ([{"q_proj": "16"}, {"q_proj": True}], "a number"),
}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_the_wrong_type_in_a_file(key, tmp_path):
    """peft/tuners/lora/layer.py: PEFT divides lora_alpha by r and creates Linear(in, r)."""
    theirs = peft_wrapped()
    theirs.save_pretrained(tmp_path)
    values, kind = NUMBERS[key]
    saved = json.loads((tmp_path / CONFIG).read_text())
    for value in values:
        (tmp_path / CONFIG).write_text(json.dumps(saved | {key: value}))
        model = llama()
        before = snapshot(model)
        hint = rf"{key}.* to be {kind}, got .*\((float|str|bool|NoneType|list|dict)\)"
        with pytest.raises(ValueError, match=hint) as caught:
            load_adapter(model, tmp_path)
        assert (": PEFT refuses it too; write 4" in str(caught.value)) == ("4.0" in str(value))
        assert_unchanged(model, before)
        if isinstance(value, float | str):  # PEFT's own error, from within torch
            with pytest.raises(TypeError):
                peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("method", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig"])
def test_a_model_with_another_method_of_peft_is_refused(method):
    """Its own adapters would be frozen, and the file's keys have PEFT's wrapper in them."""
    options = {"feedforward_modules": []} if method == "IA3Config" else {}
    config = getattr(peft, method)(target_modules=["0"], **options)
    model = peft.get_peft_model(stack(), config)
    before = snapshot(model)
    with pytest.raises(ValueError, match="got PEFT's PeftModel"):
        apply_lora(model)
    assert_unchanged(model, before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_not_called_damaged(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").chmod(0)
    with pytest.raises(PermissionError, match="adapter_model"):
        load_adapter(stack(), tmp_path)
