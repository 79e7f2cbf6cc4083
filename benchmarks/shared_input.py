"""Layers of one input, and the gated MLP, together: against the same layers alone and PEFT.

    python benchmarks/shared_input.py

q, k and v of an attention, and the gated MLP, at two sizes each, on 512 rows with adapters of rank
16. Together means apply_lora's default, alone its ``fuse_projections=False, fuse_mlp=False``. First
the outputs and gradients of both must agree. Then steps (forward and backward) run in turn. Prints,
as ratios to the layers alone: CPU seconds of the process, the peak that a step allocates, and the
bytes kept for backward; and the limits of the project where it has one.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

# Waiting threads sleep, so that CPU seconds count work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from torch import Tensor, nn

from fused_lora import apply_lora, lora_layers
from harness import command, timing
from harness.timing import Quartiles
from layer import memory
from layer.problem import WrongResultError, relative_rms
from report.limits import add_seconds, limit_of, measure_all, parsed, verdict
from report.records import label

with command.imports():
    import peft

RANK, ROWS, SEED = 16, 512, 0
ALONE, TOGETHER, PEFT = "alone", "together", "peft"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}  # of outputs and gradients, alone and together
SECONDS, QUICK_SECONDS = 30.0, 1.0


class Attention(nn.Module):
    """The projections of an attention: what it computes with them is left out."""

    def __init__(self, width: int, keys: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, keys, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


MODULES: dict[str, Callable[[int, int], nn.Module]] = {"qkv": Attention, "mlp": MLP}
SIZES = {"qkv": ((576, 192), (2048, 512)), "mlp": ((576, 1536), (2048, 5632))}


@dataclass(frozen=True)
class Case:
    """One module on one kind of input."""

    module: str
    width: int
    inner: int  # of k and v, or of the MLP
    dtype: str
    dropout: float
    autocast: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """The largest ratios to the layers alone that the project allows; bfloat16 unless said."""
        dropped = self.dropout > 0
        if self.module == "mlp":
            limits = {"kept": 0.57}
            if not self.autocast:
                limits["peak"] = 0.63 if dropped else 0.58
            if self.dtype == "bfloat16":
                limits["seconds"] = 0.97 if self.width == 576 else 1.01
            return limits
        if self.autocast:
            return {"kept": 0.40}
        limits = {"peak": 0.87 if dropped else 0.78}
        if self.dtype == "bfloat16":
            limits["seconds"] = (0.98 if dropped else 0.93) if self.width == 576 else 1.00
        return limits

    def __str__(self) -> str:
        cast = ", autocast" if self.autocast else ""
        return f"{self.module} {self.width}/{self.inner} {self.dtype} p={self.dropout:g}{cast}"


@dataclass(frozen=True)
class Row:
    """A case's results, each by provider: of PEFT and together, as ratios to the layers alone."""

    case: Case
    seconds: dict[str, Quartiles]
    peak: dict[str, float]
    kept: dict[str, float]

    @property
    def missed(self) -> list[str]:
        """The limits that are exceeded."""
        found = {
            "seconds": self.seconds[TOGETHER].median,
            "peak": self.peak[TOGETHER],
            "kept": self.kept[TOGETHER],
        }
        return [name for name, limit in self.case.limits.items() if found[name] > limit]


class Provider:
    """One module with one provider's adapters."""

    def __init__(self, base: nn.Module, case: Case, name: str, device: str):
        model = nn.Sequential(copy.deepcopy(base))
        if name == PEFT:
            config = peft.LoraConfig(
                r=RANK, lora_alpha=32, lora_dropout=case.dropout, target_modules=r"0\..*"
            )
            model = peft.get_peft_model(model, config)
        else:
            both = dict.fromkeys(("fuse_projections", "fuse_mlp"), name == TOGETHER)
            apply_lora(model, rank=RANK, alpha=32, dropout=case.dropout, **both)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for adapter in _adapters(model):
                value = torch.randn(adapter.shape, generator=generator)
                adapter.copy_(value * adapter.shape[1] ** -0.5)
        self.model, self.case = model.train(), case
        self.trained = [p for p in model.parameters() if p.requires_grad]
        x = torch.randn(ROWS, case.width, generator=generator).to(device)
        self.x = x.to(getattr(torch, case.dtype)).requires_grad_()
        self.dys = [torch.randn_like(y) for y in self.forward()]

    def forward(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.case.autocast):
            y = self.model(self.x)
        return y if isinstance(y, tuple) else (y,)

    def step(self) -> list[Tensor]:
        """Outputs and gradients."""
        ys = self.forward()
        return [*torch.autograd.grad(ys, [self.x, *self.trained], self.dys)]


