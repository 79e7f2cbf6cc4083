"""Latency of one layer at few tokens, without gradients: unmerged, merged, a bottleneck adapter."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import machine
from harness.shapes import Shape
from harness.timing import synchronised
from layer.problem import Problem, exactly, relative_rms, verified
from layer.providers import PROVIDERS, UnavailableError

pytestmark = pytest.mark.benchmark(max_time=0.3)
TOKENS = (1, 4, 16)
WIDTH, RANK = 768, 8


class _Bottleneck(nn.Module):
    """Houlsby's adapter after the layer; its inner width is the LoRA's rank."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.linear = problem.linear
        self.down = nn.Linear(problem.shape.N, RANK, device=problem.device, dtype=problem.dtype)
        self.up = nn.Linear(RANK, problem.shape.N, device=problem.device, dtype=problem.dtype)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))


def _adapted(problem: Problem, provider: str) -> nn.Module:
    return verified(PROVIDERS[provider], problem, provider).module.eval()


def _merged(problem: Problem) -> nn.Module:
    own = deepcopy(problem.linear)  # merge() changes its weight in place
    unmerged = _adapted(problem, "fused")
    merged = PROVIDERS["fused"](replace(problem, linear=own)).module.eval()
    merged.merge()
    error = relative_rms(merged(problem.x), exactly(unmerged(problem.x)))
    assert error <= problem.tolerance()
    return merged


MODULES = {
    "base": lambda problem: problem.linear,
    "merged": _merged,
    "unmerged": lambda problem: _adapted(problem, "fused"),
    "unmerged-peft": lambda problem: _adapted(problem, "peft"),
    "bottleneck": _Bottleneck,
}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", MODULES)
def test_latency(kind, tokens, device, benchmark):
    problem = Problem.make(Shape(tokens, WIDTH, WIDTH, RANK), torch.float32, device, 0.0)
    try:
        module = MODULES[kind](problem)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    benchmark.group = f"latency, {tokens} tokens, {WIDTH}x{WIDTH} r{RANK}"
    benchmark.extra_info |= machine.describe(device)
    x = problem.x.detach()
    with torch.inference_mode():
        benchmark(synchronised(lambda: module(x), x.device))
