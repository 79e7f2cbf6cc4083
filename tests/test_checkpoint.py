"""Adapters on disk: PEFT's format, saved and loaded, and adapters swapped on one base."""

import copy
import json
import os
import warnings
from functools import partial

import pytest
import torch
from models import ALL, Tiny, assert_unchanged, gpt2, llama, snapshot, tokens, train_like
from safetensors.torch import load_file
from torch import nn

from fused_lora import (
    FusedLoRAConv1D,
    LoRAEmbedding,
    adapter_names,
    add_adapter,
    apply_lora,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_adapter,
)
from support import UNIT_ROUNDOFF, relative_rms

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

LINEARS = {"target_modules": "all-linear"}
CASES = {
    "gpt2-conv1d-embedding": (gpt2, {"target_modules": ["c_attn", "c_fc", "wte", "wpe"]}),
    "gpt2-head": (gpt2, LINEARS | {"include_head": True}),
    "llama-linear": (llama, LINEARS),
    "llama-embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama-regex": (llama, {"target_modules": r".*layers\.1\..*_proj"}),
    "llama-dora": (llama, LINEARS | {"use_dora": True}),
    "gpt2-dora": (gpt2, LINEARS | {"use_dora": True}),
    "llama-pissa": (llama, LINEARS | {"init": "pissa"}),
    "gpt2-pissa": (gpt2, LINEARS | {"init": "pissa"}),
    "gpt2-orthogonal": (gpt2, LINEARS | {"init": "orthogonal"}),
    "llama-patterns": (
        llama,
        LINEARS
        | {"rank_pattern": {r"0\..*q_proj": 3}, "alpha_pattern": {"up_proj": 5, "down_proj": 0.5}}
        | {"use_rslora": True, "dropout": 0.1},
    ),
}


