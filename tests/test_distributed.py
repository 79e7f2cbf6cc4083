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

from support import swept

TESTS = Path(__file__).parent
CHECKS = TESTS / "distributed"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def every_check(module: str) -> list[str]:
    """The names ``module.check_...`` of all checks of a module."""
    body = ast.parse((CHECKS / f"{module}.py").read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [f"{module}.{name}" for name in names if name.startswith("check_")]


def launch(folder: Path, processes: int, checks: list[str]) -> None:
    """Run checks, each ``module.function``, in ``folder``."""
    assert checks
    start = (*TORCHRUN, str(processes)) if processes > 1 else ()
    launched = subprocess.Popen(
        [sys.executable, *start, CHECKS / "worker.py", *checks],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = launched.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(launched.pid, signal.SIGKILL)  # torchrun's own workers too
        raise
    assert launched.returncode == 0, out + err
    lines = out.splitlines()
    assert [line.removeprefix("passed ") for line in lines if line.startswith("passed ")] == checks


# At least one check per module of distributed/, with two exceptions: "trainers" has its own launch
# below, and "tensor_slow" is slow.
SOME_CHECKS = [
    "training.check_ddp",
    "training.check_fsdp2",
    "fsdp1.check_training",
    "sharding.check_merge",
    "saving.check_saving",
    "saving.check_modules_to_save",
    "saving.save_state",
    "saving.load_state",
    "shared_inputs.check_ddp",
    "shared_inputs.check_fsdp2_per_decoder_layer",
    "experts.check_fsdp2",
    "tensor_products.check_own_styles",
    "tensor_products.check_collectives",
    "tensor_models.check_life_cycle",
]


def test_some_checks_of_each_module(tmp_path):
    modules = {path.stem for path in CHECKS.glob("*.py") if every_check(path.stem)}
    some = {check.partition(".")[0] for check in SOME_CHECKS}
    assert some == modules - {"trainers", "tensor_slow"}
    launch(tmp_path, 2, SOME_CHECKS)


# For each number of processes, the modules whose checks run in it: most of a launch is imports. The
# state that two processes save is then loaded by four, and by one.
EVERY_CHECK = {
    2: ("training", "sharding", "fsdp1", "shared_inputs", "experts", "trainers", "tensor_slow"),
    4: ("training", "saving", "tensor_products", "tensor_models"),
    1: ("trainers",),
}
STATE = {2: "saving.save_state", 4: "saving.load_state", 1: "saving.load_state"}


@swept
def test_every_check(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    modules = {path.stem for path in CHECKS.glob("*.py") if every_check(path.stem)}
    assert modules == {module for some in EVERY_CHECK.values() for module in some}
    for processes, some in EVERY_CHECK.items():
        checks = [check for module in some for check in every_check(module)]
        launch(tmp_path, processes, [*checks, STATE[processes]])


def test_the_wire_model_counts_real_shapes(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(TESTS.parent / "benchmarks"))
    wire = importlib.import_module("wire")
    base, adapters = wire.count(wire.SHAPES["8B"])
    assert base == 8_030_261_248  # parameters of the published checkpoint
    square, grouped, mlp = 4096 + 4096, 4096 + 1024, 4096 + 14336
    assert adapters == 32 * 16 * (2 * square + 2 * grouped + 3 * mlp)
