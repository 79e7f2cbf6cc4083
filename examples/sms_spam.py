"""Fine-tune a pretrained transformer as a spam filter: ``python examples/sms_spam.py --data DIR``.

The model gets a head with two classes, and every linear layer, including the head, gets a LoRA
adapter of rank 16; only the adapters are trained. In the first epoch three implementations
alternate, step by step, from the same values on the same batches: fused_lora, PEFT and the
tutorial's layer. Their times and losses can thus be compared.

Model: ``--weights`` names a GPT-2 checkpoint. The default is SmolLM2-135M; with ``--quick`` or
``--small`` it is MiniLM. Both come from packages that contain the weights. Every number printed
names its model.

Data: ``SMSSpamCollection`` in ``--data`` or FUSED_LORA_DATA. Without it the task is to tell
sentences of Python's documentation from PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time

import common
import text
import torch
import transformers
from torch import Tensor, nn

from fused_lora import apply_lora, disable_lora, lora_layers, lora_parameters

RANK, ALPHA = 16, 16.0
TARGET = 0.95  # required accuracy on the test texts
LOSS_TOLERANCE = 1e-3  # between implementations
COMPARED = 20  # steps whose losses are compared; later, rounding differences have grown


class TutorialLayer(nn.Module):
    """The textbook layer ``linear(x) + alpha/rank·(x A) B``, one call per product."""

    def __init__(self, linear: nn.Module, sizes: tuple[int, int]):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.empty(sizes[0], RANK))
        self.B = nn.Parameter(torch.zeros(RANK, sizes[1]))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + ALPHA / RANK * (x @ self.A @ self.B)


def tutorial_model(base: nn.Module, fused: nn.Module) -> nn.Module:
    """A copy of ``base`` with the tutorial's layers, which start with the values of ``fused``."""
    model = copy.deepcopy(base).requires_grad_(False)
    for name, layer in lora_layers(fused).items():
        parent, _, last = name.rpartition(".")
        sizes = layer.lora_A.shape[1], layer.lora_B.shape[0]
        adapted = TutorialLayer(model.get_submodule(name), sizes).to(layer.lora_A.device)
        with torch.no_grad():
            adapted.A.copy_(layer.lora_A.t())
            adapted.B.copy_(layer.lora_B.t())
        setattr(model.get_submodule(parent), last, adapted)
    return model


def peft_model(base: nn.Module, fused: nn.Module) -> nn.Module | None:
    """A copy of ``base`` in PEFT, with ``fused``'s adapters; None if PEFT is not installed."""
    try:
        import peft
    except ModuleNotFoundError:
        print("no peft: `pip install peft` to compare with it")
        return None
    layers = lora_layers(fused)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(layers))
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, layer in layers.items():
        theirs = model.base_model.model.get_submodule(name)
        with torch.no_grad():
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return model


def gpt2_counts() -> tuple[int, int, int]:
    """Parameter counts on the meta device: no weights are needed.

    Returns the tutorial's GPT-2 classifier, its adapters, and the adapters with a fused ``c_attn``.
    """
    with torch.device("meta"):
        model = text.gpt2(transformers.GPT2Model(transformers.GPT2Config()))
        fused = text.Classifier(transformers.GPT2Model(transformers.GPT2Config()), mean=False)
    total = common.count(model.parameters())
    for classifier in (model, fused):
        apply_lora(classifier, rank=RANK, alpha=ALPHA)
    return total, *(common.count(lora_parameters(m)) for m in (model, fused))


def first_epoch(models: dict[str, nn.Module], data: list[text.Batch], args):
    """Train the models in alternation, batch by batch. Returns seconds and losses by name."""
    seconds, losses = dict.fromkeys(models, 0.0), {name: [] for name in models}
    names = list(models)
    steps = {
        name: text.steps(model, optimizer(model, args), data) for name, model in models.items()
    }
    for index, _ in enumerate(common.progress(data, desc="epoch 1, each in turn")):
        # Rotated, so that no model always runs first.
        for name in names[index % len(names) :] + names[: index % len(names)]:
            torch.manual_seed(index)  # the model's own dropout drops the same entries in all
            start = time.perf_counter()
            losses[name].append(next(steps[name]))
            seconds[name] += time.perf_counter() - start
    return seconds, losses


def optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(common.trainable(model), lr=args.lr, weight_decay=0.1)


def load(args: argparse.Namespace) -> text.Pretrained:
    """The model that the options select."""
    if args.weights:
        return text.load_gpt2(args.weights)
    return text.load_minilm() if args.quick or args.small else text.load_smollm2()


def read(args: argparse.Namespace) -> tuple:
    """The training, validation and test texts; prints where they come from."""
    if not args.data:
        texts = text.balanced(text.read_documentation(), 150 if args.quick else text.EACH)
        print("no --data: sentences of Python's documentation or PyTorch's, not SMS messages")
        return text.split(texts)
    texts = text.balanced(text.read_sms(args.data), 150 if args.quick else text.EACH)
    leaky = text.leaky_split(texts)
    print(
        f"SMS Spam: {len(texts):,} messages, half of them spam; the tutorial's split would have"
        f" {text.leaked(leaky[0], leaky[2])} of its {len(leaky[2])} test messages in its training"
        " part word for word; here, none"
    )
    return text.split(texts)


