"""Modelled traffic and time of a LoRA layer, this library's and peers': ``model_report.py --help``.

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
from modelled import peer_traffic

# The widths of the hardware-counter readings published with LoRAFusion.
SQUARE = {str(width): (width, width) for width in (4096, 5120, 8192)}
MODELS = {
    **{name: shapes.MODELS[name] for name in ("llama3-8b", "qwen2.5-32b", "llama3-70b")},
    "square": SQUARE,
}
GPUS = ["a100", "h100", "h200", "b200", "rtx4090", "mi300x"]
OURS = ("split", "seeded", "addmm")
TRITON = ("lorafusion", "split")  # their frozen products run in Triton, the others' in vendor GEMMs
TITLE = "{:<24}{:^57}{:^17}{:^64}"
HEAD = (
    f"{'layer':<15}{'M':>6}   {'eager GiB':>9}{'chained':>10}{'lorafusion':>12}{'split':>8}"
    f"{'seeded':>8}{'addmm':>8}  {'vendor':>8}{'split':>7}  {'frozen µs':>10}{'eager':>7}"
    f"{'chained':>9}{'lorafusion':>12}{'split':>7}{'seeded':>8}{'addmm':>7}{'auto':>7}"
    "  auto's strategies"
)
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
    add("--gpu", nargs="+", choices=list(KNOWN), default=GPUS, metavar="GPU", help=", ".join(KNOWN))
    models, names = list(MODELS), ", ".join(MODELS)
    add("--model", nargs="+", choices=models, default=models[:3], metavar="MODEL", help=names)
    add("--rank", nargs="+", type=_positive, default=[16], metavar="R")
    tokens = [128, 2048, 8192, 32_768]
    add("--tokens", nargs="+", type=_positive, default=tokens, metavar="M")
    add("--dropout", nargs="+", type=_probability, default=[0.0, 0.1], metavar="P")
    add(
        "--overhead", action="store_true", help="passes over x, launches and time of our strategies"
    )
    add("--json", type=Path, metavar="F", help="also write every row to a file")
    return parser.parse_args(argv)


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


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 if the JSON file cannot be written."""
    args = parse(argv)
    print("Every figure is modelled, none is measured. Thin bytes and times of one forward and")
    print("backward: eager's thin bytes and the frozen layer's time, then ratios to these.")
    print("* x or y is under 1.5 times the cache before DRAM: outside the model's validity.")
    print("- nobody has published how fast Triton's products are on this architecture.")
    if args.overhead:
        print("Overhead is the time beyond the frozen layer's, in parts of it; a pass is one of x.")
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
    if args.json:
        try:
            args.json.write_text(json.dumps(records, indent=1) + "\n")
        except OSError as error:
            print(f"expected a file that can be written, got {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
