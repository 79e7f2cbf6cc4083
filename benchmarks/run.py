"""Time forward and backward of adapted layers: every provider against the frozen layer.

    python benchmarks/run.py --quick

Prints a table and writes ``DEVICE-DATE.json``, ``.csv`` and plots. benchmarks/README.md describes
the protocol and the file format.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # unbound threads cause millisecond outliers

import torch
from tqdm import tqdm

from harness import machine
from harness.command import Parser, names, positive
from harness.shapes import MODELS, Shape, default_set, is_for_emulation, of_model
from layer.measure import measure
from layer.problem import WrongResultError
from layer.providers import PROVIDERS
from report import compare, records, table

DTYPES = ("bfloat16", "float16", "float32")
SECONDS = {"quick": 150.0, "full": 1080.0}
MODEL_TOKENS = {"cuda": 8192, "mps": 1024, "cpu": 512}

Key = tuple[Shape, str, float]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; invalid ones end the script with one line and status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick")
    size.add_argument("--full", dest="size", action="store_const", const="full")
    parser.set_defaults(size="quick")
    add("--device", choices=devices(), default=devices()[0])
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    add("--dropout", nargs="+", type=_probability, default=[0.0, 0.1], metavar="P")
    add("--models", type=names(MODELS), metavar="NAME,…", help=f"{', '.join(MODELS)}; rank 16")
    add("--tokens", type=positive, metavar="M", help="tokens per row, with --models")
    add("--shapes", nargs="+", type=_shape, metavar="M,K,N,R", help="these instead of a set")
    add("--providers", type=names(PROVIDERS), default=list(PROVIDERS), metavar="NAME,…")
    add("--seconds", type=_seconds, metavar="S", help="for all rows; default 150, --full 1080")
    add("--out", type=Path, default=Path("results"), metavar="DIR")
    add("--compare", type=Path, metavar="OLD.json", help="list what became slower or faster")
    args = parser.parse_args(argv)
    if args.models and args.shapes:
        parser.error("expected --models or --shapes, got both")
    if args.tokens and not args.models:
        parser.error("expected --models with --tokens, which sets the tokens of the models' rows")
    return args


def devices() -> list[str]:
    """The devices that torch can use on this machine, fastest first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [*(name for name, there in found.items() if there), "cpu"]


def shapes(args: argparse.Namespace) -> list[Shape]:
    """The shapes that the options select."""
    if args.shapes:
        return args.shapes
    if args.models:
        tokens = args.tokens or MODEL_TOKENS[args.device]
        return [shape for name in args.models for shape in of_model(name, tokens)]
    return list(default_set(args.device, args.size == "full"))


def keys(args: argparse.Namespace) -> list[Key]:
    """Shape, dtype and dropout of every row, in the table's order.

    A set (``--quick``, ``--full``) omits shapes that would take hours in a dtype that the CPU
    emulates. Shapes given explicitly are never omitted.
    """
    found = [(s, d, p) for d in args.dtype for p in args.dropout for s in shapes(args)]
    if args.shapes or args.models:
        return found
    full = args.size == "full"
    emulated = [dtype for dtype in machine.emulated(args.device) if dtype in args.dtype]
    kept = [key for key in found if key[1] not in emulated or is_for_emulation(key[0], full)]
    if len(kept) < len(found):
        print(
            f"left out: {len(found) - len(kept)} large rows of {' and '.join(emulated)}, which this"
            " CPU has no instructions for; use --shapes to measure them",
            file=sys.stderr,
        )
    return kept


def run(args: argparse.Namespace) -> records.Report:
    """Measure every row; each gets an equal share of the time that is left.

    Emulated dtypes run first, so that the other rows share what these overrun. Then small shapes
    run before large ones, which get the time that the small ones did not use.
    """
    emulated = machine.emulated(args.device)
    rows = keys(args)
    in_turn = sorted(rows, key=lambda key: (key[1] not in emulated, key[0].step_flops))
    end = time.perf_counter() + (args.seconds or SECONDS[args.size])
    done = {}
    for index, key in enumerate(progress := tqdm(in_turn, unit="row")):
        shape, dtype, p = key
        progress.set_description(f"{shape}, {dtype}, dropout {p:g}")
        share = (end - time.perf_counter()) / (len(rows) - index)
        done[key] = measure(*key, device=args.device, providers=args.providers, seconds=share)
    return records.Report(machine.describe(args.device), [done[key] for key in rows])


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when everything was measured, 2 (after one line) on an error."""
    args = parse(argv)
    try:
        old = records.load(args.compare) if args.compare else None
        args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after minutes of timing
        report = run(args)
        print(table.render(report))
        stem = args.out / f"{args.device}-{report.machine['date'][:10]}"
        for path in [*report.save(stem), *_plots(report, stem)]:
            print(f"wrote {path}")
        if old:
            print(f"\n{compare.render(old, report)}")
    except (OSError, WrongResultError, records.FormatError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _plots(report: records.Report, stem: Path) -> list[Path]:
    try:
        from report import plot
    except ModuleNotFoundError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []
    return plot.draw(report, stem)


def _shape(text: str) -> Shape:
    try:
        shape = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        shape = None
    if shape is None or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected M,K,N,R as four positive numbers, got {text}")
    return shape


def _probability(text: str) -> float:
    p = _number(text)
    if not 0 <= p < 1:
        raise argparse.ArgumentTypeError(f"expected a probability in [0, 1), got {text}")
    return p


def _seconds(text: str) -> float:
    seconds = _number(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return seconds


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text}") from None


if __name__ == "__main__":
    raise SystemExit(main())