def _adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(model, peft.PeftModel):
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                yield layer.lora_A["default"].weight
                yield layer.lora_B["default"].weight
    for layer in lora_layers(model).values() if not isinstance(model, peft.PeftModel) else ():
        yield layer.lora_A
        yield layer.lora_B


def measure(case: Case, device: str, seconds: float) -> Row:
    """Check the results of a case, then measure it.

    Raises:
        WrongResultError: together and alone do not agree.
    """
    torch.manual_seed(SEED)
    base = MODULES[case.module](case.width, case.inner).to(device, getattr(torch, case.dtype))
    providers = {n: Provider(base, case, n, device) for n in (ALONE, TOGETHER, PEFT)}
    results = {}
    for name in (ALONE, TOGETHER):
        torch.manual_seed(SEED)
        provider = providers[name]
        provider.dys = providers[ALONE].dys
        results[name] = provider.step()
    bound = TOLERANCE["bfloat16" if case.autocast else case.dtype]
    for a, b in zip(results[ALONE], results[TOGETHER], strict=True):
        if not relative_rms(b, a.double()) <= bound:
            raise WrongResultError(f"{case}: expected the same results alone and together")
    del results
    clock = time.process_time if device == "cpu" else time.perf_counter
    steps = {name: provider.step for name, provider in providers.items()}
    times = timing.interleaved(steps, device=device, seconds=seconds, min_rounds=8, clock=clock)
    peak, kept = {}, {}
    for name, provider in providers.items():
        peak[name] = memory.peak_of(provider.step, torch.device(device))
        kept[name] = memory.kept_of(provider.forward, provider.model.parameters())
    return Row(
        case,
        timing.ratios(times, ALONE),
        {name: value / peak[ALONE] for name, value in peak.items()},
        {name: value / kept[ALONE] for name, value in kept.items()},
    )


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case of the chosen modules."""
    for module in args.modules:
        for width, inner in SIZES[module][:1] if args.quick else SIZES[module]:
            for dtype in args.dtypes:
                for dropout in (0.0, 0.1):
                    yield Case(module, width, inner, dtype, dropout)
            yield Case(module, width, inner, "float32", 0.0, autocast=True)


def render(rows: list[Row], about: dict) -> str:
    """The table; a limit that is missed has an exclamation mark."""
    lines = [label(about), f"{ROWS} rows, rank {RANK}, adapters in float32; ratios to {ALONE}"]
    head = f"{'':<42}{'CPU seconds':>26}{'peak':>14}{'kept':>14}{'of PEFT:':>12}{'seconds':>9}"
    lines.append(head + f"{'peak':>7}{'kept':>7}")
    for row in rows:
        limit = partial(limit_of, row)
        t = row.seconds[TOGETHER]
        seconds = f"{t.median:.3f} [{t.q1:.3f}, {t.q3:.3f}]"
        cells = f"{seconds:>20}{limit('seconds'):<8}{row.peak[TOGETHER]:>8.3f}{limit('peak'):<8}"
        cells += f"{row.kept[TOGETHER]:>6.3f}{limit('kept'):<8}"
        cells += f"{t.median / row.seconds[PEFT].median:>17.3f}"
        cells += f"{row.peak[TOGETHER] / row.peak[PEFT]:>7.3f}"
        cells += f"{row.kept[TOGETHER] / row.kept[PEFT]:>7.3f}"
        lines.append(f"{row.case!s:<42}{cells}")
    return "\n".join([*lines, *verdict(rows)]) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; invalid ones end the script with one line and status 2."""
    parser = command.options(__doc__, "shared-input")
    add = parser.add_argument
    add("--modules", type=command.names(MODULES), default=list(MODULES), metavar="NAME,…")
    add("--dtypes", type=command.names(TOLERANCE), default=list(TOLERANCE), metavar="NAME,…")
    add_seconds(parser, SECONDS, QUICK_SECONDS)
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, 2 (after one line) on an error."""
    args = parse(argv)
    return measure_all(args, cases(args), measure, render)


if __name__ == "__main__":
    raise SystemExit(main())
