"""Small layers and models that tests share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fused_lora import FusedLoRALinear, lora_parameters
from fused_lora.layers.base import LoRALayer

ALL = ["table", "conv", "hidden", "out"]  # the layers of Tiny


class Tiny(nn.Module):
    """An embedding, a convolution and two linears, on token indices."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 12, padding_idx=0)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.hidden = nn.Linear(36, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.table(tokens).unsqueeze(-3))
        return self.out(torch.relu(self.hidden(x.transpose(-3, -2).flatten(-2))))


def stack() -> nn.Sequential:
    """Linears at two depths."""
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    )


def gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    quiet = {"bos_token_id": 1, "eos_token_id": 1, "resid_pdrop": 0, "embd_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(**(sizes | quiet | {"attn_pdrop": 0} | changes))).eval()


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()


def tokens(*shape: int, vocabulary: int = 100) -> Tensor:
    return torch.randint(1, vocabulary, shape or (2, 7))


def train_like(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Add noise to the adapters, as training would: they then change the output."""
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def snapshot(model: nn.Module) -> tuple:
    """Everything that a failed operation must leave unchanged."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        copy.deepcopy(model.state_dict()),
        {n: layer_state(m) for n, m in model.named_modules() if isinstance(m, LoRALayer)},
    )


def layer_state(layer: LoRALayer) -> tuple:
    """The state of a layer that ``state_dict`` omits."""
    aside = {
        name: (a.config, a.scaling, {key: t.tolist() for key, t in a.tensors.items()})
        for name, a in layer.inactive_adapters.items()
    }
    names = (layer.adapter_name, layer.merged, layer.enabled, layer.impl, layer.training)
    return layer.adapter_config, layer.scaling, names, aside, layer.weight.tolist()


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    modules, parameters, state, layers = snapshot(model)
    assert layers == before[3]
    assert modules == before[0]
    assert parameters == before[1]
    assert state.keys() == before[2].keys()
    assert all(torch.equal(state[key], before[2][key]) for key in state)


def trained_layer(K=40, N=24, **kwargs) -> FusedLoRALinear:
    """A layer whose ``lora_B`` is not zero."""
    layer = FusedLoRALinear(K, N, rank=4, **kwargs)
    torch.nn.init.normal_(layer.lora_B)
    return layer
