"""Train a whole model with every provider: the same weights, adapters and batches."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fused_lora import apply_lora, lora_layers, patch_peft
from harness.command import imports

with imports():
    # At import, transformers warns about an optional package that is not needed here.
    logging.disable(logging.WARNING)
    import peft
    import transformers

    logging.disable(logging.NOTSET)
    transformers.utils.logging.set_verbosity_error()

RANK, ALPHA, RATE = 16, 32, 1e-3
FREQUENT = 64  # token ids in the batches: few, so that 20 steps can learn something
SEED = 0
PARTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Setting:
    """What is trained; a ``tiny`` model has the same architecture with few, narrow blocks."""

    model: str
    dtype: str = "bfloat16"
    dropout: float = 0.0
    device: str = "cpu"
    tiny: bool = False

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Texts per step, and tokens per text."""
        return (4, 32) if self.tiny else (4, 128)

    @property
    def tokens(self) -> int:
        return self.batch_shape[0] * self.batch_shape[1]


def gpt2(tiny: bool) -> transformers.GPT2LMHeadModel:
    """124 million parameters, without GPT-2's own dropout, which would blur the curves."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512} if tiny else {}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet, use_cache=False))


def smollm2(tiny: bool) -> transformers.LlamaForCausalLM:
    """135 million parameters, with SmolLM2-135M's published sizes."""
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    if tiny:
        sizes = {
            "vocab_size": 512,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        }
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def llama_layer(tiny: bool) -> transformers.LlamaForCausalLM:
    """One decoder layer with Llama-3.2-1B's published sizes, and a small vocabulary."""
    width = {"hidden_size": 64, "intermediate_size": 256} if tiny else {}
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 2048} | width
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(
        **sizes, **heads, num_hidden_layers=1, tie_word_embeddings=True, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "smollm2-135m": smollm2, "llama-1b-layer": llama_layer}


def base_model(setting: Setting) -> nn.Module:
    """The model before it is adapted, with random weights in the setting's dtype.

    It is created in that dtype: a temporary wider copy would hide a step's memory peak.
    """
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setting.dtype))
    try:
        model = MODELS[setting.model](setting.tiny)
    finally:
        torch.set_default_dtype(before)
    return model.to(setting.device)


def with_peft(model: nn.Module, dropout: float, *, wide: bool, patched: bool = False) -> nn.Module:
    """Adapt ``model`` with PEFT; ``wide`` adapters are float32, PEFT's default."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Conv1D's transposed weight, which PEFT handles
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    if patched:
        patch_peft(model)
    return model


def with_ours(model: nn.Module, dropout: float, *, together: bool = True) -> nn.Module:
    """Adapt ``model`` with this library, with its default float32 adapters.

    Args:
        together: whether layers of one input, and gated MLPs, are computed together.
    """
    both = {"fuse_projections": together, "fuse_mlp": together}
    apply_lora(model, rank=RANK, alpha=ALPHA, dropout=dropout, **both)
    return model


PROVIDERS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "peft": partial(with_peft, wide=True),
    "peft-bf16": partial(with_peft, wide=False),
    "fused": with_ours,
    "fused-alone": partial(with_ours, together=False),
    "peft-patched": partial(with_peft, wide=True, patched=True),
}


def providers(dtype: str) -> list[str]:
    """The providers that differ: with a float32 base, both of PEFT's are the same."""
    return [name for name in PROVIDERS if dtype == "bfloat16" or name != "peft-bf16"]


def adapters(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """``lora_A (rank, in)`` and ``lora_B (out, rank)`` of every layer, in the model's order."""
    if not isinstance(model, peft.PeftModel):
        return [(layer.lora_A, layer.lora_B) for layer in lora_layers(model).values()]
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in layers]


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """Draw the same values for every provider, exact in bfloat16; B is nonzero, so A matters."""
    generator = torch.Generator().manual_seed(SEED)
    for pair in adapters(model):
        for matrix in pair:
            values = torch.randn(matrix.shape, generator=generator) * matrix.shape[1] ** -0.5
            matrix.copy_((values / 4).bfloat16())


def batches(setting: Setting) -> Iterator[Tensor]:
    """An endless stream of token ids, the same for every call."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randint(FREQUENT, setting.batch_shape, generator=generator).to(setting.device)


class Trainer:
    """One provider's model, its optimizer and its stream of batches.

    Args:
        model: from :func:`base_model`; adapted in place.

    Attributes:
        marks: per step, when each of :data:`PARTS` began and when the last one ended.
    """

    def __init__(self, model: nn.Module, provider: str, setting: Setting):
        self.device = torch.device(setting.device)
        self.model = PROVIDERS[provider](model, setting.dropout).train()
        draw_adapters(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)
        self.batches = batches(setting)
        self.marks: list[tuple] = []

    def step(self) -> Tensor:
        """Train on the next batch; return its loss before the update, without synchronising."""
        ids = next(self.batches)
        began = _mark(self.device)
        loss = self.model(input_ids=ids, labels=ids).loss
        forward = _mark(self.device)
        loss.backward()
        backward = _mark(self.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.marks.append((began, forward, backward, _mark(self.device)))
        return loss.detach()

    def part_seconds(self) -> dict[str, list[float]]:
        """Seconds of each part in every step; synchronise the device before the call."""
        return {
            part: [_between(*marks[i : i + 2]) for marks in self.marks]
            for i, part in enumerate(PARTS)
        }

    @property
    def held_bytes(self) -> int:
        """Weights, adapters and the optimizer's state."""
        state = [v for values in self.optimizer.state.values() for v in values.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *state))


def _mark(device: torch.device) -> float | torch.Event:
    """The time now; on a GPU, an event in the queue."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _between(start: float | torch.Event, end: float | torch.Event) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
