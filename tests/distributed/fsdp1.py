"""FSDP1: correct with ``use_orig_params`` and a single dtype, refused otherwise."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from common import adapted, adapters_of, assert_trains_alike, network
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrize

from fused_lora import (
    add_adapter,
    apply_lora,
    load_adapter,
    lora_param_groups,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
    unmerge_lora,
)

BF16 = torch.bfloat16
gathered = FullyShardedDataParallel.summon_full_params
X = torch.linspace(-1, 1, 96).view(4, 24)


def sharded(model: nn.Sequential, use_orig_params: bool = True) -> FullyShardedDataParallel:
    """Shard into two flat parameters, each with frozen weights and adapters."""
    wrap = partial(
        FullyShardedDataParallel, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    model[2] = wrap(model[2])
    return wrap(model)


def check_training():
    assert_trains_alike(sharded, adapted(), gathered=gathered)


def check_frozen_weights_cost_no_gradient():
    """FSDP1's views of frozen weights require grad; a parametrization's result is another thing."""
    model, start = sharded(adapted()), adapted()
    for layer in (start[0], start[2][0]):
        parametrize.register_parametrization(layer, "weight", Scaled())
    computed = sharded(start)
    for case, expected in ((model, "_LoRALinearBackward"), (computed, "AddmmBackward0")):
        found = []
        for layer in (case.module[0], case.module[2].module[0]):
            layer.register_forward_hook(lambda *args, to=found: to.append(history(args[2])))
        case(X).sum().backward()
        assert [expected in names for names in found] == [True, True], found
        assert case is computed or not any("AddmmBackward0" in names for names in found)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, weight):
        return weight * self.factor


def history(y: torch.Tensor) -> set[str]:
    """Names of the last two nodes of a graph."""
    nodes = [y.grad_fn, *(node for node, _ in y.grad_fn.next_functions if node is not None)]
    return {node.name() for node in nodes}


def check_training_in_bfloat16():
    assert_trains_alike(sharded, adapted(BF16, adapter_dtype=BF16), gathered=gathered)


def check_what_torch_refuses():
    """PyTorch's own errors; ``adapter_dtype`` and ``use_orig_params=True`` avoid them."""
    with pytest.raises(ValueError, match="tensors with uniform dtype but got"):
        sharded(adapted(BF16))
    with pytest.raises(ValueError, match="requires_grad` when `use_orig_params=False`"):
        sharded(adapted(), use_orig_params=False)


def check_adapters_in_a_flat_parameter_are_refused():
    """PyTorch accepts this wrapping because the frozen parameters are left out."""
    start = adapted()
    frozen = [p for p in start.parameters() if not p.requires_grad]
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(
        start, use_orig_params=False, ignored_states=frozen, device_id=cpu
    )
    for call in (
        lambda: list(lora_parameters(model)),
        lambda: lora_param_groups(model, lr=1e-3),
        lambda: merge_lora(model),
        lambda: save_adapter(model, "nowhere"),
    ):
        with pytest.raises(ValueError, match=r"use_orig_params=True.*, got False"):
            call()


def check_refusals():
    for plain in (sharded(network()), sharded(network().requires_grad_(False), False)):
        for model in (plain, plain.module):
            with pytest.raises(ValueError, match=r"to adapt, .* FullyShardedDataParallel"):
                apply_lora(model)
    start = adapted()
    add_adapter(start, "second", rank=3)
    model = sharded(start)
    for call in (
        lambda: add_adapter(model, "third"),
        lambda: load_adapter(model, "nowhere"),
        lambda: unload_lora(model),
    ):
        with pytest.raises(ValueError, match=r"expected a whole model to .* FullyShardedData"):
            call()
    for call in (
        lambda: merge_lora(model),
        lambda: set_adapter(model, "second"),
        lambda: save_adapter(model, "nowhere"),
    ):
        with pytest.raises(RuntimeError, match=r"FSDP1's .* within .*summon_full_params\(model\)"):
            call()


def check_gathered():
    """Within ``summon_full_params`` adapters are merged, switched and saved."""
    start = adapted()
    add_adapter(start, "second", rank=3)
    model = sharded(copy.deepcopy(start))
    on = model(X)
    with gathered(model):
        merge_lora(model)
    torch.testing.assert_close(model(X), on)
    with pytest.raises(RuntimeError, match=r"summon_full_params\(model\)"):
        unmerge_lora(model)
    with gathered(model):
        unmerge_lora(model)
    assert torch.equal(model(X), on)
    with gathered(model):
        save_adapter(model, "default")
        set_adapter(model, "second")
    loaded = network()
    load_adapter(loaded, "default")
    assert torch.equal(adapters_of(loaded), adapters_of(start))
    set_adapter(start, "second")
    torch.testing.assert_close(model(X), start(X))
