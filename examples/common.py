"""Shared by the examples: options, data with known checksums, progress, checks, pictures."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

try:
    import torch
    from torch import Tensor, nn

    import fused_lora
except ModuleNotFoundError as error:
    print(f"error: {error}: run `pip install .` in the repository", file=sys.stderr)
    raise SystemExit(2) from None

try:
    from tqdm import tqdm as progress
except ModuleNotFoundError:

    def progress(items: Iterable, desc: str) -> Iterator:
        items = list(items)
        for index, item in enumerate(items):
            if index % 50 == 0:
                print(f"{desc}: {index} of {len(items)}", flush=True)
            yield item


IMPLS = ("auto", "torch", "reference", "triton")


class SetupError(Exception):
    """Raised if an example cannot run; the message says why and what to do."""


def need(name: str, install: str) -> NoReturn:
    """Exit with status 2 because the package ``name`` is missing."""
    print(f"error: no {name}: `{install}`", file=sys.stderr)
    raise SystemExit(2) from None


def options(description: str, data: str) -> argparse.ArgumentParser:
    """The options of every example; ``data`` is the help text of ``--data``."""
    parser = argparse.ArgumentParser(description=description.partition(":")[0])
    add, folder = parser.add_argument, os.environ.get("FUSED_LORA_DATA") or None
    add("--data", type=Path, default=folder, metavar="DIR", help=data)
    add("--impl", default="auto", choices=IMPLS, help="implementation of the adapters")
    add("--seed", type=int, default=0, help="seed of weights, batches and dropout masks")
    add("--quick", action="store_true", help="under a minute; missed learning targets only noted")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="folder of the picture")
    return parser


def device(args: argparse.Namespace) -> str:
    """The device of the run: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"


def read_checked(path: Path, sha256: str, fetch: str, decode: Callable = bytes) -> bytes:
    """A file's decoded contents, checked to be those that the published numbers were measured on.

    Raises:
        SetupError: the file is missing, damaged or another; the message ends with ``fetch``.
    """
    if not path.parent.is_dir():
        raise SetupError(f"no directory {path.parent}: {fetch}")
    if not path.is_file():
        raise SetupError(f"no {path.name} in {path.parent}: {fetch}")
    try:
        raw = decode(path.read_bytes())
    except (EOFError, ValueError, OSError) as error:
        raise SetupError(f"{path} is truncated or damaged: {error}; {fetch}") from error
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise SetupError(f"{path} has sha256 {found[:12]}…, expected {sha256[:12]}…; {fetch}")
    return raw


def package(name: str, install: str) -> Path:
    """The folder of an installed package, whose data files are read without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"no {name}: `{install}`")
    return Path(spec.submodule_search_locations[0])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters to give to an optimizer."""
    return [p for p in model.parameters() if p.requires_grad]


def count(parameters: Iterable[Tensor]) -> int:
    """The number of elements in ``parameters``."""
    return sum(p.numel() for p in parameters)


def check_run(model: nn.Module, tokens: int) -> None:
    """Print which implementation runs the adapters; raise SetupError if it cannot run here."""
    layer = next(m for m in fused_lora.lora_layers(model).values() if not m.no_kernel)
    try:
        print(f"adapters run by {fused_lora.explain(layer, tokens=tokens)}", flush=True)
    except (RuntimeError, ValueError) as error:
        raise SetupError(str(error)) from error


def passed(required: dict[str, bool], learned: dict[str, bool], quick: bool) -> bool:
    """Print every check and return whether the run passed.

    A quick run is too short to learn much, so that missed ``learned`` checks are only noted.
    """
    for text, good in (learned | required).items():
        missed = "note" if quick and text in learned else "FAIL"
        print(f"{'PASS' if good else missed}  {text}")
    return all(required.values()) and (quick or all(learned.values()))


@contextmanager
def picture(path: Path, title: str, panels: int, width: float = 4.5) -> Iterator[list | None]:
    """Yields axes side by side and then saves them as ``path``; yields None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("matplotlib is not installed: no picture")
        yield None
        return
    figure = Figure(figsize=(width * panels, 4), layout="constrained")  # Agg: needs no display
    figure.suptitle(title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    yield list(axes)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def bars(panel, labels: list[str], series: dict[str, list[float]], form: str = "%g") -> None:
    """Grouped bars; if there are several series, the first one is grey."""
    width = 0.8 / len(series)
    for index, (name, heights) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(labels))]
        color = "0.65" if index == 0 and len(series) > 1 else f"C{max(0, index - 1)}"
        drawn = panel.bar(places, heights, 0.95 * width, color=color, label=name)
        panel.bar_label(drawn, fmt=form, padding=2, fontsize=8)
    panel.set_xticks(range(len(labels)), labels)
    panel.margins(y=0.2)
    if len(series) > 1:
        panel.legend(loc="upper left", ncols=len(series), frameon=False, fontsize=8)


def main(run: Callable[[argparse.Namespace], bool], args: argparse.Namespace) -> int:
    """The exit status: 0 if the checks passed, 1 if one failed, 2 if the example could not run."""
    try:
        return 0 if run(args) else 1
    except (OSError, OverflowError, ValueError, SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
