"""Several processes on one machine, started by torchrun: the checks are in ``distributed/``."""

from __future__ import annotations

import ast
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

TESTS = Path(__file__).parent
CHECKS = TESTS / "distributed"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def launch(folder: Path, processes: int, module: str, checks: list[str] | None = None) -> None:
    """Run checks of a module, by default every one, in ``folder``."""
    if checks is None:
        body = ast.parse((CHECKS / f"{module}.py").read_text()).body
        names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        checks = [name for name in names if name.startswith("check_")]
    assert checks
    start = (*TORCHRUN, str(processes)) if processes > 1 else ()
    launched = subprocess.Popen(
        [sys.executable, *start, CHECKS / "worker.py", module, *checks],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = launched.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(launched.pid, signal.SIGKILL)  # torchrun's own workers too
        raise
    assert launched.returncode == 0, out + err
    lines = out.splitlines()
    assert [line.removeprefix("passed ") for line in lines if line.startswith("passed ")] == checks


@pytest.mark.parametrize(
    ("module", "processes"),
    [
        ("training", 2),
        ("training", 4),
        ("sharding", 2),
        ("fsdp1", 2),
        ("saving", 4),
        ("trainers", 1),
        ("trainers", 2),
        ("tensor_products", 4),
        ("tensor_models", 4),
        ("tensor_slow", 2),
    ],
)
def test_every_check(module, processes, tmp_path):
    if module == "trainers":
        pytest.importorskip("accelerate")
        pytest.importorskip("transformers")
    launch(tmp_path, processes, module)


def test_the_wire_model_counts_real_shapes(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(TESTS.parent / "benchmarks"))
    wire = importlib.import_module("wire")
    base, adapters = wire.count(wire.SHAPES["8B"])
    assert base == 8_030_261_248  # the published checkpoint's
    square, grouped, mlp = 4096 + 4096, 4096 + 1024, 4096 + 14336
    assert adapters == 32 * 16 * (2 * square + 2 * grouped + 3 * mlp)


def test_resharding(tmp_path):
    """What two processes save, four and one load, by PyTorch's distributed checkpoints."""
    launch(tmp_path, 2, "saving", ["save_state"])
    launch(tmp_path, 4, "saving", ["load_state"])
    launch(tmp_path, 1, "saving", ["load_state"])
