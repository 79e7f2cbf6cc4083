"""Reports about modules that train whole and about nested layers; right values or a refusal."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import fused_lora as fl


class Scaled(nn.Linear):
    """A special linear: it keeps its own forward, with the adapter beside it."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Nested(Scaled):
    """A special linear with a linear within."""

    def __init__(self):
        super().__init__(8, 8)
        self.extra = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(x) + self.extra(x)


def _randomise(model):
    with torch.no_grad():
        for parameter in fl.lora_parameters(model):
            parameter.normal_(std=0.1)


def _trained(seed=0):
    """A model whose BatchNorm, in modules_to_save, has trained values; and a plain copy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    plain = copy.deepcopy(model).eval()
    fl.apply_lora(model, target_modules=["0"], modules_to_save=["1", "2"])
    _randomise(model)
    model(torch.randn(16, 8) * 5 + 3)  # new running statistics
    with torch.no_grad():
        model[1].weight.add_(1)
        model[2].weight.add_(1)
    return model.eval(), plain


def _names_and_values(model):
    aside = [vars(m)["_lora_aside"] for m in model.modules() if "_lora_aside" in vars(m)]
    kept = [{k: dict(v) for k, v in {"": a.base, **a.inactive}.items()} for a in aside]
    state = {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta}
    return fl.adapter_names(model), copy.deepcopy(kept), state


def _assert_same(one, other):
    assert one[0] == other[0]
    assert str(one[1]) == str(other[1])
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=0)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("doing", ["disable", "set", "unload", "weighted", "load", "load_new"])
def test_offloaded_copies_are_not_exchanged_silently(doing, buffers, tmp_path):
    # peft#1431: adapters of models with offloaded modules need the modules' own values.
    accelerate = pytest.importorskip("accelerate")
    model, plain = _trained()
    x = torch.randn(4, 8)
    y = model(x)
    fl.save_adapter(model, tmp_path)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
    fl.add_adapter(model, "other")  # needs the originals only
    before = _names_and_values(model)

    def do():
        if doing == "disable":
            with fl.disable_lora(model):
                return model(x)
        elif doing == "set":
            fl.set_adapter(model, "other")
        elif doing == "unload":
            fl.unload_lora(model, merge=False)
        elif doing == "weighted":
            fl.add_weighted_adapter(model, "sum", {"default": 1.0})
        else:
            fl.load_adapter(model, tmp_path, "default" if doing == "load" else "new")
        return model(x)

    with pytest.raises(ValueError, match=r"remove_hook_from_module\(model, recurse=True\)"):
        do()
    _assert_same(_names_and_values(model), before)
    torch.testing.assert_close(model(x), y)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # the cure
    right = plain(x) if doing in ("disable", "set", "unload") else y
    torch.testing.assert_close(do(), right)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_copies_are_saved(kind, tmp_path):
    # peft#1431
    accelerate = pytest.importorskip("accelerate")
    model, plain = _trained()
    x = torch.randn(4, 8)
    y = model(x)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path / "disk", execution_device="cpu")
    fl.save_adapter(model, tmp_path)
    fl.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), y)
    fl.unload_lora(model)  # keeps the trained values
    torch.testing.assert_close(model(x), y)


def _resize(embedding, rows):
    embedding.weight = nn.Parameter(torch.randn(rows, embedding.embedding_dim))
    embedding.num_embeddings = rows


@pytest.mark.parametrize("doing", ["add", "set", "load_new", "load_inactive", "weighted"])
def test_resized_copies_are_refused_before_anything_changes(doing, tmp_path):
    # peft#1300: a resized embedding in modules_to_save does not fit the adapter's.
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    fl.apply_lora(model, target_modules=["1"], modules_to_save=["0", "2"])
    fl.add_adapter(model, "old")
    _randomise(model)
    _resize(model[0], 20)
    fl.save_adapter(model, tmp_path)
    before = _names_and_values(model)
    do = {
        "add": lambda: fl.add_adapter(model, "new"),
        "set": lambda: fl.set_adapter(model, "old"),
        "load_new": lambda: fl.load_adapter(model, tmp_path, "new"),
        "load_inactive": lambda: fl.load_adapter(model, tmp_path, "old"),
        "weighted": lambda: fl.add_weighted_adapter(model, "new", {"old": 1.0}),
    }[doing]
    with pytest.raises(ValueError, match="resize the model before apply_lora"):
        do()
    _assert_same(_names_and_values(model), before)
    assert fl.load_adapter(model, tmp_path) == ["1"]  # the active one still fits


def test_a_parametrized_copy_is_refused_before_an_adapter_is_added():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fl.apply_lora(model, target_modules=["0"], modules_to_save=["1"])
    nn.utils.parametrizations.weight_norm(model[1])
    for add in (
        lambda: fl.add_adapter(model, "new"),
        lambda: fl.add_weighted_adapter(model, "new", {"default": 1.0}),
    ):
        with pytest.raises(RuntimeError, match="before apply_lora"):
            add()
        assert fl.adapter_names(model) == ["default"]


def test_names_in_files_leave_out_the_base_layer(tmp_path):
    # peft#3110: layers must have the same names however their adapters came about.
    model, plain = (
        nn.Sequential(Nested(), nn.Linear(8, 8)),
        nn.Sequential(Nested(), nn.Linear(8, 8)),
    )
    plain.load_state_dict(model.state_dict())
    other = copy.deepcopy(plain)
    names = fl.apply_lora(model)
    assert names == ["0", "0.extra", "1"]
    _randomise(model)
    x = torch.randn(3, 8)
    y = model(x)
    fl.save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[0] for key in keys} == {f"base_model.model.{n}" for n in names}
    assert sorted(fl.load_adapter(plain, tmp_path)) == names  # unadapted
    torch.testing.assert_close(plain(x), y)
    fl.apply_lora(other)
    assert sorted(fl.load_adapter(other, tmp_path)) == names  # adapted
    torch.testing.assert_close(other(x), y)
    _randomise(other)
    fl.load_adapter(other, tmp_path, "second")  # a new inactive one
    fl.set_adapter(other, "second")
    torch.testing.assert_close(other(x), y)


def test_a_model_may_itself_name_a_module_base_layer(tmp_path):
    # peft#2773: names that also occur in the adapters' own structure.
    def make():
        return nn.ModuleDict({"base_layer": nn.ModuleDict({"base_layer": Scaled(8, 8)})})

    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    assert fl.apply_lora(model) == ["base_layer.base_layer"]
    _randomise(model)
    fl.save_adapter(model, tmp_path)
    assert fl.load_adapter(plain, tmp_path) == ["base_layer.base_layer"]
    x = torch.randn(3, 8)
    layers = [m["base_layer"]["base_layer"] for m in (model, plain)]
    torch.testing.assert_close(layers[0](x), layers[1](x))
    assert fl.load_adapter(plain, tmp_path, "second") == ["base_layer.base_layer"]


@pytest.mark.parametrize("name", ["layer", "r", "base_layer"])
def test_suffixes_do_not_match_the_base_layer(name, tmp_path):
    # peft#3755: modules_to_save matches the ends of names within adapted layers.
    def make():
        return nn.ModuleDict({"a": Scaled(8, 8), name: nn.Linear(8, 8)})

    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    fl.apply_lora(model, target_modules=["a"], modules_to_save=[name])
    _randomise(model)
    with torch.no_grad():
        model[name].weight.add_(1)
    fl.save_adapter(model, tmp_path)
    for _ in range(2):  # into an unadapted, then into an adapted model
        assert fl.load_adapter(plain, tmp_path) == ["a"]
        torch.testing.assert_close(plain[name].weight, model[name].weight)
        x = torch.randn(3, 8)
        torch.testing.assert_close(plain["a"](x), model["a"](x))


def test_tensors_of_the_base_in_a_file_are_compared_beside_too(tmp_path):
    # peft#2290: files may also hold the base's embeddings, under ``base_layer``.
    from safetensors.torch import save_file

    model = nn.Sequential(Scaled(8, 8))
    fl.apply_lora(model)
    fl.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.0.base_layer.weight"
    save_file({**tensors, key: model[0].weight.detach().clone()}, path)
    assert fl.load_adapter(model, tmp_path) == ["0"]
    save_file({**tensors, key: model[0].weight.detach() + 1}, path)
    with pytest.raises(ValueError, match="to be the model's own weight"):
        fl.load_adapter(model, tmp_path)
