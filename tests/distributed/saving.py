"""Saving from shards: complete PEFT files, and checkpoints for other world sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from common import adapted, adapters_of, backward, batches, network, whole
from models import train_like
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fused_lora
from fused_lora import (
    add_adapter,
    apply_lora,
    disable_lora,
    load_adapter,
    save_adapter,
    set_adapter,
)

X = torch.linspace(-1, 1, 96).view(4, 24)
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def two_adapters(**arguments) -> nn.Sequential:
    """A model with the active adapter "default" and the inactive "second"."""
    model = adapted(**arguments)
    add_adapter(model, "second", rank=3, use_dora=arguments.get("use_dora", False))
    set_adapter(model, "second")
    train_like(model)
    set_adapter(model, "default")
    return model


def saved_as(model: nn.Module, folder: str, expected: nn.Module) -> None:
    """Save to ``folder``; the files must hold the active adapter of ``expected``."""
    save_adapter(model, folder, expected[0].adapter_name)
    loaded = network()
    load_adapter(loaded, folder)
    assert torch.equal(adapters_of(loaded), adapters_of(expected))


def check_saving():
    """Save gathered adapters (after a forward), sharded ones, and inactive, unsharded ones."""
    for arguments in ({}, {"use_dora": True}):
        model = two_adapters(**arguments)
        second = copy.deepcopy(model)
        set_adapter(second, "second")
        sharded = copy.deepcopy(model)
        for group in (sharded[2], sharded):
            fully_shard(group, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        saved_as(sharded, "aside", second)
        sharded(X)
        saved_as(sharded, "gathered", model)
        set_adapter(sharded, "second")
        saved_as(sharded, "second", second)
        saved_as(sharded, "default", model)


def hybrid(model: nn.Module) -> nn.Module:
    """Sharded over pairs of processes, replicated over the pairs."""
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    return fully_shard(model, mesh=mesh)


def check_saving_on_a_mesh_of_two_dimensions():
    model = adapted()
    saved_as(hybrid(copy.deepcopy(model)), "hybrid", model)


def check_the_files_are_pefts():
    model = adapted()
    expected = model(X)
    save_adapter(fully_shard(model), "adapter")
    if dist.get_rank() == 0:
        import peft

        torch.manual_seed(1)
        base = network()  # with the base weights of ``model``
        torch.testing.assert_close(peft.PeftModel.from_pretrained(base, "adapter")(X), expected)


def check_loading_before_sharding():
    model = adapted()
    expected = model(X)
    save_adapter(fully_shard(model), "adapter")
    torch.manual_seed(1)
    loaded = network()
    load_adapter(loaded, "adapter")
    torch.testing.assert_close(fully_shard(loaded)(X), expected)


def check_modules_to_save():
    """A head that trains whole: sharded it steps, switches adapters and is saved whole."""
    torch.manual_seed(1)
    model = network()
    apply_lora(model, target_modules=["0"], modules_to_save=["2.2"])
    add_adapter(model, "second")
    alone = copy.deepcopy(model)
    sharded = fully_shard(model)
    for net in (alone, sharded):
        for name in ("second", "default"):
            set_adapter(net, name)
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)
            net(X).pow(2).mean().backward()
            optimizer.step()
    with pytest.raises(ValueError, match="a whole model to disable adapters with modules_to_save"):
        disable_lora(sharded).__enter__()
    for name in ("default", "second"):
        set_adapter(alone, name)
        save_adapter(sharded, "heads", name)
        torch.manual_seed(1)
        loaded = network()
        load_adapter(loaded, "heads")
        torch.testing.assert_close(loaded(X), alone(X))


def check_a_failed_write_fails_everywhere():
    sharded = hybrid(adapted())
    first = dist.get_rank() == 0
    if first:
        Path("occupied").touch()
    dist.barrier()
    kind, text = (FileExistsError, "occupied") if first else (RuntimeError, "it failed: FileExists")
    with pytest.raises(kind, match=text):
        save_adapter(sharded, "occupied")


def check_one_process_writes():
    writes = []
    with mock.patch.object(
        fused_lora.peft.checkpoint, "write_adapter", lambda *a: writes.append(a)
    ):
        save_adapter(fully_shard(adapted()), "adapter")
    assert len(writes) == (dist.get_rank() == 0)


def trainer(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, sharded if there are several processes, and its optimizer."""
    model = adapted()
    torch.manual_seed(seed)
    train_like(model)
    if dist.is_initialized():
        fully_shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The trainable parameters and AdamW's moments, without the frozen weights."""
    return {
        "model": get_model_state_dict(model, options=TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED),
    }


def flat(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of a state by name, gathered."""
    moments = state["optimizer"]["state"]
    found = {f"{name}.{key}": t for name, its in moments.items() for key, t in its.items()}
    return {name: whole(tensor) for name, tensor in (found | state["model"]).items()}


def save_state():
    model, optimizer = trainer(seed=5)
    for x, classes in batches(split=True)[:3]:
        optimizer.zero_grad()
        backward(model, x, classes)
        optimizer.step()
    state = state_of(model, optimizer)
    checkpoint.save(state, checkpoint_id="state")
    expected = flat(state)
    if dist.get_rank() == 0:
        torch.save(expected, "expected.pt")


def load_state():
    """A state loaded at another world size, into other adapters, is bit-identical."""
    model, optimizer = trainer(seed=6)
    state = state_of(model, optimizer)
    checkpoint.load(state, checkpoint_id="state")
    set_model_state_dict(model, state["model"], options=TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)
    expected, loaded = torch.load("expected.pt"), flat(state_of(model, optimizer))
    assert loaded.keys() == expected.keys()
    assert len(loaded) == 6 * 4  # each factor, its two moments and its number of steps
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
