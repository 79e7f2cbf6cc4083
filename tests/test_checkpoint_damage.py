"""Adapters on disk: damaged, hostile and foreign files, and saves that fail or are killed."""

import json
import os
import signal
import struct

import numpy as np
import pytest
import torch
from models import ALL, Tiny, assert_unchanged, snapshot, train_like
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import apply_lora, load_adapter, lora_layers, lora_parameters, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit_config(**changes):
    def edit(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change, metadata=None):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata)

    return edit


def write(name, content):
    def edit(folder):
        path = folder / name
        old = path.read_bytes()
        path.write_bytes(content(old) if callable(content) else content)

    return edit


def header(**changes):
    """The safetensors header with its first tensor's entry changed."""

    def edit(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + size])
        key = next(key for key in entries if key != "__metadata__")
        entries[key] |= changes
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]

    return write(WEIGHTS, edit)


def drop(key):
    return edit_tensors(lambda tensors: tensors.pop(f"base_model.model.{key}"))


def put(key, *shape, dtype=torch.float32):
    return edit_tensors(lambda tensors: tensors.update({key: torch.zeros(shape, dtype=dtype)}))


KEY = "base_model.model.hidden.lora_A.weight"
DAMAGES = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json, got no such file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "safetensors, got no such file"),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin is a pickle, which is not read",
    ),
    "empty weights": (write(WEIGHTS, b""), "safetensors: expected a safetensors file"),
    "truncated": (write(WEIGHTS, lambda raw: raw[:-10]), "safetensors: expected a safetensors"),
    "cut in the header": (write(WEIGHTS, lambda raw: raw[:40]), "expected a safetensors file"),
    "absurd header size": (
        write(WEIGHTS, lambda raw: struct.pack("<Q", 2**62) + raw[8:]),
        "expected a safetensors file, got a damaged one",
    ),
    "absurd shape": (header(shape=[2**40, 2**40]), "expected a safetensors file"),
    "absurd offsets": (header(data_offsets=[0, 2**62]), "expected a safetensors file"),
    "integers": (put(KEY, 2, 36, dtype=torch.int32), "hidden.lora_A.weight in a float dtype"),
    "odd floats": (header(dtype="F6_E2M3"), "expected"),
    "many patterns": (
        edit_config(rank_pattern={f"a{i}": 2 for i in range(10_001)}),
        "at most 10000 patterns in rank_pattern",
    ),
    "shared embeddings": (
        edit_config(ensure_weight_tying=True, target_modules=["embed_tokens"]),
        "ensure_weight_tying = True",
    ),
    "wrong rank": (put(KEY, 5, 36), r"hidden.lora_A.weight of shape \(2, 36\).*got \(5, 36\)"),
    "wrong width": (put(KEY, 2, 37), r"of shape \(2, 36\)"),
    "wrong dimensions": (put(KEY, 2), r"got \(2,\)"),
    "missing half": (drop("out.lora_B.weight"), "expected lora_B of out, got none"),
    "extra key": (put("base_model.model.out.weight_g", 3), "adapters only, got base_model.model"),
    "foreign prefix": (put("out.lora_A.weight", 2, 16), "adapters only, got out.lora_A.weight"),
    "unknown module": (
        put("base_model.model.other.lora_A.weight", 2, 3),
        "expected a module other in the model, got none",
    ),
    "changed base": (
        put("base_model.model.table.base_layer.weight", 20, 12),
        "base_layer.weight to be the model's own weight",
    ),
    "no tensors": (edit_tensors(dict.clear), "expected tensors of adapters, got none"),
    "magnitude unannounced": (
        put("base_model.model.out.lora_magnitude_vector", 5),
        "expected no base_model.model.out.lora_magnitude_vector",
    ),
    "not json": (write(CONFIG, b"{"), "adapter_config.json: expected JSON"),
    "not text": (write(CONFIG, b"\xff\xfe\x00"), "adapter_config.json: "),
    "deep json": (write(CONFIG, b"[" * 200_000), "adapter_config.json: expected JSON"),
    "a list": (write(CONFIG, b"[]"), "expected a JSON object, got a list"),
    "other type": (edit_config(peft_type="LOHA"), "peft_type 'LORA', got 'LOHA'"),
    "no type": (edit_config(peft_type=None), "peft_type 'LORA', got None"),
    "trained biases": (edit_config(bias="all"), "bias 'none', got 'all'"),
    "modules to save": (edit_config(modules_to_save=["out"]), "modules_to_save"),
    "lora bias": (edit_config(lora_bias=True), "lora_bias = True"),
    "a variant to come": (edit_config(use_newlora=True), "use_newlora = True"),
    "changing init": (edit_config(init_lora_weights="olora"), "changes the base weights"),
    "odd init": (edit_config(init_lora_weights={"a": []}), "init_lora_weights = "),
    "rank zero": (edit_config(r=0), "adapter_config.json: .*rank >= 1"),
    "rank large": (edit_config(r=2**30), "of shape"),
    "rank absurd": (edit_config(r=2**60), "adapter_config.json: .*rank <= 2147483647"),
    "rank text": (edit_config(r="4"), "expected r to be an integer, got '4'"),
    "rank true": (edit_config(r=True), "expected r to be an integer, got True"),
    "alpha infinite": (edit_config(lora_alpha=1e999), "lora_alpha to be a finite number"),
    "alpha absurd": (edit_config(lora_alpha=10**400), "lora_alpha to be a finite number"),
    "dropout": (edit_config(lora_dropout=1.5), r"dropout in \[0, 1\)"),
    "slow pattern": (edit_config(rank_pattern={"(a+)+$": 2}), "repeats, no group repeated"),
    "slow pattern of repeats": (edit_config(alpha_pattern={".*" * 9: 2}), "and 4 groups and"),
    "slow pattern of options": (edit_config(alpha_pattern={"o?u?t?o?u?t?": 2}), "and 4 groups and"),
    "slow pattern of groups": (edit_config(rank_pattern={"(o|.)" * 30: 2}), "and 4 groups and"),
    "deep pattern": (edit_config(rank_pattern={"(" * 9999 + ")" * 9999: 2}), "and 4 groups and"),
    "long pattern": (edit_config(rank_pattern={"a|" * 400: 2}), "at most 500 characters"),
    "bad pattern": (edit_config(rank_pattern={"(": 2}), "rank_pattern: expected a regular"),
    "pattern list": (edit_config(rank_pattern=[1]), "rank_pattern to be an object"),
    "no targets": (edit_config(target_modules=None), "target_modules as names or a pattern"),
    "other targets": (edit_config(target_modules=["q_proj"]), "do not belong together"),
    "dora asked": (edit_config(use_dora=True), "linear layer for use_dora"),
    "dora text": (edit_config(use_dora="yes"), "use_dora to be true or false"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("state", ["plain", "adapted"])
def test_damage_is_told_and_the_model_unchanged(damage, state, tmp_path):
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    save_adapter(train_like(model), tmp_path)
    edit_tensors(lambda tensors: None)(tmp_path)  # as PEFT writes it, without the digest
    edit, hint = DAMAGES[damage]
    edit(tmp_path)
    target = model if state == "adapted" else Tiny()
    before = snapshot(target)
    expected = FileNotFoundError if "no such file" in hint or "pickle" in hint else ValueError
    with pytest.raises(expected, match=hint) as caught:
        load_adapter(target, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_unchanged(target, before)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 17}, {"use_rslora": True}, {"alpha_pattern": {"out": 3}}], ids=str
)
def test_an_edited_pair_does_not_match(change, tmp_path):
    """A config whose edit changes what the tensors mean is refused; other edits are not."""
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    save_adapter(model, tmp_path)
    edit_config(base_model_name_or_path="x", lora_dropout=0.1, inference_mode=False)(tmp_path)
    load_adapter(Tiny(), tmp_path)  # settings that do not affect the tensors may change
    edit_config(**change)(tmp_path)
    with pytest.raises(ValueError, match=r"expected the adapter_config\.json it was saved with"):
        load_adapter(Tiny(), tmp_path)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: squares(("a", 8), ("b", 9)), "expected a module c in the model, got none"),
        (lambda: squares(("a", 8), ("b", 8), ("c", 8)), r"of shape \(2, 8\).*got \(2, 9\)"),
        (lambda: nn.ModuleDict({n: nn.ReLU() for n in "abc"}), "a to be a layer"),
    ],
)
def test_an_adapter_of_another_model(make, hint, tmp_path):
    source = squares(("a", 8), ("b", 9), ("c", 8))
    apply_lora(source, rank=2)
    save_adapter(source, tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=hint):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def squares(*sizes) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(size, size) for name, size in sizes})


