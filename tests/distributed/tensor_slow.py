"""Checks of tensor parallelism with compilers and a language model."""

from __future__ import annotations

import copy

import torch
from block import (
    Block,
    assert_same_bits,
    mesh,
    parallel,
    whole,
)
from models import llama, tokens, train_like
from torch.distributed.tensor.parallel import parallelize_module

from fused_lora import apply_lora, lora_parameters
from fused_lora.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel


def check_compiled():
    model = parallel(Block(dropout=0.5))
    other = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_same_bits(model, other)


def check_llama():
    """Attention and MLP of a language model: column-wise inputs, row-wise outputs."""
    model = llama(num_hidden_layers=1)
    apply_lora(model, rank=3)
    train_like(model.double())
    columns, rows = LoRAColwiseParallel(), LoRARowwiseParallel()
    layers = "model.layers.*."
    plan = {f"{layers}self_attn.[qkv]_proj": columns, f"{layers}self_attn.o_proj": rows}
    plan |= {f"{layers}mlp.gate_proj": columns, f"{layers}mlp.up_proj": columns}
    plan |= {f"{layers}mlp.down_proj": rows}
    shards = parallelize_module(copy.deepcopy(model), mesh(), plan)
    ids = tokens(2, 7)
    for m in (model, shards):
        m(ids, labels=ids).loss.backward()
    for one, many in zip(lora_parameters(model), lora_parameters(shards), strict=True):
        assert many.grad.placements == many.placements
        torch.testing.assert_close(whole(many.grad), one.grad)
