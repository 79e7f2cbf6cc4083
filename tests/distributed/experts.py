"""Adapters on experts under DDP and FSDP2: gradients of the whole batch, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import torch.distributed as dist
from common import whole
from expert_nets import BOTH, FP64, adapted, causal
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora import apply_lora, load_adapter, merge_lora, patch_peft, save_adapter, unpatch_peft
from fused_lora.layers import parameter_forward
from fused_lora.peft import experts as peft_experts

TOKENS = (2, 5)


def own() -> nn.Module:
    """Qwen3-MoE with adapters on both matrices of its experts and on the router."""
    model = causal("Qwen3Moe", "batched_mm")
    targets = [*BOTH, "gate.weight"]
    apply_lora(
        model, rank=2, target_modules=["q_proj"], target_parameters=targets, adapter_dtype=FP64
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * 0.2)
    return model


def pefts() -> nn.Module:
    return adapted(causal("Qwen3Moe", "batched_mm"), cast=False)


def loss(model: nn.Module, rank: int) -> Tensor:
    torch.manual_seed(20 + rank)
    ids = torch.randint(100, TOKENS)
    return model(ids, use_cache=False).logits.square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(p.grad)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def per_layer(model: nn.Module) -> nn.Module:
    decoder = model.base_model.model.model if isinstance(model, peft.PeftModel) else model.model
    for layer in decoder.layers:
        fully_shard(layer)
    return fully_shard(model)


def compare(make: Callable, wrap: Callable, module, name: str) -> None:
    """The mean of all processes' gradients; counts the fused calls."""
    alone = make()
    (
        sum(loss(alone, rank) for rank in range(dist.get_world_size())) / dist.get_world_size()
    ).backward()
    expected = gradients(alone)
    model, calls, run = make(), [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return run(*args, **kwargs)

    setattr(module, name, counted)
    try:
        wrapped = wrap(model)
        loss(wrapped, dist.get_rank()).backward()
    finally:
        setattr(module, name, run)
    assert len(calls) == 1
    got = gradients(wrapped)
    assert got.keys() == expected.keys()
    assert all(value.norm() > 0 for value in expected.values())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def check_ddp():
    compare(own, DistributedDataParallel, parameter_forward, "experts_forward")


def check_fsdp2():
    compare(own, per_layer, parameter_forward, "experts_forward")


def check_fsdp2_around_the_experts():
    def wrap(model: nn.Module) -> nn.Module:
        fully_shard(model.model.layers[0].mlp.experts)
        return fully_shard(model)

    compare(own, wrap, parameter_forward, "experts_forward")


def check_fsdp2_of_a_part_is_refused():
    model = own()
    fully_shard(model.model.layers[0].mlp.experts.base_layer)
    fully_shard(model)
    with pytest.raises(ValueError, match="call fully_shard on the outermost layer"):
        loss(model, 0)


def check_fsdp2_life_cycle():
    """Saved in every process, read in one; merged shards are the merged weights."""
    plain, model = own(), per_layer(own())
    folder = f"experts-{dist.get_world_size()}"
    save_adapter(model, folder)
    dist.barrier()
    again = causal("Qwen3Moe", "batched_mm")
    load_adapter(again, folder, adapter_dtype=FP64)
    assert torch.equal(loss(again, 0), loss(plain, 0))
    before = loss(model, 0).detach()
    merge_lora(model)
    torch.testing.assert_close(loss(model, 0).detach(), before)
    merge_lora(plain, keep_base=False)
    name = "model.layers.0.mlp.experts.base_layer.base_layer.down_proj"
    merged = whole(model.get_parameter(name))
    torch.testing.assert_close(merged, plain.get_parameter(name).detach())
    states = get_model_state_dict(model), own().state_dict()
    torch.testing.assert_close(whole(states[0][name]), states[1][name])


def check_peft_ddp():
    _patched(DistributedDataParallel)


def check_peft_fsdp2():
    _patched(per_layer)


def _patched(wrap: Callable) -> None:
    def make() -> nn.Module:
        model = pefts()
        patch_peft(model)
        return model

    try:
        compare(make, wrap, peft_experts, "experts_forward")
        patched = gradients(trained(make()))
        unpatch_peft()
        torch.testing.assert_close(patched, gradients(trained(pefts())), rtol=1e-9, atol=1e-12)
    finally:
        unpatch_peft()


def trained(model: nn.Module) -> nn.Module:
    loss(copy.deepcopy(model), 0)
    loss(model, 0).backward()
    return model


def check_expert_parallelism_is_refused():
    """transformers shards the experts and replaces their forward: no adapter can be added."""
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        causal("Qwen3Moe", dtype=torch.float32).save_pretrained("model")
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size(), ep_size=dist.get_world_size())
    model = Qwen3MoeForCausalLM.from_pretrained("model", distributed_config=config)
    assert model.model.layers[0].mlp.experts._is_expert_parallel
    with pytest.raises(ValueError, match="expected a whole model to adapt, got a sharded one"):
        apply_lora(model, target_modules=[], target_parameters=BOTH)
    assert not any("lora" in name for name, _ in model.named_parameters())
