"""Adapters of one weight in one call, over a call for each of them.

    python benchmarks/adapter_batch.py

4 and 8 adapters, each with as many rows: ``fused_lora_linear`` over segments against one call per
adapter of the same function. First the outputs and gradients of both must agree. Then steps
(forward and backward) run in turn. Prints CPU seconds of the process as ratios to the single calls,
and the limits of the project.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Waiting threads sleep, so that CPU seconds count work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from torch import Tensor

from fused_lora import Segments, fused_lora_linear
from harness import command, timing
from harness.timing import Quartiles
from layer.problem import WrongResultError, relative_rms
from report.limits import add_seconds, limit_of, measure_all, parsed, verdict
from report.records import label

RANK, SCALING, SEED = 16, 2.0, 0
TOGETHER, ALONE = "together", "alone"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}  # of outputs and gradients
SECONDS, QUICK_SECONDS = 5.0, 0.2


@dataclass(frozen=True)
class Case:
    """``adapters`` of one weight ``(width, width)``, each with ``rows`` rows."""

    adapters: int
    rows: int
    width: int
    dtype: str

    @property
    def limits(self) -> dict[str, float]:
        """The largest ratio that the project allows."""
        return {"seconds": 0.7 if self.rows <= 16 else 1.0}

    def __str__(self) -> str:
        return f"{self.adapters} adapters, {self.rows} rows each, {self.width} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """A case's CPU seconds, as ratios to the single calls."""

    case: Case
    seconds: Quartiles

    @property
    def missed(self) -> list[str]:
        """The limits that are exceeded."""
        return ["seconds"] if self.seconds.median > self.case.limits["seconds"] else []


def steps(case: Case, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Outputs and gradients, in one call and in one call per adapter."""
    generator = torch.Generator().manual_seed(SEED)
    dtype, G, N = getattr(torch, case.dtype), case.adapters, case.width

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device)

    weight, x, dy = (draw(n, N).to(dtype) for n in (N, G * case.rows, G * case.rows))
    A, B = ([draw(*s).requires_grad_() for _ in range(G)] for s in ((RANK, N), (N, RANK)))
    offsets = torch.arange(1, G + 1, device=device) * case.rows

    def together() -> list[Tensor]:
        rows = x.detach().requires_grad_()
        y = fused_lora_linear(rows, weight, A, B, scaling=SCALING, segments=Segments(offsets))
        return [y, *torch.autograd.grad(y, [rows, *A, *B], dy)]

    def alone() -> list[Tensor]:
        found = []
        for g, (rows, gradient) in enumerate(
            zip(x.split(case.rows), dy.split(case.rows), strict=True)
        ):
            rows = rows.detach().requires_grad_()
            y = fused_lora_linear(rows, weight, A[g], B[g], scaling=SCALING)
            found.append((y, *torch.autograd.grad(y, [rows, A[g], B[g]], gradient)))
        ys, dxs, dAs, dBs = zip(*found, strict=True)
        return [torch.cat(ys), torch.cat(dxs), *dAs, *dBs]

    return {ALONE: alone, TOGETHER: together}


def measure(case: Case, device: str, seconds: float) -> Row:
    """Check the results of a case, then measure it.

    Raises:
        WrongResultError: both do not agree.
    """
    both = steps(case, device)
    for expected, value in zip(*(step() for step in both.values()), strict=True):
        if not relative_rms(value, expected.double()) <= TOLERANCE[case.dtype]:
            raise WrongResultError(f"{case}: expected the results of single calls")
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = timing.interleaved(both, device=device, seconds=seconds, min_rounds=8, clock=clock)
    return Row(case, timing.ratios(times, ALONE)[TOGETHER])


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case of the chosen dtypes."""
    for dtype in args.dtypes:
        for width in (64,) if args.quick else (768, 2048):
            for adapters in (4, 8):
                for rows in (4,) if args.quick else (1, 4, 16, 64, 256):
                    yield Case(adapters, rows, width, dtype)


def render(rows: list[Row], about: dict) -> str:
    """The table; a limit that is missed has an exclamation mark."""
    lines = [label(about), f"rank {RANK}, adapters in float32; CPU seconds as ratios to {ALONE}"]
    for row in rows:
        t, limit = row.seconds, limit_of(row, "seconds").rstrip()
        lines.append(f"{row.case!s:<46}{t.median:>8.3f} [{t.q1:.3f}, {t.q3:.3f}]{limit}")
    return "\n".join([*lines, *verdict(rows)]) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; invalid ones end the script with one line and status 2."""
    parser = command.options(__doc__, "adapter-batch")
    add = parser.add_argument
    add("--dtypes", type=command.names(TOLERANCE), default=list(TOLERANCE), metavar="NAME,…")
    add_seconds(parser, SECONDS, QUICK_SECONDS)
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, 2 (after one line) on an error."""
    args = parse(argv)
    return measure_all(args, cases(args), measure, render)


if __name__ == "__main__":
    raise SystemExit(main())
