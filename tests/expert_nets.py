"""Small models with PEFT's adapters on experts, and their results."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from models import tokens
from peft_nets import noisy
from torch import nn

from support import relative_rms

E, TOP, T = 4, 2, 13
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 100,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": E},
    "Qwen2Moe": {
        "num_experts": E,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 24},
    "Olmoe": {"num_experts": E},
    "DeepseekV3": {
        "n_routed_experts": E, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "GraniteMoe": {"num_local_experts": E},
    "GptOss": {"num_local_experts": E, "head_dim": 8, "layer_types": ["full_attention"]},
}  # fmt: skip


def adapted(model: nn.Module, targets=BOTH, cast=True, **config) -> nn.Module:
    options = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": targets}
    config = peft.LoraConfig(**(options | config))
    return noisy(peft.get_peft_model(model, config, autocast_adapter_dtype=cast))


def causal(family: str, implementation="eager", dtype=FP64, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.2 if p.dim() > 1 else 0.05) + ("norm" in name))
    return model.to(dtype)


class Holder(nn.Module):
    """Experts as a part of a model."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, shares):
        return self.experts(x, index, shares)


def experts_class(name: str) -> type[nn.Module]:
    folder = {"GptOss": "gpt_oss", "Qwen3Moe": "qwen3_moe", "NemotronH": "nemotron_h"}
    folder |= {"MuseSpark": "muse_spark", "Mixtral": "mixtral"}
    module = f"transformers.models.{folder[name]}.modeling_{folder[name]}"
    try:
        return getattr(importlib.import_module(module), f"{name}Experts")
    except ImportError:
        pytest.skip(f"transformers without {name}")


def experts_of(name="Qwen3Moe", implementation="eager", dtype=FP64) -> nn.Module:
    """A module of experts alone: 4 experts of 32 by 24, the Parameters frozen."""
    torch.manual_seed(0)
    numbers = ("num_experts", "num_local_experts", "n_routed_experts")
    config = SimpleNamespace(
        **dict.fromkeys(numbers, E), hidden_size=32, moe_hidden_size=32, intermediate_size=24,
        moe_intermediate_size=24, moe_latent_size=None, hidden_act="silu", mlp_hidden_act="silu",
        swiglu_alpha=1.7, swiglu_limit=7.0, post_norm_eps=1e-6,
        _experts_implementation=implementation,
    )  # fmt: skip
    module = experts_class(name)(config)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return module.to(dtype).requires_grad_(False)


def holder(name="Qwen3Moe", implementation="eager", dtype=FP64, **config) -> nn.Module:
    return adapted(Holder(experts_of(name, implementation, dtype)), **config)


def routed(dtype=FP64) -> tuple:
    """Inputs of experts; the last expert gets no token."""
    torch.manual_seed(1)
    x = torch.randn(T, 32).to(dtype).requires_grad_()
    shares, index = torch.rand(T, E - 1).topk(TOP)
    return x, index, shares.to(dtype).requires_grad_()


def results(model: nn.Module, call=None, inputs=None) -> dict:
    """The output and every gradient."""
    x, index, shares = routed() if inputs is None else inputs
    wanted = {"x": x, "shares": shares} | {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    y = (model if call is None else call)(x, index, shares)
    torch.manual_seed(2)
    found = torch.autograd.grad(y, list(wanted.values()), torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach()} | {f"d {n}": g for n, g in zip(wanted, found, strict=True)}


def assert_close(got: dict, expected: dict, bound: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert value.norm() > 0, name
        assert relative_rms(got[name], value) <= bound, name


def logits_and_gradients(model: nn.Module, **options) -> dict:
    """Of a causal language model: logits, and gradients of its input and every adapter."""
    embedded = model.get_input_embeddings()(tokens(2, 9)).detach().requires_grad_()
    wanted = {"x": embedded} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    logits = model(inputs_embeds=embedded, use_cache=False, **options).logits
    torch.manual_seed(2)
    found = torch.autograd.grad(logits, list(wanted.values()), torch.randn_like(logits))
    return {"logits": logits.detach()} | {f"d {n}": g for n, g in zip(wanted, found, strict=True)}


def experts_in(model: nn.Module) -> nn.Module:
    return model.base_model.model.experts.get_base_layer()


def wrapper(model: nn.Module) -> nn.Module:
    return model.base_model.model.experts
