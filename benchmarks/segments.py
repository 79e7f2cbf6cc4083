"""Adapters on the experts of a mixture: PEFT's target_parameters, as it is and patched.

    python benchmarks/segments.py

Experts: the module of Qwen3-MoE alone on 512 tokens, with adapters of rank 8. Dropout: the same
with dropout 0.1, which PEFT refuses for experts, against PEFT on one nn.Linear per expert and
matrix, as transformers 4 had them. Model: a training step of a small Qwen3-MoE. First the outputs
and gradients must agree, without dropout. Then steps run in turn. Prints CPU seconds of the process
as ratios to PEFT, the peak that a step allocates as ratios to the frozen experts (of a model: to
PEFT), and the limits of the project.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

# Waiting threads sleep, so that CPU seconds count work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from torch import Tensor, nn

from fused_lora import patch_peft
from fused_lora.layers.experts import ExpertAdapter, experts_forward
from harness import command, timing
from harness.timing import Quartiles
from layer import memory
from layer.problem import WrongResultError, relative_rms
from report.limits import add_seconds, limit_of, measure_all, parsed, verdict
from report.records import label

with command.imports():
    import peft
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    transformers.utils.logging.set_verbosity_error()

RANK, ALPHA, TOKENS, SEED = 8, 16, 512, 0
FROZEN, PEFT, LINEARS, PATCHED, FUNCTION = "frozen", "peft", "peft linears", "patched", "function"
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}  # of outputs and gradients
SECONDS, QUICK_SECONDS = 30.0, 1.0
KINDS = ("experts", "dropout", "model")


@dataclass(frozen=True)
class Case:
    """What runs: experts of ``width`` by ``width``, or a model of them."""

    kind: str
    experts: int
    top: int
    width: int
    dtype: str
    tokens: int = TOKENS

    @property
    def ours(self) -> str:
        return FUNCTION if self.kind == "dropout" else PATCHED

    @property
    def base(self) -> str:
        """What seconds are ratios to."""
        return LINEARS if self.kind == "dropout" else PEFT

    @property
    def peak_base(self) -> str:
        return PEFT if self.kind == "model" else FROZEN

    @property
    def limits(self) -> dict[str, float]:
        """The largest ratios that the project allows."""
        if self.tokens != TOKENS:
            return {}
        if self.kind == "dropout":
            return {"seconds": 0.75}
        if self.kind == "model":
            return {"seconds": 0.8, "peak": 0.35}
        large = self.experts == 32
        seconds = (0.8, 1.0) if self.dtype == "bfloat16" else (0.65, 0.9)
        return {"seconds": seconds[not large], "peak": 1.25}

    def __str__(self) -> str:
        return f"{self.kind} E={self.experts} top {self.top} {self.width} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """A case's results by provider: seconds as ratios to the base, the peak in bytes."""

    case: Case
    seconds: dict[str, Quartiles]
    milliseconds: dict[str, float]
    peak: dict[str, int]

    @property
    def found(self) -> dict[str, float]:
        peak = self.peak[self.case.ours] / self.peak[self.case.peak_base]
        return {"seconds": self.seconds[self.case.ours].median, "peak": peak}

    @property
    def missed(self) -> list[str]:
        """The limits that are exceeded."""
        return [name for name, limit in self.case.limits.items() if self.found[name] > limit]


