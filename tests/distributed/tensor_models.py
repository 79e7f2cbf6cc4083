"""Checks of operations on a tensor-parallel model: training, life cycle, states, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from block import (
    BATCH,
    FEATURES,
    HIDDEN,
    OWN,
    STOCK,
    Block,
    assert_replicas_equal,
    data,
    mesh,
    parallel,
    step,
    whole,
)
from models import Tiny, tokens, train_like
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    disable_lora,
    fused_lora_add,
    fused_lora_linear,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from fused_lora.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel


def check_training():
    x, target = data(torch.float64)
    for styles in (OWN, STOCK):
        model = Block().double()
        shards = parallel(model, styles)
        losses = []
        for m in (model, shards):
            optimizer = torch.optim.AdamW(lora_parameters(m), lr=1e-2)
            for _ in range(20):
                loss = (m(x) - target).square().mean()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(lora_parameters(m), 0.05)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(torch.stack([loss.detach(), whole(norm)]))
        one, many = torch.stack(losses).chunk(2)
        assert one[-1, 0] < one[0, 0]
        torch.testing.assert_close(many, one)
        for name, parameter in shards.named_parameters():
            assert_replicas_equal(name, parameter)
            torch.testing.assert_close(whole(parameter), model.get_parameter(name))


def grid(copies: int = 2) -> DeviceMesh:
    """A mesh for ``copies`` of the model, each of them tensor-parallel."""
    sizes = copies, dist.get_world_size() // copies
    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))


def check_with_fsdp():
    """Sharded by FSDP2 along the other dimension of the mesh, which averages the gradients."""
    both = grid()
    copies = both.size(0)
    x, dy = data(torch.float64)
    model = Block().double()
    own = slice(BATCH // copies * both.get_local_rank("data"), None)
    own = slice(own.start, own.start + BATCH // copies)
    for styles in (OWN, STOCK):
        shards = fully_shard(parallel(model, styles, on=both["tensor"]), mesh=both["data"])
        expected = step(copy.deepcopy(model), x, dy)
        actual = step(shards, x[own], dy[own])
        for name in ("y", "x"):
            torch.testing.assert_close(actual.pop(name), expected.pop(name)[own])
        torch.testing.assert_close({n: g * copies for n, g in actual.items()}, expected)


def check_life_cycle():
    for styles in (OWN, STOCK):
        assert_lives(Block(), lambda model, styles=styles: parallel(model, styles))


def check_life_cycle_with_fsdp():
    """Including sizes that the processes do not divide evenly, and empty shards."""
    both = grid()
    for styles, hidden in ((OWN, 16), (STOCK, 16), (OWN, 14), (STOCK, 14), (OWN, 2)):
        assert_lives(
            Block(hidden),
            lambda model, styles=styles: fully_shard(
                parallel(model, styles, on=both["tensor"]), mesh=both["data"]
            ),
        )


def assert_lives(model: Block, shard: Callable[[Block], nn.Module]) -> None:
    """Merging, switching and saving a sharded model do what they do to a whole one."""
    x, _ = data()
    add_adapter(model, "second", rank=3)
    add_adapter(model, "wide", rank=4)
    set_adapter(model, "second")
    train_like(model)
    set_adapter(model, "default")
    shards = shard(model)
    y = shards(x)
    with disable_lora(model), disable_lora(shards):
        torch.testing.assert_close(shards(x), model(x))
    merge_lora(shards)
    torch.testing.assert_close(shards(x), y)
    with disable_lora(model), disable_lora(shards):
        torch.testing.assert_close(shards(x), model(x))
    unmerge_lora(shards)
    assert torch.equal(shards(x), y)
    for m in (model, shards):
        assert set_adapter(m, "second") == []
    torch.testing.assert_close(shards(x), model(x))
    with pytest.raises(ValueError, match="expected a whole model to switch to an adapter"):
        set_adapter(shards, "wide")
    torch.testing.assert_close(shards(x), model(x))
    save_adapter(shards, "lived")
    loaded = copy.deepcopy(model)
    load_adapter(loaded, "lived", "second")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    dist.barrier()


def check_state():
    """A full state dict from shards, and shards loaded from a full one, on every rank."""
    options = StateDictOptions(full_state_dict=True)
    x, _ = data()
    for styles in (OWN, STOCK):
        one, another = Block(), Block()
        shards = parallel(one, styles)
        torch.testing.assert_close(get_model_state_dict(shards, options=options), one.state_dict())
        set_model_state_dict(shards, another.state_dict(), options=options)
        torch.testing.assert_close(shards(x), another(x))


def check_saving():
    """PEFT's files saved from shards load into an unsharded model."""
    x, _ = data()
    for styles in (OWN, STOCK):
        model = Block()
        save_adapter(parallel(model, styles), "adapter")
        dist.barrier()
        loaded = copy.deepcopy(model)
        unload_lora(loaded, merge=False)
        load_adapter(loaded, "adapter")
        assert torch.equal(loaded(x), model(x))