@pytest.mark.parametrize(
    ("arguments", "name", "error", "hint"),
    [
        ({"rank": 4}, "default", ValueError, "in the shape that adapter 'default' has"),
        ({"use_dora": True, "rank": 2}, "default", ValueError, "lora_magnitude_vector of a"),
        ({"rank": 2}, "default", ValueError, "for every adapted layer, got none for a"),
        (
            {"rank": 2, "target_modules": ["a"]},
            "default",
            ValueError,
            "adapted layers only, got adapters for b",
        ),
        ({"init": "pissa", "rank": 2}, "default", ValueError, "init_lora_weights as the model's"),
        ({"init": "pissa", "rank": 2}, "other", ValueError, "PiSSA model has one adapter"),
        ({"rank": 2}, "", ValueError, "got ''"),
    ],
)
def test_an_adapted_model_that_does_not_fit(arguments, name, error, hint, tmp_path):
    source, model = squares(("a", 8), ("b", 9)), squares(("a", 8), ("b", 9))
    apply_lora(source, rank=2, target_modules=["b"] if hint.endswith("none for a") else ["a", "b"])
    save_adapter(source, tmp_path)
    apply_lora(model, **arguments)
    before = snapshot(model)
    with pytest.raises(error, match=hint):
        load_adapter(model, tmp_path, name)
    assert_unchanged(model, before)


