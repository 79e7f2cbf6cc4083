"""The layer's bare products: the least time that any schedule of vendor GEMMs can reach.

    y = x Wᵀ + b    S = x Aᵀ    y += S Bᵀ
    dx = dy W       G = dy B    dx += G A     dA = Gᵀ x     dB = dyᵀ S

These are the frozen layer's two products and six thin ones, each in the orientation that is fastest
on this machine. There is no autograd and no dropout, and the scale is applied in advance, untimed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.timing import interleaved
from layer.problem import SCALING, Layer, Problem

TRIAL_SECONDS = 0.05  # to choose the orientation of one product
TRIAL_ROUNDS = 5


class Floor(Layer):
    """Forward and step as bare products; the results are those of a layer without dropout."""

    def __init__(self, problem: Problem):
        A, B = problem.lora_A, problem.lora_B
        super().__init__(problem, self._products, A, B, p=0.0)
        self.weight, self.bias = problem.linear.weight, problem.linear.bias
        x, dy = problem.x.detach(), problem.dy
        self.x = x
        choose = _Chooser(problem.device)
        self._shrink = choose.product(x, A.t())
        S = self._shrink()
        y = F.linear(x, self.weight, self.bias)
        self._expand = choose.accumulation(y, S, SCALING * B.t())
        self._shrink_dy = choose.product(dy, SCALING * B)
        G = self._shrink_dy()
        self._expand_dx = choose.accumulation(dy @ self.weight, G, A)
        self._grad_A = choose.product(G.t(), x)
        self._grad_B = choose.product(dy.t(), SCALING * S)

    def _products(self, x: Tensor) -> Tensor:
        self._shrink()
        return self._expand(F.linear(x, self.weight, self.bias))

    def step(self) -> tuple[Tensor, ...]:
        y = self._products(self.x)
        self._shrink_dy()
        dx = self._expand_dx(torch.mm(self.dy, self.weight))
        return y, dx, self._grad_A(), self._grad_B()


class _Chooser:
    """Selects the fastest orientation of a product, timed on the actual operands."""

    def __init__(self, device: torch.device):
        self.device = device

    def product(self, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        """``a b``, or ``bᵀ aᵀ`` transposed; the smaller operand is tried in both layouts."""
        a_ways, b_ways = _layouts(a, b)
        candidates = [
            way
            for u in a_ways
            for v in b_ways
            for way in (
                lambda u=u, v=v: torch.mm(u, v),
                lambda u=u, v=v: torch.mm(v.t(), u.t()).t(),
            )
        ]
        return self._fastest(candidates)

    def accumulation(self, out: Tensor, u: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
        """``out += u v``: fused with ``addmm_``, or as a product that is then added."""
        candidates = [
            way
            for w in (v, v.t().contiguous().t())
            for way in (
                lambda o, w=w: o.addmm_(u, w),
                lambda o, w=w: o.t().addmm_(w.t(), u.t()).t(),
                lambda o, w=w: o.add_(torch.mm(u, w)),
            )
        ]
        best = self._fastest([lambda way=way: way(out) for way in candidates], candidates)
        return best

    def _fastest(self, runs: list[Callable], candidates: list[Callable] | None = None) -> Callable:
        times = interleaved(
            {str(i): run for i, run in enumerate(runs)},
            device=self.device,
            seconds=TRIAL_SECONDS,
            min_rounds=TRIAL_ROUNDS,
        )
        best = min(times, key=lambda name: statistics.median(times[name]))
        return (candidates or runs)[int(best)]


def _layouts(a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Both operands in their own layout, the smaller one in the other layout too."""
    other = lambda t: t.t().contiguous().t() if t.is_contiguous() else t.contiguous()  # noqa: E731
    if a.numel() < b.numel():
        return [a, other(a)], [b]
    return [a], [b, other(b)]
