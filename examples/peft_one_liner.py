"""PEFT with and without the one line: ``python examples/peft_one_liner.py --data DIR``.

A pretrained MiniLM with a classification head gets LoRA from PEFT. Of two identical copies, one is
patched with ``patch_peft``. Both train on the same batches in alternation, in float32 and in
bfloat16 with PEFT's float32 adapters. The report compares the losses, the time per step, and the
memory that autograd saves for backward (on a GPU, peak memory). A picture shows the loss curves.

Data: ``SMSSpamCollection`` in ``--data`` or FUSED_LORA_DATA. Without it the task is to tell
sentences of Python's documentation from PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time

import common
import text
import torch
from torch import nn

from fused_lora import patch_peft, unpatch_peft

try:
    import peft
except ModuleNotFoundError:
    common.need("peft", "pip install peft")

RATE = 5e-4
COMPARED = 20  # steps whose losses are compared; later, rounding differences have grown
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
VARIANTS = ("PEFT", "patched")


def kept_bytes(model: nn.Module, batch: text.Batch) -> int:
    """The bytes that a step needs besides the model.

    On a GPU this is the peak of allocated memory; on a CPU, the tensors saved for backward.
    """
    if batch.ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nn.functional.cross_entropy(model(batch.ids, batch.mask), batch.labels).backward()
        model.zero_grad()
        return torch.cuda.max_memory_allocated() - before
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(batch.ids, batch.mask), batch.labels)
    size = sum(storage.nbytes() for storage in kept.values())
    del loss
    return size


def compare(base: text.Classifier, dtype: torch.dtype, data: list[text.Batch], args) -> dict:
    """Train with and without the patch. Returns losses, seconds and bytes per step, by variant."""
    torch.manual_seed(args.seed)
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=args.dropout,
        target_modules=r".*encoder.*(query|key|value|dense)",
        modules_to_save=["head"],
    )
    models = {"PEFT": peft.get_peft_model(copy.deepcopy(base).to(dtype), config)}
    models["patched"] = copy.deepcopy(models["PEFT"])
    report = patch_peft(models["patched"])  # the one line
    print(f"\n{str(dtype).removeprefix('torch.')}: {report.summary}", flush=True)
    size = {name: kept_bytes(model.train(), data[0]) for name, model in models.items()}
    steps = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(common.trainable(model), lr=RATE)
        steps[name] = text.steps(model, optimizer, data)
    losses, seconds = ({name: [] for name in models} for _ in range(2))
    for index, _ in enumerate(common.progress(data, desc="each in turn")):
        for name in VARIANTS if index % 2 else reversed(VARIANTS):
            torch.manual_seed(index)  # the model's own dropout drops the same entries in both
            start = time.perf_counter()
            losses[name].append(next(steps[name]))
            seconds[name].append(time.perf_counter() - start)
    unpatch_peft(models["patched"])
    return {"losses": losses, "seconds": seconds, "bytes": size, "fused": report.summary}


def run(args: argparse.Namespace) -> bool:
    """Compare in both dtypes. Returns whether every required check passed."""
    device = common.device(args)
    each = 100 if args.quick else text.EACH
    if not args.data:
        print("no --data: sentences of Python's documentation or PyTorch's, not SMS messages")
    texts = text.read_sms(args.data) if args.data else text.read_documentation()
    parts = text.split(text.balanced(texts, each))
    torch.manual_seed(args.seed)
    pretrained = text.load_minilm()
    base = pretrained.model.to(device)
    data = text.batches(parts[0], pretrained, device, random.Random(args.seed))
    print(f"{pretrained.name}, {len(data)} steps of {text.BATCH} texts, measured on {device}")
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype).removeprefix("torch.")] = compare(base, dtype, data, args)

    what = "peak" if device == "cuda" else "saved for backward"
    print(f"\n{'':<10}{'':<9}{'ms a step':>10}{'ratio':>7}{'MB ' + what:>22}{'last 20 losses':>16}")
    learned, required = {}, {}
    for name, result in results.items():
        times = {v: 1e3 * statistics.median(result["seconds"][v]) for v in VARIANTS}
        for variant in VARIANTS:
            tail = statistics.mean(result["losses"][variant][-20:])
            size = result["bytes"][variant] / 1e6
            ratio = times[variant] / times["PEFT"]
            print(
                f"{name:<10}{variant:<9}{times[variant]:>10.1f}{ratio:>7.2f}{size:>22.1f}{tail:>16.4f}"
            )
            learned[f"{name}, {variant}: the loss falls to {tail:.3f}"] = tail < 0.4
        curves = [result["losses"][variant][:COMPARED] for variant in VARIANTS]
        gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
        if args.dropout == 0:
            bound = TOLERANCE[name]
            required[f"{name}: {COMPARED} losses within {gap:.1e}, at most {bound:.0e}"] = (
                gap <= bound
            )
        less = 1 - result["bytes"]["patched"] / result["bytes"]["PEFT"]
        # In float32 without dropout PEFT saves only x and A x, and backward needs both.
        least = 0.0 if name == "float32" and args.dropout == 0 else 0.1
        required[f"{name}: {less:.0%} less {what}, at least {least:.0%}"] = less >= least
        required[f"{name}: {result['fused']}"] = "keep" not in result["fused"]
    plot(args, pretrained.name, results)
    return common.passed(required, learned, args.quick)


def plot(args: argparse.Namespace, name: str, results: dict) -> None:
    """The loss curves of both dtypes."""
    with common.picture(args.out / "peft_one_liner.png", f"{name}: PEFT and one line", 2) as axes:
        for panel, (dtype, result) in zip(axes or (), results.items(), strict=False):
            for variant, style in zip(VARIANTS, ("-", "--"), strict=True):
                curve = result["losses"][variant]
                window = max(1, len(curve) // 30)
                ends = range(window, len(curve) + 1, window)
                means = [statistics.mean(curve[end - window : end]) for end in ends]
                panel.plot(list(ends), means, style, label=variant)
            panel.set(title=dtype, xlabel="step", ylabel=f"loss, mean of {window}")
            panel.legend(frameon=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__, f"the folder of {text.SMS}")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout before the adapters")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))
