"""Tensor parallelism in 2 and 4 gloo processes, each launched once by ``torchrun``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


@pytest.mark.parametrize(
    ("processes", "without"),
    [(2, []), (4, ["compiled", "llama"])],  # the slow ones once
    ids=["2 processes", "4 processes"],
)
def test_tensor_parallel(processes, without):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run = subprocess.run(
        [sys.executable, *launch, str(WORKER), *without],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-8000:]
    written = sum(f.read_text().count("\ndef check_") for f in WORKER.parent.glob("parallel_*.py"))
    assert len(run.stdout.split()) == written - len(without)
