"""Modelled traffic and time of LoRA layers, this library's and peers': ``model_report.py --help``.

Nothing here is measured: every figure comes from ``strategy/traffic.py`` and ``strategy/cost.py``,
for one forward and backward in bfloat16 with adapters of the same dtype. Thin bytes are the traffic
that the adapter adds outside the two frozen products, masks and partial sums included. GEMM bytes
are the traffic of the frozen products, with tiles in groups of 8 row blocks for every
implementation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product as combinations
from pathlib import Path

from fused_lora.strategy import cost, schedule
from fused_lora.strategy.devices import KNOWN, Device
from fused_lora.strategy.traffic import Kernel, Product
from harness import shapes
from modelled import decoder, experts, peer_traffic

# The widths of the hardware-counter readings published with LoRAFusion.
SQUARE = {str(width): (width, width) for width in (4096, 5120, 8192)}
MODELS = {
    **{name: shapes.MODELS[name] for name in ("llama3-8b", "qwen2.5-32b", "llama3-70b")},
    "square": SQUARE,
}
# What is reported unless selected: of single layers, and with --decoder.
LAYERS = {
    "gpu": ["a100", "h100", "h200", "b200", "rtx4090", "mi300x"],
    "model": list(MODELS)[:3],
    "tokens": [128, 2048, 8192, 32_768],
}
DECODER = {
    "gpu": ["h100", "a100", "h200", "mi300x", "rtx4090"],
    "model": ["llama3-8b"],
    "tokens": [4096],
}
EXPERTS = LAYERS | {"tokens": [512, 4096, 16_384]}
OURS = ("split", "seeded", "addmm")
TRITON = ("lorafusion", "split")  # their frozen products run in Triton, the others' in vendor GEMMs
TITLE = "{:<24}{:^57}{:^17}{:^64}"
HEAD = (
    f"{'layer':<15}{'M':>6}   {'eager GiB':>9}{'chained':>10}{'lorafusion':>12}{'split':>8}"
    f"{'seeded':>8}{'addmm':>8}  {'vendor':>8}{'split':>7}  {'frozen µs':>10}{'eager':>7}"
    f"{'chained':>9}{'lorafusion':>12}{'split':>7}{'seeded':>8}{'addmm':>7}{'auto':>7}"
    "  auto's strategies"
)
LAYERS_NOTE = """Every figure is modelled, none is measured. Thin bytes and times of one forward and
backward: eager's thin bytes and the frozen layer's time, then ratios to these."""
DECODER_NOTE = """Every figure is modelled, none is measured. Forward and backward of the adapted
layers of a decoder layer, apart (one by one, with PyTorch's activation) and together (q, k, v as a
chain; the gated MLP as one block). Passes over the layer's input are traffic beside the frozen
products; times are in µs, beyond those of the frozen products. A strategy is one of each direction
apart; together it is forward's, and the products of backward are the vendor's."""
EXPERTS_NOTE = """Every figure is modelled, none is measured. Compulsory bytes of one forward and
backward of a layer's experts: those of the frozen products, and those that adapters of rank {} add,
by PEFT and by the kernels over segments: added to the vendor's product, or with it in lora_gemm."""
OVERHEAD_HEAD = (
    f"{'layer':<15}{'M':>6}   {'strategy':<22}{'passes':>8}{'launches':>10}"
    f"{'forward':>10}{'backward':>10}{'both':>8}"
)