def check_initialisation():
    """From the meta device and on reset: all ranks get one draw, though generators differ."""
    torch.manual_seed(dist.get_rank())
    for init in ("default", "orthogonal"):
        with torch.device("meta"):
            model = Block(rank=4, init=init)
        shards = parallel(model).to_empty(device="cpu")
        for _ in range(2):
            for name, parameter in shards.named_parameters():
                if "lora" in name:
                    assert_replicas_equal(name, parameter)
            for layer in (shards.up, shards.down):
                A, B = whole(layer.lora_A), whole(layer.lora_B)
                assert A.norm() > 0
                torch.testing.assert_close(B @ A, torch.zeros(B.shape[0], A.shape[1]))
                layer.reset_adapter()


def check_other_layers():
    """Layers without a kernel run DTensor's operators; our styles also split plain layers."""
    model = Tiny()
    apply_lora(model, rank=3, target_modules=["table", "out"], include_head=True)
    train_like(model)
    plan = {
        "table": LoRAColwiseParallel(output_layouts=Replicate()),
        "hidden": LoRAColwiseParallel(),
        "out": LoRARowwiseParallel(),
    }
    ids = tokens(2, 5, vocabulary=20)
    with pytest.raises(TypeError, match="expected a FusedLoRALinear, got LoRAEmbedding"):
        parallelize_module(copy.deepcopy(model), mesh(), plan)
    plan["table"] = ColwiseParallel(output_layouts=Replicate())
    shards = parallelize_module(copy.deepcopy(model), mesh(), plan)
    for m in (model, shards):
        m(ids).square().sum().backward()
    torch.testing.assert_close(shards(ids), model(ids))
    for one, many in zip(lora_parameters(model), lora_parameters(shards), strict=True):
        torch.testing.assert_close(whole(many.grad), one.grad)


def check_refusals():
    x, _ = data()
    shards = parallel(Block())
    for call in (
        unload_lora,
        partial(add_adapter, name="second"),
        partial(load_adapter, directory="adapter"),
    ):
        with pytest.raises(ValueError, match=r"expected a whole model .* parallelize_module"):
            call(shards)
    plain = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    parallelize_module(plain, mesh(), {"0": ColwiseParallel()})
    with pytest.raises(
        ValueError, match=r"expected a whole model to adapt, .* or parallelize_module"
    ):
        apply_lora(plain)
    with pytest.raises(ValueError, match="whole weight to adapt, got a sharded one"):
        FusedLoRALinear.from_linear(plain[0])
    with pytest.raises(ValueError, match="expected a whole layer, got a sharded one"):
        parallel(shards)
    merged = Block()
    merge_lora(merged)
    with pytest.raises(ValueError, match="expected an unmerged layer"):
        parallel(merged)
    with pytest.raises(ValueError, match="expected a layer without DoRA"):
        parallel(Block(use_dora=True))
    with pytest.raises(ValueError, match="expected a whole weight for DoRA"):
        parallel(Block(use_dora=True), STOCK)(x)
    with pytest.raises(ValueError, match="expected a whole weight to split for init='pissa'"):
        parallel(Block(init="pissa")).up.reset_adapter()
    layer, A, B = shards.up, shards.up.lora_A, shards.up.lora_B
    with pytest.raises(ValueError, match="got a plain Tensor for x"):
        fused_lora_linear(x, layer.weight, A, B)
    spread = distribute_tensor(x, mesh(), [Replicate()])
    with pytest.raises(ValueError, match="got a plain Tensor for lora_A, lora_B: adapt the model"):
        fused_lora_linear(spread, layer.weight, whole(A), whole(B))
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    elsewhere = distribute_tensor(whole(A).detach(), other, [Replicate()] * 2)
    with pytest.raises(ValueError, match=r"expected lora_A on x's DeviceMesh.*, got DeviceMesh"):
        fused_lora_linear(spread, layer.weight, elsewhere, B)
    largest = DTensor.from_local(torch.ones(1, HIDDEN), mesh(), [Partial("max")])
    with pytest.raises(ValueError, match="expected base sharded, replicated or a sum"):
        fused_lora_add(largest, spread[0, :1], A, B)
