"""Modelled bytes that one GPU sends per training step: ``python benchmarks/wire.py``.

Parameters are counted on the meta device, from Llama 3's shapes with rank 16 on every linear layer
but the head. In a ring collective of b bytes over n GPUs, each GPU sends (n-1)/n·b for an
all-gather or a reduce-scatter, and twice that for an all-reduce. Weights and full gradients are
bfloat16, adapters and their gradients float32. A step is one forward and one backward.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import apply_lora, parameter_summary

GPUS = (8, 64, 256, 1024)
NODE = 8  # GPUs that share a fast link
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64},
}


def count(shape: dict) -> tuple[int, int]:
    """Parameter counts of the base model and of its adapters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape))
    apply_lora(model, rank=16)
    summary = parameter_summary(model)
    return summary.total - summary.adapters, summary.adapters


def gathered(size: float, n: int) -> float:
    """Bytes that each of n GPUs sends in an all-gather or a reduce-scatter of ``size`` bytes."""
    return (n - 1) / n * size


def sent(base: int, adapters: int, n: int) -> dict[str, tuple[float, float]]:
    """Bytes per GPU and step, by method: ``(full fine-tuning, adapters only)``."""
    replicas = n // NODE
    weights, factors = 2 * base, 4 * adapters
    return {
        "DDP": (2 * gathered(weights, n), 2 * gathered(factors, n)),
        # Weights are gathered for the forward and again for the backward; the gradients of what
        # is trained are reduce-scattered. Frozen weights have none.
        "FSDP2": (3 * gathered(weights, n), gathered(2 * weights + 3 * factors, n)),
        "HSDP, within a node": (
            3 * gathered(weights, NODE),
            gathered(2 * weights + 3 * factors, NODE),
        ),
        "HSDP, between nodes": (
            2 * gathered(weights / NODE, replicas),
            2 * gathered(factors / NODE, replicas),
        ),
    }


def main() -> None:
    for name, shape in SHAPES.items():
        base, adapters = count(shape)
        print(f"{name}: {base:,} parameters, {adapters:,} in adapters ({adapters / base:.2%})")
        print(f"{'GB sent per GPU, full / adapters':<36}" + "".join(f"{n:>18}" for n in GPUS))
        rows = [sent(base, adapters, n) for n in GPUS]
        for way in rows[0]:
            pairs = (row[way] for row in rows)
            cells = [f"{full / 1e9:.2f} / {thin / 1e9:.3f}" for full, thin in pairs]
            print(f"{way:<36}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
