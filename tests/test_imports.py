"""Imports in a fresh interpreter: silent, without Triton, and alongside other libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import by_default

ROOT = Path(__file__).parents[1]


def run(script: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **kwargs,
    )


def test_import_is_quiet_and_loads_no_triton():
    done = run("import sys, fused_lora; assert 'triton' not in sys.modules")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_works_with_triton_blocked():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from fused_lora import FusedLoRALinear, explain\n"
        "layer = FusedLoRALinear(8, 6, rank=2, dropout=0.1)\n"
        "layer(torch.randn(5, 8)).sum().backward()\n"
        "assert layer.lora_A.grad is not None\n"
        "try: explain(layer, impl='triton')\n"
        "except ValueError as error: assert 'pip install -U triton' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "context",
    by_default(
        ["torch._subclasses.fake_tensor.FakeTensorMode()"],
        [
            "torch.device('meta')",
            "torch._subclasses.fake_tensor.FakeTensorMode()",
            "torch.inference_mode()",
        ],
    ),
)
def test_works_wherever_it_was_first_imported(context):
    """Import creates no tensor: one created in such a context would be unusable afterwards."""
    script = (
        "import torch, torch._subclasses\n"
        f"with {context}:\n"
        "    import fused_lora\n"
        "layer = fused_lora.FusedLoRALinear(8, 6, rank=2, dropout=0.1)\n"
        "layer(torch.randn(5, 8)).sum().backward()\n"
        "assert layer.lora_B.grad.abs().sum() > 0\n"
        "assert fused_lora.ops.dropout._has_numpy()\n"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr


OTHERS = ["transformers.modeling_utils", "peft"]


@pytest.mark.parametrize("module", by_default(["transformers.modeling_utils"], OTHERS))
def test_other_libraries_import_from_our_root(module):
    """They probe for a module named ``kernels``; from our root Python finds our folder."""
    pytest.importorskip(module.partition(".")[0])
    done = run(f"import {module}", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_top_level_kernels_package_is_installed():
    script = (
        "import importlib.util\n"
        "import fused_lora.kernels.select_config\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or 'fused' not in str(spec.origin), spec\n"
    )
    done = run(script, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr


def test_the_folder_imported_by_itself_is_harmless():
    done = run("import kernels, sys; assert kernels.__version__ == '0'", cwd=ROOT)
    assert done.returncode == 0, done.stderr
