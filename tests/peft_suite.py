"""Run PEFT's own tests with every LoRA layer patched; some eight minutes on two cores:

    pip install diffusers datasets parameterized
    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python tests/peft_suite.py peft-0.21.2 [--unpatched] [options of pytest]

The runs with and without --unpatched must end alike. Offline, one test fails in both: it downloads
a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SELECTION = ("tests/test_custom_models.py", "-k", "LoRA", "-o", "addopts=")  # without coverage
SWITCH = "FUSED_LORA_PATCH_PEFT"
_fused_calls = 0


def pytest_configure(config) -> None:
    if os.environ.get(SWITCH) != "1":
        return
    from fused_lora import patch_peft
    from fused_lora.layers import shared_input
    from fused_lora.peft import patch as peft_patch

    # Layers of one input are computed together however few rows it has.
    shared_input.MIN_ROWS = 1

    def counted(run):
        def count(*args):
            global _fused_calls
            y = run(*args)
            _fused_calls += y is not None  # None: the layer runs alone
            return y

        return count

    for name in ("_fused", "_added"):
        setattr(peft_patch, name, counted(getattr(peft_patch, name)))
    place = shared_input.SharedInput
    for name in ("_lead", "_follow"):
        setattr(place, name, counted(getattr(place, name)))
    patch_peft()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fused_calls"] = _fused_calls


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Add up the counts of pytest-xdist's workers."""
    global _fused_calls
    _fused_calls += getattr(node, "workeroutput", {}).get("fused_calls", 0)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{_fused_calls:,} calls of a LoRA layer ran fused")


def main(source: Path, *options: str) -> int:
    patched = "--unpatched" not in options
    rest = [option for option in options if option != "--unpatched"]
    (source / "tests" / "__init__.py").touch()
    environment = os.environ | {SWITCH: str(int(patched)), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite", *SELECTION, *rest]
    return subprocess.run(command, cwd=source, env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests").is_dir():
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
