"""Inference latency that adapters add, by depth: bottlenecks, and LoRA unmerged, merged, unloaded.

    python benchmarks/adapter_latency.py

One text runs through the first layers of a BERT-base-shaped encoder with random weights: plain,
with two bottleneck adapters per layer (Houlsby et al., 2019), with LoRA on every linear layer, with
that LoRA merged (merge_lora: it can still be unmerged) and with it unloaded (unload_lora: plain
layers again). The variants take turns; the extra latency is a call's time minus the plain model's
in the same round. Hu et al. (2021) claim that bottlenecks add latency with depth and a merged LoRA
adds none; the output ends with a verdict per variant.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # unbound threads cause millisecond outliers

import torch
from torch import Tensor, nn

from fused_lora import apply_lora, lora_layers, merge_lora, unload_lora
from harness import command, machine, timing
from layer.problem import WrongResultError, relative_rms
from report.records import label
from whole_model.results import Point

with command.imports():
    from transformers import BertConfig, BertModel

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from bottleneck import BOTTLENECK, insert_bottlenecks

RANK = 8
DEPTHS, QUICK_DEPTHS = [1, 2, 4, 8, 12, 18, 24], [1, 2, 4]
TOKENS = [1, 128]
ROUNDS, QUICK_ROUNDS = 30, 10
SEED = 0
PLAIN = "plain"
VARIANTS = ("bottleneck", "LoRA, unmerged", "LoRA, merged", "LoRA, unloaded")


class Stack(nn.Module):
    """A BERT encoder; a call runs the first ``depth`` of its layers, see :meth:`use`."""

    def __init__(self, depth: int, tiny: bool):
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
        config = BertConfig(num_hidden_layers=depth, vocab_size=2, **sizes if tiny else {})
        self.encoder = BertModel(config, add_pooling_layer=False).encoder
        self.layers, self.width = self.encoder.layer, config.hidden_size

    def use(self, depth: int) -> None:
        self.encoder.layer = self.layers[:depth]

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).last_hidden_state


def stacks(depth: int, device: str, dtype: torch.dtype, tiny: bool) -> dict[str, Stack]:
    """Every variant with the same weights.

    Each has its own copy of them: with a shared copy, one variant would warm the caches for the
    next.
    """
    torch.manual_seed(SEED)
    plain = Stack(depth, tiny).to(device, dtype).eval()
    bottleneck, unmerged = copy.deepcopy(plain), copy.deepcopy(plain)
    insert_bottlenecks(bottleneck.layers)
    apply_lora(unmerged, rank=RANK, alpha=2 * RANK, adapter_dtype=dtype)
    for layer in lora_layers(unmerged).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    merged = copy.deepcopy(unmerged)
    merge_lora(merged, keep_base=False)
    unloaded = unload_lora(copy.deepcopy(unmerged))
    made = (plain, bottleneck, unmerged, merged, unloaded)
    return {
        name: stack.eval().requires_grad_(False)
        for name, stack in zip((PLAIN, *VARIANTS), made, strict=True)
    }


def check(models: dict[str, Stack], x: Tensor) -> None:
    """Check that merged and unloaded equal unmerged, and that every adapter changes the output.

    The reference is the unmerged LoRA in float64. The others may have twice the error that the
    unmerged LoRA has in this dtype (the cost of rounding), plus one unit round-off.

    Raises:
        WrongResultError: one of these does not hold.
    """
    exact = copy.deepcopy(models["LoRA, unmerged"]).double()(x.double())
    outputs = {name: model(x) for name, model in models.items()}
    errors = {name: relative_rms(y, exact) for name, y in outputs.items()}
    allowed = 2 * errors["LoRA, unmerged"] + torch.finfo(x.dtype).eps / 2
    for name in ("LoRA, merged", "LoRA, unloaded"):
        if not errors[name] <= allowed:
            raise WrongResultError(
                f"expected {name} within {allowed:.1e} of the unmerged one, got {errors[name]:.1e}"
            )
    if errors[PLAIN] <= allowed:
        raise WrongResultError("expected a LoRA that changes the output, got the plain model's")
    # Bottlenecks start near the identity, so any difference is enough.
    if torch.equal(outputs["bottleneck"], outputs[PLAIN]):
        raise WrongResultError("expected bottlenecks that change the output, got the plain model's")


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Point]:
    """Check at full depth, then measure every depth and text length."""
    dtype = getattr(torch, args.dtype)
    models = stacks(max(args.depths), args.device, dtype, args.quick)
    width = models[PLAIN].width
    points = []
    for tokens in args.tokens:
        x = torch.randn(1, tokens, width, device=args.device, dtype=dtype)
        for model in models.values():
            model.use(max(args.depths))
        check(models, x)
        for depth in args.depths:
            print(f"{tokens} tokens, {depth} layers", file=sys.stderr, flush=True)
            for model in models.values():
                model.use(depth)
            calls = {name: lambda model=model, x=x: model(x) for name, model in models.items()}
            times = timing.interleaved(calls, device=args.device, seconds=0, min_rounds=args.rounds)
            points.append(_point(depth, tokens, times))
    return points


def _point(depth: int, tokens: int, times: dict[str, list[float]]) -> Point:
    plain = times[PLAIN]
    extra = {
        name: timing.quartiles([t - p for t, p in zip(times[name], plain, strict=True)])
        for name in VARIANTS
    }
    seconds = {name: timing.quartiles(values) for name, values in times.items()}
    return Point(depth, tokens, seconds, extra)


def render(points: list[Point], args: argparse.Namespace, about: dict) -> str:
    """The table, and below it the verdict on every variant."""
    tiny = " (tiny)" if args.quick else ""
    lines = [
        label(about),
        f"one text through BERT-base-shaped layers{tiny}, {args.dtype},"
        f" bottlenecks of {BOTTLENECK}, LoRA of rank {RANK}, {args.rounds} rounds",
    ]
    for tokens in args.tokens:
        own = [point for point in points if point.tokens == tokens]
        lines.append(f"\n{tokens} tokens: plain in ms; extra in ms [quartiles], and of plain")
        lines.append(f"{'layers':<8}{PLAIN:>8}" + "".join(f"{name:>32}" for name in VARIANTS))
        for point in own:
            cells = "".join(f"{_cell(point, name):>32}" for name in VARIANTS)
            plain = 1e3 * point.seconds[PLAIN].median
            lines.append(f"{point.depth:<8}{plain:>8.2f}{cells}")
        lines += [verdict(own[-1], name) for name in VARIANTS]
    return "\n".join(lines) + "\n"


def _cell(point: Point, name: str) -> str:
    median, q1, q3 = (1e3 * t for t in asdict(point.extra[name]).values())
    share = point.extra[name].median / point.seconds[PLAIN].median
    return f"{median:.3f} [{q1:.3f}, {q3:.3f}] {share:+.0%}"


def verdict(point: Point, name: str) -> str:
    """Whether the extra latency differs from zero: both its quartiles have the same sign."""
    extra = point.extra[name]
    a_layer = 1e3 * extra.median / point.depth
    if extra.q1 > 0:
        found = f"adds latency, {a_layer:.3f} ms a layer"
    elif extra.q3 < 0:
        found = f"is faster, {-a_layer:.3f} ms a layer"
    else:
        found = "adds none that is told from the spread"
    return f"{name}: at {point.depth} layers {found}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; invalid ones end the script with one line and status 2."""
    parser = command.options(__doc__, "adapter-latency")
    add = parser.add_argument
    add("--depths", type=command.positives, metavar="N,…", help="layers; default 1 to 24")
    add("--tokens", type=command.positives, default=TOKENS, metavar="N,…")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    add("--rounds", type=command.positive, help=f"default {ROUNDS}, --quick {QUICK_ROUNDS}")
    args = parser.parse_args(argv)
    args.depths = args.depths or (QUICK_DEPTHS if args.quick else DEPTHS)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, 2 (after one line) on an error."""
    args = parse(argv)
    with command.imports():
        from whole_model.latency_plot import draw
    try:
        points = run(args)
        about = machine.describe(args.device)
        data = {"machine": about, "dtype": args.dtype, "rounds": args.rounds, "tiny": args.quick}
        data |= {"points": [asdict(point) for point in points]}
        command.write(args, data, render(points, args, about), draw(points, label(about)))
    except (OSError, WrongResultError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
