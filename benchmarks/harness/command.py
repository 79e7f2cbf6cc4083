"""Command-line options and result files that the whole-model scripts share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Parser(argparse.ArgumentParser):
    """A parser whose errors end the script with one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def options(description: str, title: str) -> Parser:
    """A parser with the options of every script; ``title`` begins the names of its files."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--quick", action="store_true", help="tiny sizes, under a minute")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    parser.set_defaults(title=title)
    return parser


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return int(text)


def positives(text: str) -> list[int]:
    """Parse comma-separated positive numbers; the result is sorted, without duplicates."""
    return sorted({positive(part) for part in text.split(",")})


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return a parser for comma-separated names out of ``known``."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(
                f"expected names of {', '.join(known)}, got {', '.join(unknown)}"
            )
        return list(dict.fromkeys(found))

    return parse


@contextmanager
def imports() -> Iterator[None]:
    """End the script with one line and status 2 if an import in this block is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f'error: {error}: `pip install -e ".[bench,text]"`', file=sys.stderr)
        raise SystemExit(2) from None


def write(args: argparse.Namespace, data: dict, text: str, figure: Figure | None = None) -> None:
    """Print ``text``; save it, ``data`` and the plot, if any, as ``OUT/TITLE-DEVICE-DATE.*``."""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    date = data["machine"]["date"][:10]
    path = args.out / f"{args.title}-{args.device}-{date}.json"
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    path.with_suffix(".txt").write_text(text)
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    for kind in ("json", "txt") if figure is None else ("json", "txt", "png", "svg"):
        print(f"wrote {path.with_suffix(f'.{kind}')}")