@dataclass(frozen=True)
class Row:
    """One layer on one GPU.

    Attributes:
        product: the forward product.
        schedules: the kernels of each implementation, by its name.
        auto: the strategies, forward and backward, that ``impl="auto"`` selects without tuning.
    """

    gpu: str
    model: str
    layer: str
    product: Product
    schedules: dict[str, list[Kernel]]
    auto: tuple[str, str]

    @property
    def device(self) -> Device:
        return KNOWN[self.gpu]

    @property
    def valid(self) -> bool:
        """Whether x and y are too large to be served from the cache, as the model assumes."""
        c = self.product
        return cost.is_valid(self.device, c.M * min(c.L, c.N) * c.itemsize)

    def thin(self, name: str) -> float:
        """Traffic in bytes outside the frozen products."""
        return sum(kernel.thin_bytes for kernel in self.schedules[name])

    def gemm(self, name: str) -> float:
        """Traffic in bytes of the frozen products."""
        return sum(kernel.gemm_bytes for kernel in self.schedules[name])

    def seconds(self, name: str) -> float | None:
        """Modelled time; None if no speed of Triton's GEMM was published for the GPU."""
        if name in TRITON and not self.device.has_gemm_ratio:
            return None
        return cost.seconds(self.schedules[name], self.device)

    def text(self) -> str:
        """One line of the table."""
        thin, floor = self.thin("eager"), self.seconds("frozen")
        cells = f"{self.layer:<15}{self.product.M:>6} {' ' if self.valid else '*'} "
        cells += f"{thin / 2**30:>9.3f}"
        widths = {"chained": 10, "lorafusion": 12, **dict.fromkeys(OURS, 8)}
        for name, width in widths.items():
            cells += f"{self.thin(name) / thin:>{width}.3f}"
        cells += f"  {self.gemm('frozen') / 2**30:>8.2f}{self.gemm('split') / 2**30:>7.2f}"
        cells += f"  {floor * 1e6:>10.0f}"
        widths = {"eager": 7, "chained": 9, "lorafusion": 12}
        widths |= {"split": 7, "seeded": 8, "addmm": 7, "auto": 7}
        for name, width in widths.items():
            time = self.seconds(name)
            cells += f"{'-':>{width}}" if time is None else f"{time / floor:>{width}.2f}"
        return f"{cells}  {' / '.join(self.auto)}"

    def overhead(self) -> str:
        """What each strategy adds to the frozen layer: one line per strategy, and auto's choice."""
        c, device, lines = self.product, self.device, []
        frozen = [cost.seconds([kernel], device) for kernel in self.schedules["frozen"]]
        for names in (*((name, name) for name in OURS), self.auto):
            both = [
                schedule.direction(device, *call)
                for call in zip(names, (c, schedule.back(c)), strict=True)
            ]
            kernels = both[0] + both[1]
            passes = sum(kernel.thin_bytes for kernel in kernels) / (c.M * c.L * c.itemsize)
            times = [cost.seconds(one, device) for one in both]
            times, floors = [*times, sum(times)], [*frozen, sum(frozen)]
            if "split" in names and not device.has_gemm_ratio:
                cells = [f"{'-':>{width}}" for width in (10, 10, 8)]
            else:
                cells = [
                    f"{time / floor - 1:>+{width}.1%}"
                    for time, floor, width in zip(times, floors, (10, 10, 8), strict=True)
                ]
            name = f"auto: {' / '.join(names)}" if names is self.auto else names[0]
            start = f"{self.layer:<15}{c.M:>6} {' ' if self.valid else '*'} {name:<22}"
            lines.append(f"{start}{passes:>8.2f}{len(kernels):>10}{''.join(cells)}")
        return "\n".join(lines)

    def record(self) -> dict:
        """The row as JSON-compatible data."""
        c = self.product
        return {
            "gpu": self.gpu,
            "model": self.model,
            "layer": self.layer,
            "M": c.M,
            "K": c.L,
            "N": c.N,
            "rank": c.R,
            "dropout": c.masked is not None,
            "valid": self.valid,
            "auto": self.auto,
            "modelled": {
                name: {
                    "thin_bytes": self.thin(name),
                    "gemm_bytes": self.gemm(name),
                    "flops": sum(kernel.flops for kernel in kernels),
                    "launches": [[k.name, k.thin_bytes, k.gemm_bytes] for k in kernels],
                    "seconds": self.seconds(name),
                }
                for name, kernels in self.schedules.items()
            },
        }


def make_row(gpu: str, model: str, layer: str, c: Product) -> Row:
    """Model every implementation of one layer."""
    device = KNOWN[gpu]
    auto = tuple(
        cost.choose_strategy(
            device,
            c.itemsize,
            c.M,
            columns,
            inner,
            c.R,
            masked=masked,
            aligned=True,
            gradients=gradients,
        )[0]
        for columns, inner, masked, gradients in (
            (c.N, c.L, c.masked, False),
            (c.L, c.N, "output" if c.masked else None, True),
        )
    )
    schedules = {"frozen": peer_traffic.frozen(device, c)}
    schedules |= {name: run(device, c) for name, run in peer_traffic.PEERS.items()}
    schedules |= {name: schedule.layer(device, c, name, name) for name in OURS}
    schedules["auto"] = schedule.layer(device, c, *auto)
    return Row(gpu, model, layer, c, schedules, auto)


