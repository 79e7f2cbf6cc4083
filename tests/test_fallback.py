"""Under "auto" training goes on if Triton cannot run; Triton itself raises each failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_lora.ops import dispatch
from fused_lora.ops.triton_impl import described, is_sticky
from support import by_default

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("force_failure.py")


def run(*command, path: Path = SCRIPT.parent) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


# failure, part of Triton's own error, cure that the warning names
FAILURES = [
    ("no_driver", "active drivers", "install the GPU's driver"),
    ("no_compiler", "C compiler", "install gcc or clang"),
    ("no_room", "OutOfResources: out of resource: shared memory", "a smaller rank"),
    ("too_old", "PTXASError", "impl='torch'"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU driver is present")
@pytest.mark.parametrize("case", by_default(FAILURES[:1], FAILURES), ids=lambda case: case[0])
def test_training_goes_on(case):
    kind, cause, cure = case
    result = json.loads(run(SCRIPT, kind))
    (warning,) = result["warnings"]
    assert cause in warning
    assert cure in warning
    assert "impl='torch'" in warning
    assert result["difference"] == 0.0


# id, content of the module in Triton's place, expected reason
UNUSABLE = [
    ("old", "__version__ = '3.5.1'", "Triton 3.5.1 is older than 3.6"),
    ("a build of an old one", "__version__ = '3.5.0+gitabc'", "Triton 3.5.0+gitabc is older than"),
    ("new but damaged", "__version__ = '3.7.1'", "Triton cannot be imported"),
    ("broken", "raise RuntimeError('no')", "Triton cannot be imported (RuntimeError: no"),
]


@pytest.mark.parametrize("case", by_default(UNUSABLE[:1], UNUSABLE), ids=lambda case: case[0])
def test_an_unusable_triton_is_a_reason_and_not_an_error(case, tmp_path):
    """A Triton that lacks what the kernels import may be installed for another library."""
    _, content, expected = case
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(content + "\n")
    script = (
        "import torch, warnings\n"
        "from fused_lora import fused_lora_linear\n"
        "from fused_lora.ops import dispatch\n"
        "dispatch._may_run_triton = lambda x, weight: True\n"
        "dispatch._not_worth_it = lambda device: None\n"
        "x, A, B = (torch.ones(s, requires_grad=True) for s in ((5, 8), (2, 8), (6, 2)))\n"
        "fused_lora_linear(x, torch.ones(6, 8), A, B).sum().backward()\n"
        "print(dispatch.triton_problem(torch.device('cpu')))\n"
    )
    said = run("-c", script, path=tmp_path)
    assert expected in said
    assert "the kernels need Triton 3.6 or newer: a GPU build of torch 2.11 or newer" in said


def test_float64_needs_no_warning(recwarn, monkeypatch):
    monkeypatch.setattr(dispatch, "_not_worth_it", lambda device: None)
    dispatch.clear_decisions()
    gpu = torch.device("cuda", 0)
    decision = dispatch.decide("auto", gpu, torch.float64, 8, 8, 8, 2, False)
    assert (decision.impl, "float64" in decision.reason) == ("torch", True)
    assert not recwarn.list


# error, and whether it leaves the device unusable
ERRORS = [
    (torch.AcceleratorError("no"), True),
    (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
    (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
    (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
    (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), False),
    (RuntimeError("Triton Error [CUDA]: out of memory"), False),
    (RuntimeError("illegal argument"), False),
    (AssertionError("no"), False),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: str(case[0]))
def test_errors_that_leave_the_device_unusable_are_known(case):
    error, expected = case
    assert is_sticky(error) is expected


def test_an_error_is_described_by_its_first_line():
    assert described(ValueError("one\ntwo")) == "ValueError: one"
    assert described(ValueError("")) == "ValueError: "