def run(args: argparse.Namespace) -> bool:
    """Adapt, train and compare. Returns whether every required check passed."""
    total, split, fused = gpt2_counts()
    print(f"GPT-2-124M with this head: {total:,} parameters, {split:,} in adapters of rank {RANK}")
    print(f"({fused:,} if query, key and value stay one layer, as in a Hugging Face checkpoint)")
    device = common.device(args)
    parts = read(args)
    torch.manual_seed(args.seed)
    pretrained = load(args)
    name, base = pretrained.name, pretrained.model.to(device)
    test = text.batches(parts[2], pretrained, device)
    validation = text.batches(parts[1], pretrained, device)
    plain = text.logits(base, test)

    torch.manual_seed(args.seed)
    model = copy.deepcopy(base)
    apply_lora(model, rank=RANK, alpha=ALPHA, impl=args.impl)
    common.check_run(model, text.BATCH * 32)
    before = text.logits(model, test)
    numbers = common.count(common.trainable(model)), common.count(model.parameters())
    print(f"{name}: {numbers[0]:,} of {numbers[1]:,} parameters train, on {device}")
    sizes = [len(part) for part in parts]
    print("{} texts to train on, {} to validate, {} to test".format(*sizes), flush=True)

    models = {"fused_lora": model, "PEFT": peft_model(base, model)}
    models["tutorial"] = tutorial_model(base, model)
    models = {key: value for key, value in models.items() if value is not None}
    draw = random.Random(args.seed)
    data = text.batches(parts[0], pretrained, device, draw)
    seconds, losses = first_epoch(models, data, args)
    curve = losses["fused_lora"]
    history = [text.accuracy(text.logits(model, validation), validation)]
    others = {key: value for key, value in models.items() if key != "fused_lora"}
    ends = {key: text.accuracy(text.logits(other, test), test) for key, other in others.items()}
    ends["fused_lora"] = text.accuracy(text.logits(model, test), test)
    del models, others
    print(f"\n{name}: the first epoch, {len(data)} steps of {text.BATCH}, measured on {device}")
    print(f"{'':<12}{'seconds':>9}{'ratio':>8}{'last loss':>11}{'test accuracy':>15}")
    for key, spent in seconds.items():
        ratio, end = spent / seconds["fused_lora"], losses[key][-1]
        print(f"{key:<12}{spent:>9.1f}{ratio:>8.2f}{end:>11.4f}{ends[key]:>15.1%}")

    adam = optimizer(model, args)
    for epoch in range(2, (1 if args.quick else args.epochs) + 1):
        data = text.batches(parts[0], pretrained, device, draw)
        steps = text.steps(model, adam, data)
        curve += [next(steps) for _ in common.progress(data, desc=f"epoch {epoch}")]
        history.append(text.accuracy(text.logits(model, validation), validation))
    after = text.logits(model, test)
    with disable_lora(model):
        off = text.logits(model, test)
    start, end = text.accuracy(before, test), text.accuracy(after, test)
    print(f"\n{name}: accuracy on {sizes[2]} test texts {start:.1%} before, {end:.1%} after")
    print("validation by epoch: " + ", ".join(f"{value:.1%}" for value in history))
    plot(args, name, curve, history, seconds)

    gaps = [
        abs(a - b)
        for key in losses
        for a, b in zip(curve[:COMPARED], losses[key][:COMPARED], strict=True)
    ]
    learned = {
        f"{end:.1%} of the test texts right, at least {TARGET:.0%}": end >= TARGET,
        f"{start:.1%} right before, near 50%": 0.35 <= start <= 0.65,
    }
    required = {
        f"GPT-2: {total:,} parameters, 124,441,346 in the tutorial": total == 124_441_346,
        f"GPT-2: {split:,} in adapters, 2,666,528 in the tutorial": split == 2_666_528,
        f"GPT-2, c_attn not split: {fused:,}, expected 2,371,616": fused == 2_371_616,
        "before a step: the plain model's logits": torch.allclose(before, plain, atol=1e-5),
        "off: the plain model's logits, bit for bit": torch.equal(off, plain),
        "no test text in the training part": text.leaked(parts[0], parts[2]) == 0,
        f"{COMPARED} steps: losses within {max(gaps):.1e} of each other": max(gaps)
        <= LOSS_TOLERANCE,
    }
    return common.passed(required, learned, args.quick)


def plot(args, name: str, curve: list[float], history: list[float], seconds: dict) -> None:
    """Draw the loss, the accuracy per epoch, and the times of the first epoch."""
    with common.picture(args.out / "sms_spam.png", f"{name}: spam or ham", 3) as axes:
        if not axes:
            return
        window = max(1, len(curve) // 60)
        spans = range(0, len(curve) - window + 1, window)
        axes[0].plot(
            [i + window for i in spans], [sum(curve[i : i + window]) / window for i in spans]
        )
        axes[0].set(title="Training", xlabel="step", ylabel=f"loss, mean of {window}")
        epochs = range(1, len(history) + 1)
        axes[1].plot(epochs, [100 * value for value in history], "o-")
        axes[1].set(title="Validation", xlabel="epoch", ylabel="accuracy in %", xticks=epochs)
        common.bars(axes[2], list(seconds), {"first epoch": list(seconds.values())}, "%.0f")
        axes[2].set(title="Time of the first epoch", ylabel="seconds")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__, f"the folder of {text.SMS}")
    parser.add_argument("--weights", metavar="GPT2", help="a GPT-2 checkpoint in safetensors")
    parser.add_argument("--small", action="store_true", help="MiniLM instead of SmolLM2")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of training")
    parser.add_argument("--lr", type=float, help="AdamW's rate; default 0.0002, MiniLM's 0.002")
    args = parser.parse_args(argv)
    small = not args.weights and (args.quick or args.small)
    args.lr = args.lr or (2e-3 if small else 2e-4)
    return args


if __name__ == "__main__":
    raise SystemExit(common.main(run, parse(None)))