class Holder(nn.Module):
    """Experts as a part of a model, with the frozen Parameters of others."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = copy.deepcopy(experts)
        for own, shared in zip(self.experts.parameters(), experts.parameters(), strict=True):
            own.data = shared.data

    def forward(self, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        return self.experts(x, index, shares)


class Linears(nn.Module):
    """The same experts with one nn.Linear per matrix."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        width = experts.down_proj.shape[2]
        for name, weights in (
            ("gate_proj", experts.gate_up_proj[:, :width]),
            ("up_proj", experts.gate_up_proj[:, width:]),
            ("down_proj", experts.down_proj),
        ):
            setattr(self, name, nn.ModuleList(map(_linear, weights)))

    def forward(self, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        hit = nn.functional.one_hot(index, len(self.up_proj)).permute(2, 1, 0)
        for expert in hit.sum((1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(hit[expert])
            rows = x[token]
            gate = nn.functional.silu(self.gate_proj[expert](rows))
            rows = self.down_proj[expert](gate * self.up_proj[expert](rows))
            y.index_add_(0, token, (rows * shares[token, slot, None]).to(y.dtype))
        return y


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.out_features, made.in_features = weight.shape
    return made


class WithDropout(nn.Module):
    """The experts with stacks of adapters, and dropout while training."""

    def __init__(self, experts: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]]):
        super().__init__()
        self.experts = experts
        self.adapters = nn.ModuleDict(
            {name: nn.ParameterList(pair) for name, pair in adapters.items()}
        )

    def forward(self, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        p = 0.1 if self.training else 0.0
        adapters = {n: ExpertAdapter(*pair, ALPHA / RANK, p) for n, pair in self.adapters.items()}
        return experts_forward(self.experts, x, index, shares, adapters)


def draw_adapters(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Stacks ``(E, rank, in)`` and ``(E, out, rank)`` of both Parameters."""
    generator = torch.Generator().manual_seed(SEED)
    E, N = case.experts, case.width
    return {
        name: tuple(
            torch.randn(shape, generator=generator) * shape[2] ** -0.5
            for shape in ((E, RANK, N), (E, out, RANK))
        )
        for name, out in (("gate_up_proj", 2 * N), ("down_proj", N))
    }


def experts_model(case: Case, name: str, experts: nn.Module, device: str) -> nn.Module:
    """A provider's experts with the same adapters as every other's."""
    if name == FROZEN:
        return Holder(experts)
    adapters = {n: tuple(t.to(device) for t in pair) for n, pair in draw_adapters(case).items()}
    if name == FUNCTION:
        return WithDropout(experts, adapters)
    options = {"r": RANK, "lora_alpha": ALPHA}
    if name == LINEARS:
        config = peft.LoraConfig(**options, lora_dropout=0.1, target_modules=r".*proj\.\d+")
        model = peft.get_peft_model(Linears(experts), config)
    else:
        config = peft.LoraConfig(**options, target_modules=[], target_parameters=TARGETS)
        model = peft.get_peft_model(Holder(experts), config)
    with torch.no_grad():
        for layer_name, layer in model.named_modules():
            if not isinstance(layer, peft.tuners.lora.LoraLayer):
                continue
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if name == LINEARS:
                _, _, kind, expert = layer_name.split(".")
                both = adapters["down_proj" if kind == "down_proj" else "gate_up_proj"]
                rows = {"gate_proj": slice(case.width), "up_proj": slice(case.width, None)}
                A.copy_(both[0][int(expert)])
                B.copy_(both[1][int(expert)][rows.get(kind, slice(None))])
            else:
                both = adapters[layer.parameter_name]
                A.copy_(both[0].flatten(0, 1))
                B.copy_(both[1].permute(1, 2, 0).flatten(1))
    if name == PATCHED:
        _patch(model)
    return model.base_model.model


def _patch(model: nn.Module) -> None:
    report = patch_peft(model)
    if kept := [why for why in report.layers.values() if why is not None]:
        raise WrongResultError(f"expected every adapter to run fused, got {kept[0]}")


def experts_steps(case: Case, device: str) -> dict[str, Callable[[bool], list[Tensor]]]:
    """A step (output and gradients) of each provider; its argument is whether dropout is on."""
    torch.manual_seed(SEED)
    E, N, dtype = case.experts, case.width, getattr(torch, case.dtype)
    config = transformers.Qwen3MoeConfig(
        hidden_size=N, moe_intermediate_size=N, num_experts=E, num_experts_per_tok=case.top
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=N**-0.5)
    experts.to(device, dtype).requires_grad_(False)
    x = torch.randn(case.tokens, N).to(device, dtype).requires_grad_()
    shares, index = torch.randn(case.tokens, E).to(device).softmax(-1).topk(case.top)
    shares = (shares / shares.sum(-1, keepdim=True)).to(dtype)
    dy = torch.randn_like(x)
    names = (LINEARS, FUNCTION) if case.kind == "dropout" else (PEFT, PATCHED)

    def step_of(name: str) -> Callable[[bool], list[Tensor]]:
        model = experts_model(case, name, experts, device)
        trained = [p for p in model.parameters() if p.requires_grad]

        def step(dropout: bool = True) -> list[Tensor]:
            model.train(dropout)
            y = model(x, index, shares)
            return [y, *torch.autograd.grad(y, [x, *trained], dy)]

        return step

    return {name: step_of(name) for name in (FROZEN, *names)}


def model_steps(case: Case, device: str) -> dict[str, Callable[[bool], list[Tensor]]]:
    """A training step of each provider, with AdamW and a new batch."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024, hidden_size=case.width, num_hidden_layers=4, head_dim=64,
        num_attention_heads=max(1, case.width // 64), num_key_value_heads=1, use_cache=False,
        moe_intermediate_size=case.width, num_experts=case.experts, num_experts_per_tok=case.top,
    )  # fmt: skip

    def step_of(name: str) -> Callable[[bool], list[Tensor]]:
        torch.manual_seed(SEED)
        model = transformers.Qwen3MoeForCausalLM(config).to(device, getattr(torch, case.dtype))
        options = {"target_modules": ["q_proj", "v_proj"], "target_parameters": TARGETS}
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(p, std=0.02)
        if name == PATCHED:
            _patch(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        generator = torch.Generator().manual_seed(SEED)

        def step(update: bool = True) -> list[Tensor]:
            # Another batch each time: a vendor's GEMM may be slow at a first number of rows.
            ids = torch.randint(1024, (4, case.tokens // 4), generator=generator).to(device)
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if update:
                optimizer.step()
                return []
            return [loss.detach(), *(p.grad.clone() for p in trained)]

        return step

    return {name: step_of(name) for name in (PEFT, PATCHED)}


def measure(case: Case, device: str, seconds: float) -> Row:
    """Check the results of a case, then measure it.

    Raises:
        WrongResultError: the providers do not agree, or PEFT's forward runs where patched.
    """
    steps = (model_steps if case.kind == "model" else experts_steps)(case, device)
    # In bfloat16 a router near a tie may choose another expert: a model is checked in float32.
    exact = replace(case, dtype="float32") if case.kind == "model" else case
    _check(exact, steps if exact == case else model_steps(exact, device))
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = timing.interleaved(steps, device=device, seconds=seconds, min_rounds=8, clock=clock)
    peak = {name: memory.peak_of(step, torch.device(device)) for name, step in steps.items()}
    medians = {name: timing.quartiles(values).median * 1e3 for name, values in times.items()}
    return Row(case, timing.ratios(times, case.base), medians, peak)


def _check(case: Case, steps: dict[str, Callable[[bool], list[Tensor]]]) -> None:
    base, ours = (steps[name](False) for name in (case.base, case.ours))
    if case.kind == "dropout":  # the adapters are grouped differently: only y and dx are the same
        base, ours = base[:2], ours[:2]
    for expected, value in zip(base, ours, strict=True):
        if not relative_rms(value, expected.double()) <= TOLERANCE[case.dtype]:
            raise WrongResultError(f"{case}: expected the results of PEFT")


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case of the chosen kinds."""
    sizes = ((8, 2, 64),) if args.quick else ((32, 4, 512), (16, 2, 256))
    tokens = 64 if args.quick else TOKENS
    for kind in args.kinds:
        for size in sizes[:1] if kind == "model" else sizes:
            for dtype in args.dtypes:
                yield Case(kind, *size, dtype, tokens)


def render(rows: list[Row], about: dict) -> str:
    """The table; a limit that is missed has an exclamation mark."""
    lines = [label(about), f"{rows[0].case.tokens} tokens, rank {RANK}, adapters in float32"]
    head = f"{'':<34}{'ms':>8}{'of PEFT':>9}{'[quartiles]':>16}{'':>8}{'of frozen':>10}"
    lines.append(head + f"{'peak over frozen':>18}{'':>7}{'of PEFT':>9}")
    for row in rows:
        case, t, ours = row.case, row.seconds[row.case.ours], row.case.ours
        limit, frozen = partial(limit_of, row), row.peak.get(FROZEN)
        time_of_frozen = row.milliseconds[ours] / row.milliseconds[FROZEN] if frozen else None
        peaks = [row.peak[ours] / b if b else None for b in (frozen, row.peak[case.base])]
        spread = f"[{t.q1:.3f}, {t.q3:.3f}]"
        shown = [f"{p:.3f}" if p else "-" for p in (time_of_frozen, *peaks)]
        limits = (limit("peak"), "") if case.kind != "model" else ("", limit("peak"))
        line = f"{case!s:<34}{row.milliseconds[ours]:>8.2f}{t.median:>9.3f}{spread:>16}"
        line += f"{limit('seconds'):<8}{shown[0]:>10}{shown[1]:>18}{limits[0]:<8}"
        lines.append(f"{line}{shown[2]:>8}{limits[1]}".rstrip())
    return "\n".join([*lines, *verdict(rows)]) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; invalid ones end the script with one line and status 2."""
    parser = command.options(__doc__, "segments")
    add = parser.add_argument
    add("--kinds", type=command.names(KINDS), default=list(KINDS), metavar="NAME,…")
    add("--dtypes", type=command.names(TOLERANCE), default=list(TOLERANCE), metavar="NAME,…")
    add_seconds(parser, SECONDS, QUICK_SECONDS)
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, 2 (after one line) on an error."""
    args = parse(argv)
    return measure_all(args, cases(args), measure, render)


if __name__ == "__main__":
    raise SystemExit(main())