def make_tables(args: argparse.Namespace) -> Iterator[tuple[str, list[Row]]]:
    """One table (its title and rows) per GPU, dropout, rank and model."""
    for gpu, p, rank, model in combinations(args.gpu, args.dropout, args.rank, args.model):
        # Traffic depends on whether there is dropout, not on its probability.
        case = Product(0, 0, 0, rank, masked="operand" if p else None)
        rows = [
            make_row(gpu, model, layer, replace(case, M=M, L=K, N=N))
            for layer, (K, N) in MODELS[model].items()
            for M in args.tokens
        ]
        yield f"modelled: {KNOWN[gpu].name}, {model}, rank {rank}, dropout {p:g}", rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options; the error for an unknown name lists the known ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    add = parser.add_argument
    add("--gpu", nargs="+", choices=list(KNOWN), metavar="GPU", help=", ".join(KNOWN))
    models, names = list(MODELS), ", ".join(MODELS)
    add("--model", nargs="+", choices=models, metavar="MODEL", help=names)
    add("--rank", nargs="+", type=_positive, default=[16], metavar="R")
    add("--tokens", nargs="+", type=_positive, metavar="M")
    add("--dropout", nargs="+", type=_probability, default=[0.0, 0.1], metavar="P")
    table = parser.add_mutually_exclusive_group()
    table.add_argument(
        "--overhead", action="store_true", help="passes over x, launches and time of our strategies"
    )
    table.add_argument(
        "--decoder",
        action="store_true",
        help="decoder layers: their projections apart and together",
    )
    table.add_argument(
        "--experts", action="store_true", help="experts of a mixture, PEFT's and over segments"
    )
    add("--json", type=Path, metavar="F", help="also write every row to a file")
    args = parser.parse_args(argv)
    defaults = EXPERTS if args.experts else DECODER if args.decoder else LAYERS
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.decoder and "square" in args.model:
        parser.error("argument --decoder: square has no decoder layers")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability in [0, 1), got {text!r}")
    return value


def report_layers(args: argparse.Namespace) -> list[dict]:
    """Print all tables of single layers; the rows as data."""
    records = []
    for title, rows in make_tables(args):
        print(f"\n{title}")
        if args.overhead:
            print(OVERHEAD_HEAD)
            for row in rows:
                print(row.overhead())
            continue
        print(
            TITLE.format("", "modelled thin bytes", "modelled GEMM GiB", "modelled time").rstrip()
        )
        print(HEAD)
        for row in rows:
            print(row.text())
        records += [row.record() for row in rows]
    return records


def report_decoders(args: argparse.Namespace) -> list[dict]:
    """Print a table per GPU, model, rank, dropout and number of tokens; the rows as data."""
    records = []
    for gpu, model, rank, p, M in combinations(
        args.gpu, args.model, args.rank, args.dropout, args.tokens
    ):
        device = KNOWN[gpu]
        case = Product(M, 0, 0, rank, masked="operand" if p else None)
        print(f"\nmodelled: {device.name}, {model}, {M} tokens, rank {rank}, dropout {p:g}")
        print(decoder.HEAD)
        for strategies in decoder.STRATEGIES:
            used, parts = decoder.make_parts(device, MODELS[model], case, strategies)
            call = {"gpu": gpu, "model": model, "M": M, "rank": rank, "dropout": bool(p)}
            for part in parts:
                print(f"{strategies:<10}{part.text()}")
                records.append(call | {"strategies": strategies} | part.record())
            if strategies == "auto":
                print(f"auto selects {', '.join(used)}")
    return records


def report_experts(args: argparse.Namespace) -> list[dict]:
    """Print a table per rank; the rows as data."""
    records = []
    for rank in args.rank:
        print(f"{EXPERTS_NOTE.format(rank)}\n\n{experts.HEAD}")
        for model in experts.MODELS:
            for tokens in args.tokens:
                records.append(experts.row(model, tokens, rank))
                print(experts.text(records[-1]))
    return records


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 if the JSON file cannot be written."""
    args = parse(argv)
    if args.experts:
        return _written(args, report_experts(args))
    print(DECODER_NOTE if args.decoder else LAYERS_NOTE)
    print("* x or y is under 1.5 times the cache before DRAM: outside the model's validity.")
    print("- nobody has published how fast Triton's products are on this architecture.")
    if args.overhead:
        print("Overhead is the time beyond the frozen layer's, in parts of it; a pass is one of x.")
    records = report_decoders(args) if args.decoder else report_layers(args)
    return _written(args, records)


def _written(args: argparse.Namespace, records: list[dict]) -> int:
    """The exit status, after the rows are written, if they shall be."""
    if args.json:
        try:
            args.json.write_text(json.dumps(records, indent=1) + "\n")
        except OSError as error:
            print(f"expected a file that can be written, got {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
