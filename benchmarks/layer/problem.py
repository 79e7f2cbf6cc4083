"""One layer's inputs, its exact results in float64, and the check of every provider's layer.

y = x Wᵀ + b + s·D(x) Aᵀ Bᵀ,  with gradients of x, A and B under the cotangent dy
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.shapes import Shape

SCALING = 2.0
NAMES = ("y", "dx", "dA", "dB")
# Values rounded to the layer's dtype, each with an error of at most the unit round-off: the cast of
# A or B, the dropped x, S, the scaled S, S Bᵀ, the sum.
ROUNDINGS = 6
MAX_SIGMAS = 6  # of a binomial distribution: rejects one correct mask in 10⁹


class WrongResultError(AssertionError):
    """A provider computes something else than the layer: its times would be meaningless."""


class Layer:
    """A provider's layer on the inputs of one problem.

    Args:
        module: maps ``x (M,K)`` to ``y (M,N)``, differentiable.
        lora_A, lora_B: its trained Parameters; None for a frozen layer.
        transposed: whether these are ``(K,R)`` and ``(R,N)``, not ``(R,K)`` and ``(N,R)``.
        p: the dropout probability that the layer applies; the problem's by default.
    """

    def __init__(
        self,
        problem: Problem,
        module: Callable[[Tensor], Tensor],
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        *,
        transposed: bool = False,
        p: float | None = None,
    ):
        self.module, self.transposed = module, transposed
        self.p = problem.p if p is None else p
        self.x, self.dy = problem.x, problem.dy
        self.parameters = [p for p in (lora_A, lora_B) if p is not None]
        self.frozen = list(problem.linear.parameters())

    def forward(self) -> Tensor:
        """``y``, recorded for backward."""
        return self.module(self.x)

    def step(self) -> tuple[Tensor, ...]:
        """``y`` and the gradients of ``x``, ``A`` and ``B``, as in a training step."""
        y = self.forward()
        return y, *torch.autograd.grad(y, [self.x, *self.parameters], self.dy)

    def results(self) -> dict[str, Tensor]:
        """A step's results by name, the gradients as ``dA (R,K)`` and ``dB (N,R)``."""
        results = dict(zip(NAMES, (t.detach() for t in self.step()), strict=False))
        if self.transposed:
            results |= {name: results[name].t() for name in ("dA", "dB")}
        return results


@dataclass(frozen=True, eq=False)
class Problem:
    """The tensors that every provider gets, in one dtype on one device."""

    shape: Shape
    x: Tensor
    dy: Tensor
    linear: nn.Linear
    lora_A: Tensor
    lora_B: Tensor
    p: float

    @classmethod
    def make(
        cls, shape: Shape, dtype: torch.dtype, device: str, p: float, seed: int = 0
    ) -> Problem:
        """Random tensors; base and adapter outputs are of similar size. ``p`` is for dropout."""
        torch.manual_seed(seed)
        M, K, N, R = shape
        kwargs = {"dtype": dtype, "device": device}
        return cls(
            shape,
            torch.randn(M, K, **kwargs).requires_grad_(),
            torch.randn(M, N, **kwargs),
            nn.Linear(K, N, **kwargs).requires_grad_(False),
            torch.randn(R, K, **kwargs) / K**0.5,
            torch.randn(N, R, **kwargs) / R**0.5,
            p,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @cached_property
    def exact_base(self) -> tuple[Tensor, Tensor]:
        """``x Wᵀ + b`` and ``dy W`` in float64."""
        weight = exactly(self.linear.weight)
        base = F.linear(exactly(self.x), weight, exactly(self.linear.bias))
        return base, exactly(self.dy) @ weight

    def exact(self, kept: Tensor | float = 1.0) -> dict[str, Tensor]:
        """The results in float64; ``kept (M,K)`` has dropout's factors, 0 or ``1/(1-p)``."""
        x, dy, A, B = (exactly(t) for t in (self.x, self.dy, self.lora_A, self.lora_B))
        base, base_dx = self.exact_base
        S = SCALING * (x * kept) @ A.t()
        G = SCALING * dy @ B
        return {
            "y": base + S @ B.t(),
            "dx": base_dx + (G @ A) * kept,
            "dA": G.t() @ (x * kept),
            "dB": dy.t() @ S,
        }

    def tolerance(self) -> float:
        """The relative RMS error that rounding explains.

        This allows ROUNDINGS in the layer's dtype, plus sums of L products in fp32, whose errors
        grow as √L (Higham and Mary, "A new approach to probabilistic rounding error analysis",
        2019).
        """
        eps = torch.finfo(self.dtype).eps
        longest = max(self.shape)
        return ROUNDINGS * eps / 2 + longest**0.5 * torch.finfo(torch.float32).eps / 2


def verified(make: Callable[[Problem], Layer], problem: Problem, name: str) -> Layer:
    """Build a layer with ``make``, and check its output and gradients against float64.

    With dropout, the mask is read from a twin layer with a zero weight: the twin's ``dx`` is zero
    exactly where an entry was dropped. The layer itself runs with the same seed; it must use that
    mask in ``y``, ``dx`` and ``dA``, and the mask must keep the right share of the entries.

    Raises:
        WrongResultError: an error exceeds what rounding explains, or the share is wrong.
    """
    layer = make(problem)
    if not layer.parameters:
        expected = dict(zip(NAMES, problem.exact_base, strict=False))
    elif not layer.p:
        expected = problem.exact()
    else:
        mask = _mask_of(make, problem)
        _check_share(mask, layer.p, name)
        expected = problem.exact(mask / (1 - layer.p))
    torch.manual_seed(0)
    results = layer.results()
    for key, value in results.items():
        error = relative_rms(value, expected[key])
        if not error <= problem.tolerance():
            raise WrongResultError(
                f"{name}, {problem.shape}, {problem.dtype}: {key} has a relative error of"
                f" {error:.1e}, expected at most {problem.tolerance():.1e}"
            )
    return layer


def _mask_of(make: Callable[[Problem], Layer], problem: Problem) -> Tensor:
    """The mask of a layer seeded with 0, as zeros and ones in float64."""
    linear = nn.Linear(problem.shape.K, problem.shape.N, device="meta")
    linear.weight = nn.Parameter(torch.zeros_like(problem.linear.weight), requires_grad=False)
    linear.bias = problem.linear.bias
    twin = make(replace(problem, linear=linear))
    torch.manual_seed(0)
    return exactly(twin.results()["dx"] != 0)


def _check_share(mask: Tensor, p: float, name: str) -> None:
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    share = mask.mean().item()
    if abs(share - (1 - p)) > MAX_SIGMAS * sigma:
        raise WrongResultError(f"{name}: dropout keeps {share:.4f}, expected {1 - p:.4f}")


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of ``expected``."""
    return ((exactly(actual) - expected).norm() / expected.norm()).item()


def exactly(t: Tensor) -> Tensor:
    """``t`` in float64; on the CPU if its device has no float64."""
    return t.detach().to("cpu" if t.device.type == "mps" else t.device).double()
