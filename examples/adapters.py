"""LoRA against other adapters on one small transformer: ``python examples/adapters.py --data DIR``.

The same pretrained MiniLM learns the same task in five ways: its head alone; LoRA on its linear
layers; LoRA on its embedding table too; bottleneck adapters (Houlsby et al., 2019); and prefixes
behind a gate that starts at zero (LLaMA-Adapter, Zhang et al., 2023). The head trains in all five.
The table lists trainable parameters, size on disk, accuracy, and the times of a training step and
of one text.

Then a second LoRA adapter is trained for a second task, and the two alternate in the merged
weights. Swapping by adding and subtracting updates makes the base weights drift; restoring the
base from a copy does not.

Data: the first task is ``SMSSpamCollection`` in ``--data`` or FUSED_LORA_DATA. The second task, and
the first without that file, is to tell sentences of Python's documentation from PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import text
import torch
from bottleneck import BOTTLENECK, insert_bottlenecks
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_lora import (
    add_adapter,
    apply_lora,
    lora_layers,
    merge_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)

RANK, PREFIX = 8, 10
RATE = 5e-4
TOKENS = 32  # length of the text whose latency is measured
TASKS = ("first", "second")


class GatedPrefix(nn.Module):
    """Adds attention to trained prefix vectors, through one gate per head that starts at zero."""

    def __init__(self, attention: nn.Module, length: int = PREFIX):
        super().__init__()
        self.attention, self.heads = attention, attention.num_attention_heads
        width = attention.query.in_features
        self.prefix = nn.Parameter(torch.randn(length, width) * 0.02)
        self.gate = nn.Parameter(torch.zeros(self.heads, 1, 1))
        attention.query.register_forward_hook(self._keep_query)

    def _keep_query(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._query = output  # BERT's attention does not return its queries

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple:
        context, *rest = self.attention(hidden_states, *args, **kwargs)
        key, value = (
            self._by_head(layer(self.prefix).expand(len(hidden_states), -1, -1))
            for layer in (self.attention.key, self.attention.value)
        )
        extra = nn.functional.scaled_dot_product_attention(self._by_head(self._query), key, value)
        extra = (self.gate.tanh() * extra).transpose(-3, -2).flatten(-2)
        return (context + extra, *rest)


def with_lora(model: text.Classifier, impl: str, embedding: bool = False) -> None:
    targets = r"backbone\.encoder\..*(query|key|value|dense)"
    if embedding:
        targets += r"|backbone\.embeddings\.word_embeddings"
    apply_lora(model, rank=RANK, alpha=2 * RANK, target_modules=targets, impl=impl)


def with_bottlenecks(model: text.Classifier) -> None:
    model.requires_grad_(False)
    insert_bottlenecks(model.backbone.encoder.layer)


def with_prefixes(model: text.Classifier) -> None:
    model.requires_grad_(False)
    for layer in model.backbone.encoder.layer:
        layer.attention.self = GatedPrefix(layer.attention.self)


def methods(impl: str) -> dict[str, Callable[[text.Classifier], None]]:
    """How each method changes a model; the head trains in addition."""
    return {
        "head alone": lambda model: model.requires_grad_(False),
        "LoRA": lambda model: with_lora(model, impl),
        "LoRA, embedding": lambda model: with_lora(model, impl, embedding=True),
        "bottleneck": with_bottlenecks,
        "gated prefix": with_prefixes,
    }


def adapted(base: text.Classifier, method: Callable, seed: int) -> text.Classifier:
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    method(model)
    model.head.requires_grad_(True)
    return model.to(base.head.weight.device)


def train(model, texts, pretrained, epochs: int, seed: int, desc: str) -> None:
    draw = random.Random(seed)
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(common.trainable(model), lr=RATE, weight_decay=0.01)
    torch.manual_seed(seed)
    for epoch in range(epochs):
        data = text.batches(texts, pretrained, device, draw)
        steps = text.steps(model, optimizer, data)
        for _ in common.progress(data, desc=f"{desc}, epoch {epoch + 1}"):
            next(steps)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters without the head's."""
    named = model.named_parameters()
    return {n: p.detach() for n, p in named if p.requires_grad and not n.startswith("head.")}