def adapted(make, arguments, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """A base model, and the same one adapted and trained."""
    base = make().to(dtype)
    model = copy.deepcopy(base)
    apply_lora(model, rank=4, **arguments)
    return base, train_like(model.eval())


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of Conv1D, tied and saved embeddings
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_saved_here_loaded_in_peft_and_back(case, dtype, tmp_path, quiet):
    peft = pytest.importorskip("peft")
    base, model = adapted(*CASES[case], dtype)
    ids = tokens()
    expected = model(ids).logits
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    exact = copy.deepcopy(model).double()(ids).logits
    loss, unit = relative_rms(expected, exact), UNIT_ROUNDOFF[dtype]
    assert loss <= 2 * relative_rms(theirs(ids).logits, exact) + unit
    assert relative_rms(theirs(ids).logits, exact) <= 2 * loss + unit
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["fan_in_fan_out"] == case.startswith("gpt2")
    files = [load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs")]
    # PEFT also saves the base weights of adapted embeddings.
    kept = {key: t for key, t in files[1].items() if "base_layer" not in key}
    assert files[0].keys() == kept.keys()
    assert all(torch.equal(files[0][key], kept[key]) for key in kept)
    again = copy.deepcopy(base)
    names = load_adapter(again, tmp_path / "theirs")
    assert sorted(names) == sorted(lora_layers(model))
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize(
    ("name", "error", "hint"), [("", ValueError, "got ''"), (3, TypeError, "a str, got int")]
)
@pytest.mark.parametrize("state", ["plain", "adapted"])
def test_a_name_that_is_none(state, name, error, hint, tmp_path):
    """An adapter's name is a string that is not empty; any other leaves the model unchanged."""
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    save_adapter(model, tmp_path)
    target = model if state == "adapted" else Tiny()
    before = snapshot(target)
    with pytest.raises(error, match=hint):
        load_adapter(target, tmp_path, name)
    assert_unchanged(target, before)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
def test_trained_in_peft_loaded_here(init, tmp_path, quiet):
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_proj"] if init == "orthogonal" else ["c_attn", "c_proj", "wte"]
    base, ids = gpt2(), tokens()
    config = peft.LoraConfig(target_modules=targets, r=6, lora_alpha=9, init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).train()
    optimizer = torch.optim.Adam((p for p in theirs.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        theirs(ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    layer = ours.transformer.h[0].attn.c_attn
    assert isinstance(layer, FusedLoRAConv1D)
    assert (layer.rank, layer.scaling) == (6, 1.5)
    if "wte" in targets:
        assert isinstance(ours.transformer.wte, LoRAEmbedding)


def test_convolutions_and_endings_that_collide(tmp_path, quiet):
    peft = pytest.importorskip("peft")
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3))
    base = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), inner)
    model, x = copy.deepcopy(base), torch.randn(2, 3, 8, 8)
    apply_lora(model, rank=2, target_modules=r"0|1\.1")  # "0" is an ending of "1.0" too
    train_like(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == r"0|1\.1"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_the_files_are_plain_and_small(tmp_path):
    _, model = adapted(llama, LINEARS)
    save_adapter(model, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    adapters = sum(p.numel() for p in lora_parameters(model)) * 4
    assert adapters < (folder / WEIGHTS).stat().st_size < adapters + 10_000


def test_one_base_many_adapters(tmp_path, capsys):
    """Tutorials promise adapters a fraction of the base's size, swapped on one base."""
    base, ids = gpt2(n_embd=256, n_layer=4), tokens()
    outputs = []
    for number in range(3):
        model = copy.deepcopy(base)
        apply_lora(model, rank=4)
        outputs.append(train_like(model)(ids).logits)
        save_adapter(model, tmp_path / str(number))
    base_bytes = sum(p.numel() for p in base.parameters()) * 4
    sizes = [(tmp_path / str(n) / WEIGHTS).stat().st_size for n in range(3)]
    with capsys.disabled():
        in_mb = ", ".join(f"{size / 1e6:.2f}" for size in sizes)
        print(f"\nbase {base_bytes / 1e6:.1f} MB; adapters {in_mb} MB")
    assert all(size < base_bytes / 15 for size in sizes)
    model = copy.deepcopy(base)
    for number in range(3):
        load_adapter(model, tmp_path / str(number), f"task{number}")
    assert adapter_names(model) == ["task0", "task1", "task2"]
    for number in (1, 0, 2, 1):
        set_adapter(model, f"task{number}")
        assert torch.equal(model(ids).logits, outputs[number])


def test_hot_swap_keeps_the_optimizers_parameters(tmp_path):
    _, model = adapted(llama, LINEARS)
    other, ids = copy.deepcopy(model), tokens()
    train_like(other)
    for layer in lora_layers(other).values():
        layer.scaling = 0.7
    save_adapter(other, tmp_path)
    before = [(p, p.data_ptr()) for p in lora_parameters(model)]
    load_adapter(model, tmp_path)
    after = [(p, p.data_ptr()) for p in lora_parameters(model)]
    assert all(p is q and at == was for (p, at), (q, was) in zip(after, before, strict=True))
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    add_adapter(model, "aside", rank=4)
    load_adapter(model, tmp_path, "aside")
    load_adapter(model, tmp_path)
    assert adapter_names(model) == ["default", "aside"]
    train_like(model)
    set_adapter(model, "aside")
    torch.testing.assert_close(model(ids).logits, other(ids).logits)


def test_saves_a_named_adapter_and_refuses_an_unknown_one(tmp_path):
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    add_adapter(model, "b", rank=3)
    save_adapter(model, tmp_path, "b")
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 3
    with pytest.raises(ValueError, match="adapters default, b, got 'c'"):
        save_adapter(model, tmp_path, "c")
    with pytest.raises(ValueError, match="a model with adapters, got a Tiny without"):
        save_adapter(Tiny(), tmp_path)


def test_merged_models_save_and_do_not_load(tmp_path):
    base, model = adapted(llama, LINEARS)
    on = model(tokens(1, 3)).logits.shape
    merge_lora(model)
    save_adapter(model, tmp_path)
    with pytest.raises(RuntimeError, match="unmerge_lora first"):
        load_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path)
    ids = tokens()
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert on == (1, 3, 100)


def test_different_dropouts_warn(tmp_path):
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    model.out.dropout = 0.5
    with pytest.warns(UserWarning, match="different dropouts"):
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.0


def compiled_inside(model: nn.Module) -> nn.Module:
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = torch.compile(layer, backend="eager")
    return model


def checkpointed_inside(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(layer)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(partial(torch.compile, backend="eager"), id="compile"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        compiled_inside,
        checkpointed_inside,
    ],
)
def test_wrappers_are_looked_through(wrap, tmp_path, quiet):
    peft = pytest.importorskip("peft")
    base, model = adapted(llama, LINEARS)
    ids = tokens()
    on, off = model(ids).logits, base(ids).logits
    save_adapter(wrap(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, on)
    assert (on - off).abs().max() > 0.01
    ours = wrap(copy.deepcopy(base))
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, on)


def test_a_module_in_two_places_warns_of_peft(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    apply_lora(model)
    with pytest.warns(
        UserWarning, match="one module has the names a, b;.*in PEFT only under the first"
    ):
        save_adapter(model, tmp_path)


def test_what_cannot_hold_an_adapter_is_refused(tmp_path):
    source = nn.Sequential(nn.Linear(8, 8))
    apply_lora(source)
    save_adapter(source, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="got 0 on the meta device"):
        load_adapter(empty, tmp_path)
    for call in (
        lambda: load_adapter(nn.Linear(8, 8), tmp_path),
        lambda: save_adapter(source[0], "x"),
    ):
        with pytest.raises(ValueError, match="a model that contains layers"):
            call()
    for arguments in ({"impl": "cuda"}, {"adapter_dtype": torch.int8}):
        with pytest.raises((ValueError, TypeError), match=r"expected (impl|adapter_dtype)"):
            load_adapter(source, tmp_path, **arguments)
    model = nn.Sequential(nn.Linear(8, 8))
    load_adapter(model, tmp_path, impl="reference", adapter_dtype=torch.float64)
    assert (model[0].impl, model[0].lora_A.dtype) == ("reference", torch.float64)


def test_an_embeddings_own_weight_may_come_in_another_dtype(tmp_path, quiet):
    peft = pytest.importorskip("peft")
    base = llama().bfloat16()
    config = peft.LoraConfig(target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    assert load_adapter(base.float(), tmp_path) == ["model.embed_tokens"]
