"""Training steps of whole models with LoRA on every linear layer: this library against PEFT.

    python benchmarks/model_step.py

The models are GPT-2 (124M parameters) and SmolLM2 (135M) with random weights, on batches of 4 texts
of 128 tokens. "fused" computes layers of one input together, "fused-alone" every layer alone. First
every provider must reproduce PEFT's loss curve (whole_model/loss_curves.py). Then the providers'
steps are timed in turn on the same batches. Prints a table, and writes it with the data as JSON and
a plot.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from dataclasses import asdict, replace

os.environ.setdefault("OMP_PROC_BIND", "true")  # unbound threads cause millisecond outliers

import torch
from torch import nn

from harness import command, machine, timing
from layer import memory
from layer.problem import WrongResultError
from report.records import label
from whole_model import trainers
from whole_model.loss_curves import Check, check
from whole_model.process_memory import resident
from whole_model.results import Result, Row
from whole_model.trainers import PARTS, Setting, Trainer

MODELS = ["gpt2", "smollm2-135m"]
DROPOUTS = (0.0, 0.1)
ROUNDS, QUICK_ROUNDS = 10, 5
BASE = "peft"  # the ratios are to its step


def measure(base: nn.Module, setting: Setting, names: list[str], rounds: int) -> Row:
    """Time steps of one copy of ``base`` per provider, in turn, on the same batches."""
    trainers = {name: Trainer(copy.deepcopy(base), name, setting) for name in names}
    steps = {name: trainer.step for name, trainer in trainers.items()}
    times = timing.interleaved(steps, device=setting.device, seconds=0, min_rounds=rounds)
    ratios = timing.ratios(times, BASE)
    results = {}
    for name, trainer in trainers.items():
        seconds = timing.quartiles(times[name])
        parts = trainer.part_seconds()
        results[name] = Result(
            seconds,
            {part: timing.quartiles(parts[part][timing.WARM_UPS :]) for part in PARTS},
            ratios[name],
            setting.tokens / seconds.median,
            trainer.held_bytes,
            memory.peak_of(trainer.step, trainer.device),
            None,
        )
    del trainers, steps
    if setting.device == "cpu" and not setting.tiny:
        results = {
            name: replace(result, process=resident(setting, name))
            for name, result in results.items()
        }
    return Row(setting, results)


def run(args: argparse.Namespace) -> tuple[list[Check], list[Row]]:
    """Check the loss curves of every model, then measure it without and with dropout."""
    names = trainers.providers(args.dtype)
    checks, rows = [], []
    for model in args.models:
        setting = Setting(model, args.dtype, device=args.device, tiny=args.quick)
        base = trainers.base_model(setting)
        print(f"{model}: loss curves", file=sys.stderr, flush=True)
        checks.append(check(base, setting, names))
        for p in DROPOUTS:
            print(f"{model}: steps with dropout {p:g}", file=sys.stderr, flush=True)
            rows.append(measure(base, replace(setting, dropout=p), names, args.rounds))
    return checks, rows


def render(checks: list[Check], rows: list[Row], about: dict, rounds: int) -> str:
    """The table, and below it the results of the checks and the meaning of the columns."""
    lines = [label(about)]
    head = ("ms [quartiles]", "of peft", *PARTS, "tokens/s", "held MB", "step MB", "process MB")
    for row in rows:
        s = row.setting
        texts, tokens = s.batch_shape
        tiny = " (tiny)" if s.tiny else ""
        lines += [
            f"\n{s.model}{tiny}, {s.dtype}, dropout {s.dropout:g}: {texts} x {tokens} tokens,"
            f" rank {trainers.RANK}, {rounds} rounds",
            f"{'':<13}{head[0]:>22}{head[1]:>8}" + "".join(f"{h:>11}" for h in head[2:]),
        ]
        lines += [f"{name:<13}{_cells(result)}" for name, result in row.results.items()]
    lines.append("")
    for found in checks:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
        lines.append(
            f"{found.model}: {len(found.wider)} losses from {found.wider[0]:.3f} to"
            f" {found.wider[-1]:.3f}, off those of a wider dtype by {errors}; allowed"
            f" {found.tolerance:.1e}"
        )
    lines += [
        "held: weights, adapters, optimizer; step: the most allocated at once beside them;",
        "process: the most resident of a process of its own, in brackets its rise by the steps",
    ]
    return "\n".join(lines) + "\n"


def _cells(result: Result) -> str:
    ms = [1e3 * t for t in asdict(result.seconds).values()]
    times = f"{ms[0]:.1f} [{ms[1]:.1f}, {ms[2]:.1f}]"
    parts = "".join(f"{1e3 * result.parts[part].median:>11.1f}" for part in PARTS)
    held, step = result.held_bytes / 1e6, result.step_bytes / 1e6
    process = "-"
    if result.process:
        peak, built = result.process.peak / 1e6, result.process.built / 1e6
        process = f"{peak:.0f} ({peak - built:.0f})"
    return (
        f"{times:>22}{result.ratio.median:>8.2f}{parts}{result.tokens_per_second:>11.0f}"
        f"{held:>11.1f}{step:>11.1f}{process:>13}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; invalid ones end the script with one line and status 2."""
    parser = command.options(__doc__, "model-step")
    known = trainers.MODELS
    add = parser.add_argument
    add("--models", type=command.names(known), default=MODELS, metavar="NAME,…")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the base; default bfloat16, float32 if emulated",
    )
    add("--rounds", type=command.positive, help=f"default {ROUNDS}, --quick {QUICK_ROUNDS}")
    args = parser.parse_args(argv)
    if args.dtype is None:
        takes_hours = not args.quick and "bfloat16" in machine.emulated(args.device)
        args.dtype = "float32" if takes_hours else "bfloat16"
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, 2 (after one line) on an error."""
    args = parse(argv)
    with command.imports():
        from whole_model.model_plot import draw
    try:
        checks, rows = run(args)
        about = machine.describe(args.device)
        data = {"machine": about, "rounds": args.rounds}
        data |= {"checks": [asdict(c) | {"errors": c.errors} for c in checks]}
        data |= {"rows": [asdict(row) for row in rows]}
        text = render(checks, rows, about, args.rounds)
        command.write(args, data, text, draw(checks, rows, label(about)))
    except (OSError, WrongResultError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
