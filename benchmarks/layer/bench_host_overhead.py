"""Host overhead of a call, on tensors so small that the products cost nothing: 16×16, rank 4."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fused_lora import fused_lora_linear, patch_peft, unpatch_peft
from fused_lora.ops.autograd import lora_linear
from fused_lora.ops.operands import Operands
from harness import machine
from harness.shapes import Shape
from harness.timing import synchronised
from layer.problem import SCALING, Layer, Problem, verified
from layer.providers import PROVIDERS

pytestmark = pytest.mark.benchmark(max_time=0.4)
TINY = Shape(16, 16, 16, 4)


def _functional(problem: Problem) -> Layer:
    A, B = nn.Parameter(problem.lora_A), nn.Parameter(problem.lora_B)
    weight, bias = problem.linear.weight, problem.linear.bias
    return Layer(problem, lambda x: fused_lora_linear(x, weight, A, B, bias, scaling=SCALING), A, B)


def _unvalidated(problem: Problem) -> Layer:
    A, B = nn.Parameter(problem.lora_A), nn.Parameter(problem.lora_B)
    weight, bias = problem.linear.weight, problem.linear.bias
    return Layer(problem, lambda x: lora_linear(Operands(x, weight, A, B, bias, SCALING)), A, B)


def _patched(problem: Problem) -> Layer:
    layer = PROVIDERS["peft"](problem)
    patch_peft(layer.module)
    return layer


CALLS = {
    "frozen": PROVIDERS["frozen"],
    "eager": PROVIDERS["eager"],
    "peft": PROVIDERS["peft"],
    "bare-function": PROVIDERS["addmm"],
    "unvalidated": _unvalidated,
    "functional": _functional,
    "module": PROVIDERS["fused"],
    "patched-peft": _patched,
}


@contextmanager
def _peft_left_as_it_was():
    """Undo the patch: with it, PEFT's other layers check at every call whether they are patched."""
    pytest.importorskip("peft")
    try:
        yield
    finally:
        unpatch_peft()


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("call", CALLS)
def test_host_overhead(call, direction, device, benchmark):
    problem = Problem.make(TINY, torch.float32, device, 0.0)
    benchmark.group = f"host overhead, {direction}"
    benchmark.extra_info |= machine.describe(device)
    with _peft_left_as_it_was():
        layer = verified(CALLS[call], problem, call)
        timed = layer.forward if direction == "forward" else layer.step
        benchmark(synchronised(timed, layer.x.device))
