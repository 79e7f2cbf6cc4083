"""Layers that share an input and gated MLPs under DDP and FSDP2, against the same layers alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import whole
from models import train_like
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora import apply_lora, lora_layers, lora_parameters, unfuse_projections
from fused_lora.layers import gated_block
from fused_lora.ops import shared_input

LAYERS, ROWS = 2, 40


class Decoder(nn.Module):
    """The linear layers of a decoder layer, with what makes their order matter."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.softmax(self.q(x) * self.k(x), -1) * self.v(x))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def adapted() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(*(Decoder() for _ in range(LAYERS))).double()
    apply_lora(model, rank=4, dropout=0.3)
    return train_like(model.train())


def per_decoder(model: nn.Sequential) -> nn.Module:
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def per_linear(model: nn.Sequential) -> nn.Module:
    for layer in lora_layers(model).values():
        fully_shard(layer)
    return fully_shard(model)


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(10 + dist.get_rank())
    x = torch.randn(ROWS, 32, dtype=torch.float64)
    model(x).square().sum().backward()
    return [whole(p.grad) for p in lora_parameters(model)]


def compare(wrap: Callable[[nn.Module], nn.Module], chains: int, blocks: int) -> None:
    """Gradients equal those of the layers alone; counts what ran together."""
    together, alone = adapted(), adapted()
    unfuse_projections(alone)
    expected = gradients(wrap(alone))
    counts, original = Counter(), (shared_input.shrink, gated_block.as_block)

    def counted(function, name):
        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    shared_input.shrink = counted(original[0], "chains")
    gated_block.as_block = counted(original[1], "blocks")
    try:
        got = gradients(wrap(together))
    finally:
        shared_input.shrink, gated_block.as_block = original
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (counts["chains"], counts["blocks"]) == (chains, blocks), counts


def check_ddp():
    compare(DistributedDataParallel, LAYERS, LAYERS)


def check_fsdp2_per_decoder_layer():
    compare(per_decoder, LAYERS, LAYERS)


def check_fsdp2_on_every_linear():
    """The others' adapters are not gathered when the first layer runs: each runs alone."""
    compare(per_linear, 0, 0)


def check_copies_of_sharded_classes():
    """FSDP2 swaps the class of a module; the block stays."""
    model = per_decoder(adapted())
    assert type(model[0]).__name__ == "FSDPDecoder"
    assert gated_block.block_of(model[0].mlp) is not None
    assert copy.copy(model[0].mlp).__dict__.keys() == model[0].mlp.__dict__.keys()