def killed_child(task) -> int:
    """Run ``task`` in a forked child that may be killed; returns its wait status."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        try:
            task()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return status


def outcome(folder) -> str:
    """Which adapter the folder holds, by its values: "old", "new", or "mismatch" of its files."""
    model = squares(("a", 8), ("b", 9))
    try:
        load_adapter(model, folder)
    except ValueError as error:
        return "mismatch" if "expected the adapter_config.json it was" in str(error) else str(error)
    values = {p.mean().item() for p in lora_parameters(model)}
    assert values in ({1.0}, {2.0})
    alphas = {layer.alpha for layer in lora_layers(model).values()}
    assert alphas == ({4.0} if values == {1.0} else {6.0})
    return "old" if values == {1.0} else "new"


def filled(value: float, alpha: float) -> nn.Module:
    model = squares(("a", 8), ("b", 9))
    apply_lora(model, rank=2, alpha=alpha)
    for p in lora_parameters(model):
        nn.init.constant_(p, value)
    return model


def test_a_save_that_fails_before_writing_keeps_the_old_pair(tmp_path):
    save_adapter(filled(1.0, 4), tmp_path)
    model = filled(2.0, 6)
    nn.utils.parametrizations.weight_norm(model["a"], "lora_A")
    with pytest.raises(RuntimeError, match="expected lora_A to be a Parameter"):
        save_adapter(model, tmp_path)
    assert outcome(tmp_path) == "old"
    numbers = squares(("a", 8), ("b", 9))
    apply_lora(numbers, rank=np.int64(2), alpha=np.float32(4), dropout=np.float32(0.1))
    numbers.config = type("Config", (), {"_name_or_path": tmp_path})()
    save_adapter(numbers, tmp_path)
    load_adapter(squares(("a", 8), ("b", 9)), tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_several_processes_may_save_at_once(tmp_path):
    models = [filled(1.0, 4), filled(2.0, 6)]
    children = []
    for model in models:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(30):
                    save_adapter(model, tmp_path)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    assert outcome(tmp_path) in ("old", "new", "mismatch")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_every_step_of_a_save(tmp_path):
    old, new = filled(1.0, 4), filled(2.0, 6)
    seen = []
    for stop in range(100):
        folder = tmp_path / str(stop)
        save_adapter(old, folder)
        steps = iter(range(1000))

        def dying(function, steps=steps, stop=stop):
            def call(*args, **kwargs):
                if next(steps) == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **kwargs)
                if next(steps) == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        def task(folder=folder, dying=dying):
            os.fsync, os.replace = dying(os.fsync), dying(os.replace)
            save_adapter(new, folder)

        status = killed_child(task)
        seen.append(outcome(folder))
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert len(seen) == 2 * (2 + 4) + 1  # before and after 2 replaces and 4 fsyncs; not killed
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert set(seen) == {"old", "mismatch", "new"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_in_the_middle_of_a_write(tmp_path):
    resource = pytest.importorskip("resource")
    old, new = filled(1.0, 4), filled(2.0, 6)
    save_adapter(old, tmp_path / "whole")
    size = (tmp_path / "whole" / WEIGHTS).stat().st_size
    for limit in (0, 1, 100, size // 2, size - 1):
        folder = tmp_path / str(limit)
        save_adapter(old, folder)

        def task(folder=folder, limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save_adapter(new, folder)

        assert killed_child(task) & 0x7F == signal.SIGXFSZ
        assert outcome(folder) == "old"
        save_adapter(new, folder)  # despite the files that the killed save left
        assert outcome(folder) == "new"
        rest = set(os.listdir(folder)) - {CONFIG, WEIGHTS}
        assert all(name.startswith(".adapter_") and name.endswith(".tmp") for name in rest)


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    save_adapter(filled(1.0, 4), tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(filled(2.0, 6), tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    assert outcome(tmp_path) == "old"
