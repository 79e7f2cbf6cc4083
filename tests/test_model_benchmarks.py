"""Whole-model benchmarks: wrong results are refused, memory is counted, both scripts run."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import adapter_batch
import adapter_latency
import model_step
import segments
import shared_input
from harness.timing import Quartiles
from layer import memory
from layer.problem import WrongResultError
from support import by_default
from whole_model import loss_curves, process_memory, step_picture, trainers
from whole_model.trainers import Setting, Trainer

MODELS = pytest.mark.parametrize("model", trainers.MODELS)


@pytest.mark.parametrize(
    ("model", "parameters", "layers"),
    [("gpt2", 124_439_808, 48), ("smollm2-135m", 134_515_008, 210)],
)
def test_a_model_has_the_published_size(model, parameters, layers):
    with torch.device("meta"):
        made = trainers.MODELS[model](False)
        assert sum(p.numel() for p in made.parameters()) == parameters
        assert len(trainers.adapters(trainers.with_ours(made, 0.0))) == layers


@MODELS
def test_everyone_starts_from_the_same_adapters(model):
    setting = Setting(model, tiny=True)
    base = trainers.base_model(setting)
    made = {
        name: trainers.adapters(Trainer(copy.deepcopy(base), name, setting).model)
        for name in trainers.PROVIDERS
    }
    dtypes = {name: {p.dtype for pair in pairs for p in pair} for name, pairs in made.items()}
    assert dtypes.pop("peft-bf16") == {torch.bfloat16}
    assert all(found == {torch.float32} for found in dtypes.values())
    for name, pairs in made.items():
        for mine, theirs in zip(pairs, made["peft"], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert a.float().equal(b), name
                assert b.any()


CURVES = [*((model, "bfloat16") for model in trainers.MODELS), ("gpt2", "float32")]


@pytest.mark.parametrize(
    "case", by_default([CURVES[0], CURVES[-1]], CURVES), ids=lambda case: "-".join(case)
)
def test_loss_curves_agree(case):
    model, dtype = case
    setting = Setting(model, dtype, tiny=True)
    base = trainers.base_model(setting)
    found = loss_curves.check(base, setting, trainers.providers(dtype))
    assert {len(curve) for curve in found.losses.values()} == {20}
    assert found.wider[0] - found.wider[-1] > 10 * found.tolerance  # something is learnt
    if dtype == "float32":
        assert found.tolerance < 1e-5


# For peft-bf16 only the first loss is compared, and a wrong scale changes it little.
@pytest.mark.parametrize(
    ("model", "provider", "factor"),
    [
        ("gpt2", "fused", 1.5),
        ("smollm2-135m", "peft-bf16", 3.0),
        ("llama-1b-layer", "fused", 1.5),
    ],
)
def test_a_wrong_scale_is_refused(model, provider, factor, monkeypatch):
    right = trainers.PROVIDERS[provider]

    def wrong(*args):
        with monkeypatch.context() as patch:
            patch.setattr(trainers, "ALPHA", factor * trainers.ALPHA)
            return right(*args)

    monkeypatch.setitem(trainers.PROVIDERS, provider, wrong)
    setting = Setting(model, tiny=True)
    base = trainers.base_model(setting)
    with pytest.raises(WrongResultError, match=f"expected {provider}'s losses within"):
        loss_curves.check(base, setting, ["peft", provider])


def test_memory_of_a_step_and_of_its_process():
    setting = Setting("smollm2-135m", dropout=0.1, tiny=True)
    base = trainers.base_model(setting)
    steps, held = {}, {}
    for name in trainers.PROVIDERS:
        trainer = Trainer(copy.deepcopy(base), name, setting)
        before = trainer.held_bytes
        trainer.step()
        held[name] = trainer.held_bytes
        trained = [p for pair in trainers.adapters(trainer.model) for p in pair]
        adapters = sum(p.nbytes for p in trained)
        frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
        assert before == adapters + sum(t.nbytes for t in (*frozen, *trainer.model.buffers()))
        # AdamW's two moments, and a count of steps in float32.
        assert held[name] - before == 2 * adapters + 4 * len(trained)
        steps[name] = memory.peak_of(trainer.step, trainer.device)
        assert steps[name] > adapters  # at least its gradients
    assert held["peft-bf16"] < held["peft"] == held["peft-patched"]
    assert steps["fused"] == steps["peft-patched"] < steps["peft-bf16"] < steps["peft"]


@pytest.mark.skipif(not process_memory.STATUS.is_file(), reason="without /proc")
def test_a_process_holds_the_model_it_trains():
    found = process_memory.resident(Setting("gpt2", tiny=True), "fused")
    assert 50e6 < found.built < found.peak


def test_model_step(tmp_path, capsys):
    assert model_step.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "gpt2 (tiny), bfloat16, dropout 0.1: 4 x 32 tokens, rank 16, 2 rounds" in out
    (path,) = tmp_path.glob("*.json")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".txt", ".png", ".svg"}
    data = json.loads(path.read_text())
    rows = [(row["setting"]["model"], row["setting"]["dropout"]) for row in data["rows"]]
    assert rows == [(model, p) for model in model_step.MODELS for p in (0.0, 0.1)]
    for row in data["rows"]:
        assert list(row["results"]) == list(trainers.PROVIDERS)
        assert row["results"]["peft"]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        for name, result in row["results"].items():
            line = re.search(rf"^{name} .*{result['ratio']['median']:.2f} ", out, re.MULTILINE)
            assert line, name
            parts = sum(part["q1"] for part in result["parts"].values())
            assert 0 < parts <= result["seconds"]["q3"]
    assert [len(found["errors"]) for found in data["checks"]] == [5, 5]


def test_a_process_is_measured_for_every_provider_of_a_whole_model(monkeypatch):
    asked = []

    def resident(setting, provider):
        asked.append(provider)
        return process_memory.Resident(500_000_000, 700_000_000)

    monkeypatch.setattr(model_step, "resident", resident)
    base = trainers.base_model(Setting("gpt2", tiny=True))
    row = model_step.measure(base, Setting("gpt2"), ["peft", "fused"], rounds=1)
    assert asked == ["peft", "fused"]
    about = model_step.machine.describe("cpu")
    assert model_step.render([], [row], about, 1).count("700 (200)") == 2


def test_model_step_in_float32_has_one_kind_of_peft(tmp_path):
    options = ["--quick", "--models", "gpt2", "--rounds", "1", "--dtype", "float32"]
    assert model_step.main([*options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["rows"][0]["results"]
    assert list(results) == ["peft", "fused", "fused-alone", "peft-patched"]


def test_model_step_is_not_in_what_the_cpu_emulates_unless_asked(monkeypatch):
    def dtype(*options):
        return model_step.parse(["--device", "cpu", *options]).dtype

    monkeypatch.setattr(model_step.machine, "emulated", lambda device: ["bfloat16"])
    assert dtype() == "float32"
    assert dtype("--dtype", "bfloat16") == dtype("--quick") == "bfloat16"
    monkeypatch.setattr(model_step.machine, "emulated", lambda device: [])
    assert dtype() == "bfloat16"


def test_model_step_times_nobody_who_learns_otherwise(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        trainers.PROVIDERS, "fused", lambda model, p: trainers.with_ours(model, 0.5)
    )
    monkeypatch.setattr(model_step, "measure", pytest.fail)
    assert model_step.main(["--quick", "--models", "gpt2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: gpt2, bfloat16: expected fused's losses within")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_latency(tmp_path, capsys, dtype):
    options = ["--quick", "--rounds", "2", "--depths", "3,1", "--dtype", dtype]
    assert adapter_latency.main([*options, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("LoRA, merged: at 3 layers ") == 2
    (path,) = tmp_path.glob("*.json")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".txt", ".png", ".svg"}
    points = json.loads(path.read_text())["points"]
    assert [(p["tokens"], p["depth"]) for p in points] == [(1, 1), (1, 3), (128, 1), (128, 3)]
    for point in points:
        assert list(point["extra"]) == list(adapter_latency.VARIANTS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(["LoRA, merged"], "expected LoRA, merged within", id="not merged"),
        pytest.param(["LoRA, unloaded"], "expected LoRA, unloaded within", id="unloaded without"),
        pytest.param(
            [name for name in adapter_latency.VARIANTS if "LoRA" in name],
            "expected a LoRA that changes",
            id="no LoRA",
        ),
        pytest.param(["bottleneck"], "expected bottlenecks that change", id="no bottleneck"),
    ],
)
def test_adapter_latency_checks_its_models(wrong, message):
    models = adapter_latency.stacks(2, "cpu", torch.float32, tiny=True)
    x = torch.randn(1, 5, models[adapter_latency.PLAIN].width)
    adapter_latency.check(models, x)
    models |= dict.fromkeys(wrong, models[adapter_latency.PLAIN])
    with pytest.raises(WrongResultError, match=message):
        adapter_latency.check(models, x)


@pytest.mark.parametrize(
    ("script", "options"),
    [(adapter_batch, ()), (segments, ()), (shared_input, ("--modules", "qkv"))],
    ids=["adapter_batch", "segments", "shared_input"],
)
def test_calls_together(script, options, tmp_path, capsys):
    chosen = ["--quick", "--seconds", "0.1", "--dtypes", "float32", "--out", str(tmp_path)]
    assert script.main([*chosen, *options]) == 0
    out = capsys.readouterr().out
    assert "limits are met" in out
    (text,) = tmp_path.glob("*.txt")
    (data,) = tmp_path.glob("*.json")
    assert text.read_text() in out
    assert json.loads(data.read_text())["rows"]


@pytest.mark.parametrize("script", [adapter_batch, segments, shared_input])
def test_calls_that_disagree_are_not_timed(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "TOLERANCE", {"float32": -1.0, "bfloat16": -1.0})
    options = ["--quick", "--dtypes", "float32", "--out", str(tmp_path)]
    assert script.main(options) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_depth_is_that_many_layers():
    stack = adapter_latency.Stack(3, tiny=True)
    calls = []
    for index, layer in enumerate(stack.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    stack.use(2)
    stack(torch.randn(1, 1, stack.width))
    assert calls == [0, 1]


@pytest.mark.parametrize(
    ("q1", "q3", "found"),
    [
        (1e-3, 3e-3, "adds latency, 0.500 ms a layer"),
        (-1e-3, 3e-3, "adds none that is told from the spread"),
        (-5e-3, -1e-3, "is faster, 0.750 ms a layer"),
    ],
)
def test_the_verdict_is_the_quartiles(q1, q3, found):
    extra = {"LoRA, merged": Quartiles((q1 + q3) / 2, q1, q3)}
    point = adapter_latency.Point(4, 1, {}, extra)
    assert adapter_latency.verdict(point, "LoRA, merged") == f"LoRA, merged: at 4 layers {found}"


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (model_step, ["--rounds", "0"], "expected a positive whole number, got 0"),
        (model_step, ["--device", "abacus"], "invalid choice: 'abacus'"),
        (
            model_step,
            ["--models", "gpt2,bert"],
            "expected names of gpt2, smollm2-135m, llama-1b-layer, got bert",
        ),
        (model_step, ["--depths", "4"], "unrecognized arguments: --depths 4"),
        (adapter_latency, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (adapter_latency, ["--depths", "4,x"], "expected a positive whole number, got x"),
        (adapter_latency, ["--tokens", ""], "expected a positive whole number, got "),
    ],
)
def test_wrong_options_are_one_line(script, options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(options)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_the_readmes_picture_names_the_setting_of_the_benchmark():
    assert step_picture.RANK == trainers.RANK
    assert Setting("gpt2").batch_shape == step_picture.BATCH


@pytest.mark.parametrize("script", [model_step, adapter_latency])
def test_a_folder_that_is_a_file_is_one_line(script, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "run", lambda args: ([], []) if script is model_step else [])
    monkeypatch.setattr(script, "render", lambda *_: "")
    for name in ("model_plot", "latency_plot"):
        monkeypatch.setattr(f"whole_model.{name}.draw", lambda *_: None)
    assert script.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