def bytes_on_disk(model: nn.Module) -> int:
    """Size of the adapter's checkpoint; 0 without an adapter."""
    if not adapter_state(model):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if any(name.endswith("lora_A") for name in adapter_state(model)):
            save_adapter(model, folder)
        else:
            save_file(adapter_state(model), Path(folder, "adapter.safetensors"))
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; the calls alternate, so that drift affects all equally."""
    times = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= 2:  # the first two rounds are warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def step_times(models: dict[str, nn.Module], data: list[text.Batch], rounds: int):
    """Median milliseconds of forward and backward on one batch; works on copies of the models."""
    batch = data[len(data) // 2]
    states = {name: copy.deepcopy(model).train() for name, model in models.items()}

    def step(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            nn.functional.cross_entropy(model(batch.ids, batch.mask), batch.labels).backward()
            model.zero_grad()

        return call

    return medians({name: step(model) for name, model in states.items()}, rounds)


def latencies(models: dict[str, nn.Module], rounds: int) -> dict[str, float]:
    """Median milliseconds for one text of ``TOKENS`` tokens."""
    device = next(iter(models.values())).head.weight.device
    ids = torch.full((1, TOKENS), 2000, device=device)
    mask = torch.ones_like(ids)
    calls = {name: partial(model.eval(), ids, mask) for name, model in models.items()}
    with torch.no_grad():
        return medians(calls, rounds)


def updates(model: nn.Module) -> dict[str, list[Tensor]]:
    """By task, ``s·B A`` of every layer in the dtype of its weight."""
    found = {}
    for task in TASKS:
        set_adapter(model, task)
        layers = lora_layers(model).values()
        found[task] = [
            (layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())).to(layer.weight.dtype)
            for layer in layers
        ]
    return found


@torch.no_grad()
def swap(model: nn.Module, dtype: torch.dtype, swaps: int, data: list[text.Batch]) -> dict:
    """Alternate the two tasks in the merged weights, both ways.

    Returns the relative drift of the base weights for each way, the number of answers that the
    second way's drift changes, and milliseconds per swap.
    """
    model = copy.deepcopy(model).to(dtype)
    deltas = updates(model)
    layers = list(lora_layers(model).values())
    base = [layer.weight.clone() for layer in layers]
    spent = {"copy": 0.0, "subtract and add": 0.0}
    for index in range(swaps):
        start = time.perf_counter()
        set_adapter(model, TASKS[index % 2])
        merge_lora(model)
        unmerge_lora(model)
        spent["copy"] += time.perf_counter() - start
    copied = sum((x.weight - b).double().norm() ** 2 for x, b in zip(layers, base, strict=True))
    for index in range(swaps):
        start = time.perf_counter()
        for layer, update in zip(layers, deltas[TASKS[index % 2]], strict=True):
            layer.weight.add_(update).sub_(update)
        spent["subtract and add"] += time.perf_counter() - start
    drifted = sum((x.weight - b).double().norm() ** 2 for x, b in zip(layers, base, strict=True))
    size = sum(b.double().norm() ** 2 for b in base)
    set_adapter(model, TASKS[0])
    on_drifted = text.logits(model, data).argmax(1)
    for layer, weight in zip(layers, base, strict=True):
        layer.weight.copy_(weight)
    changed = (text.logits(model, data).argmax(1) != on_drifted).sum().item()
    return {
        "copied": (copied / size).sqrt().item(),
        "drifted": (drifted / size).sqrt().item(),
        "changed": changed,
        "milliseconds": {name: 1e3 * value / swaps for name, value in spent.items()},
    }


def run(args: argparse.Namespace) -> bool:
    """Train each way, measure and swap. Returns whether every required check passed."""
    device = common.device(args)
    each, epochs, rounds, swaps = (40, 1, 3, 4) if args.quick else (text.EACH, 3, 40, 100)
    documents = text.read_documentation()
    if not args.data:
        print("no --data: sentences of Python's documentation or PyTorch's, not SMS messages")
    messages = text.read_sms(args.data) if args.data else documents
    parts = text.split(text.balanced(messages, each))
    torch.manual_seed(args.seed)
    pretrained = text.load_minilm()
    base = pretrained.model.to(device)
    test = text.batches(parts[2], pretrained, device)
    plain = text.logits(base, test)
    print(f"{pretrained.name}: {common.count(base.parameters()):,} parameters, on {device}")
    print(f"{len(parts[0])} texts to train on, {len(parts[2])} to test", flush=True)

    models, starts, rows = {}, {}, {}
    for name, method in methods(args.impl).items():
        model = adapted(base, method, args.seed)
        starts[name] = (text.logits(model, test) - plain).abs().max().item()
        if name == "LoRA":
            common.check_run(model, text.BATCH * TOKENS)
        train(model, parts[0], pretrained, epochs, args.seed, name)
        models[name] = model
        state = adapter_state(model)
        rows[name] = {
            "parameters": common.count(state.values()),
            "kB": bytes_on_disk(model) / 1e3,
            "accuracy": text.accuracy(text.logits(model, test), test),
        }
    steps = step_times(models, test, rounds)
    served = {"plain": base, **models}
    merged = copy.deepcopy(models["LoRA"])
    merge_lora(merged)
    served["LoRA, merged"] = merged
    waits = latencies(served, rounds)
    print(f"\n{pretrained.name}, measured on {device}: a training step of {text.BATCH} texts and")
    print(f"one text of {TOKENS} tokens, medians of {rounds} in turn, as multiples")
    print(f"{'':<16}{'trained':>10}{'kB':>8}{'right':>8}{'step':>7}{'one text':>10}")
    for name, row in rows.items():
        cost = steps[name] / steps["head alone"], waits[name] / waits["plain"]
        print(
            f"{name:<16}{row['parameters']:>10,}{row['kB']:>8.0f}{row['accuracy']:>8.1%}"
            f"{cost[0]:>7.2f}{cost[1]:>10.2f}"
        )
    print(f"{'LoRA, merged':<16}{'':>33}{waits['LoRA, merged'] / waits['plain']:>10.2f}")
    print(
        f"1.00 is a step of the head alone, {steps['head alone']:.1f} ms, and a text through the"
        f" plain model, {waits['plain']:.1f} ms"
    )

    lora = copy.deepcopy(models["LoRA"])
    both = two_tasks(lora, documents, each, pretrained, epochs, args.seed)
    print(f"\ntwo tasks take turns in the merged weights, {swaps} times, measured on {device}")
    print(f"{'':<10}{'copy drifts':>12}{'add drifts':>12}{'answers':>9}{'copy':>9}{'add':>9}")
    drifts = {}
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        drifts[label] = result = swap(both, dtype, swaps, test)
        spent = result["milliseconds"]
        print(
            f"{label:<10}{result['copied']:>12.1e}{result['drifted']:>12.1e}{result['changed']:>9}"
            f"{spent['copy']:>6.1f} ms{spent['subtract and add']:>6.1f} ms"
        )
    print("drifts are of the base weights, relative; answers: how many the drift changes")
    plot(args, rows, waits)

    width, layers = base.head.in_features, len(base.backbone.encoder.layer)
    expected = 2 * layers * (2 * BOTTLENECK * width + width + BOTTLENECK)
    found = rows["bottleneck"]["parameters"]
    small = max(row["kB"] for row in rows.values())
    whole = 4e-3 * common.count(base.parameters())
    gap = (text.logits(merged, test) - text.logits(models["LoRA"], test)).abs().max().item()
    learned = {
        f"{name}: {row['accuracy']:.1%} right, at least 90%": row["accuracy"] >= 0.9
        for name, row in rows.items()
        if name != "head alone"
    }
    required = {
        f"bottleneck: {found:,} parameters, 2md + d + m each: {expected:,}": found == expected,
        f"{small:.0f} kB on disk at most, the model has {whole:.0f}": small < whole / 5,
        "LoRA starts as the plain model": max(starts["LoRA"], starts["LoRA, embedding"]) < 1e-5,
        "the gate starts closed": starts["gated prefix"] < 1e-5,
        f"bottleneck starts near it, within {starts['bottleneck']:.2f}": starts["bottleneck"] < 0.1,
        f"merged: logits within {gap:.1e}": gap < 1e-3,
        "copying drifts by nothing": all(row["copied"] == 0 for row in drifts.values()),
        "adding drifts": all(row["drifted"] > 0 for row in drifts.values()),
    }
    return common.passed(required, learned, args.quick)


def two_tasks(model, documents, each: int, pretrained, epochs: int, seed: int) -> nn.Module:
    """Add a second adapter to ``model`` and train it on the documents; the head is restored."""
    head = copy.deepcopy(model.head)
    for layer in lora_layers(model).values():
        layer.adapter_name = TASKS[0]
    add_adapter(model, TASKS[1], rank=RANK, alpha=2 * RANK)
    set_adapter(model, TASKS[1])
    parts = text.split(text.balanced(documents, each))
    train(model, parts[0], pretrained, epochs, seed, "second task")
    test = text.batches(parts[2], pretrained, model.head.weight.device)
    print(f"\nsecond task: {text.accuracy(text.logits(model, test), test):.1%} right")
    set_adapter(model, TASKS[0])
    model.head = head
    return model


def plot(args: argparse.Namespace, rows: dict, waits: dict) -> None:
    """Accuracy, size and latency of each method."""
    with common.picture(args.out / "adapters.png", "One model, five ways to adapt it", 3) as axes:
        if not axes:
            return
        values = {
            "right in %": {name: 100 * row["accuracy"] for name, row in rows.items()},
            "kB on disk": {name: row["kB"] for name, row in rows.items()},
            "time of one text, plain model 1": {
                name: waits[name] / waits["plain"] for name in waits if name != "plain"
            },
        }
        forms = ("%.1f", "%.0f", "%.2f")
        for panel, (title, heights), form in zip(axes, values.items(), forms, strict=True):
            names = [name.replace(" ", "\n") for name in heights]
            common.bars(panel, names, {title: list(heights.values())}, form)
            panel.set(title=title)
            panel.tick_params("x", labelsize=8)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    return common.options(__doc__, f"the folder of {text.SMS}").parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))
