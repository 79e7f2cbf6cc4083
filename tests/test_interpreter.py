"""``TRITON_INTERPRET=1`` in a user's process: correct results in every dtype, without conftest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import by_default

pytest.importorskip("triton")

TESTS = Path(__file__).parent

LAYER = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from fused_lora import fused_lora_linear
from support import assert_as_good_as_eager, in_eager, in_float64, make_inputs
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for strategy in ("split", "seeded", "addmm", "single_pass"):
        if (dtype, strategy) == (torch.float16, "seeded"):
            continue  # refused: a seed may overflow
        torch.manual_seed(0)
        inputs, dy = make_inputs(33, 70, 48, 8, dtype), torch.randn(33, 48).to(dtype)
        leaves = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
        y = fused_lora_linear(**inputs, impl=f"triton:{strategy}")
        gradients = torch.autograd.grad(y, leaves, dy)
        results = dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *gradients)))
        inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        assert_as_good_as_eager(results, in_float64(inputs, dy), in_eager(inputs, dy))
print("right")
"""

# A kernel of another library in the same process: our repairs of the interpreter apply to it too.
KERNEL = """
import torch
import fused_lora.kernels.common
import triton
import triton.language as tl

@triton.jit
def kernel(o_ptr, a_ptr, b_ptr, n):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    product = tl.dot(tl.load(a_ptr + i * 16 + j), tl.load(b_ptr + i * 16 + j))
    for _ in range(n):
        product += 1.0
    tl.store(o_ptr + i * 16 + j, product.to(tl.bfloat16))

a, b = torch.randn(2, 16, 16).bfloat16()
o = torch.empty_like(a)
kernel[(1,)](o, a, b, 2)
exact = a.double() @ b.double() + 2
assert ((o.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all(), (o, exact)
print("right")
"""


@pytest.mark.parametrize("script", by_default([KERNEL], [LAYER, KERNEL]), ids=["layer", "kernel"])
def test_numbers_are_right(script):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, TESTS],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "right\n"


def test_a_second_repair_changes_nothing():
    from triton.runtime.interpreter import InterpreterBuilder

    from fused_lora.kernels import interpreter

    dot = InterpreterBuilder.create_dot
    interpreter.repair()
    assert InterpreterBuilder.create_dot is dot
    assert "fused_lora" in dot.__module__


def test_a_launch_replaces_the_language_once(monkeypatch):
    """The tests' interpreter is fast: device functions that a kernel calls replace nothing again.

    One more time for ``triton.language.core``, when the first function of it is called.
    """
    from triton.runtime import interpreter

    from fused_lora import fused_lora_linear
    from support import make_inputs

    launches, replaced = [], []
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang_tensor

    def counted(self, *args, **kwargs):
        launches.append(0)
        return run(self, *args, **kwargs)

    def counted_patch(*args):
        replaced.append(0)
        patch(*args)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", counted_patch)
    fused_lora_linear(**make_inputs(33, 70, 48, 8, torch.float32), impl="triton:split")
    assert 2 <= len(launches) <= len(replaced) <= len(launches) + 1
