"""DDP and FSDP2 train like one process, with accumulation, clipping and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from common import adapted, assert_trains_alike, backward, batches, whole
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import lora_parameters

BF16 = torch.bfloat16
CLIPPED = 0.05  # below every gradient's norm


def sharded(model: nn.Sequential, **arguments) -> nn.Module:
    """Shard in two groups, each with frozen weights and adapters."""
    fully_shard(model[2], **arguments)
    return fully_shard(model, **arguments)


def in_two(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Two micro-batches; only the second one communicates."""
    first, second = zip(x.chunk(2), classes.chunk(2), strict=True)
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            loss = backward(model, *first)
    else:
        model.set_requires_gradient_sync(False)
        loss = backward(model, *first)
        model.set_requires_gradient_sync(True)
    loss = loss + backward(model, *second)
    for parameter in lora_parameters(model):
        parameter.grad /= 2
    return loss / 2


def check_ddp():
    assert_trains_alike(DistributedDataParallel, adapted())


def check_ddp_bfloat16_base():
    assert_trains_alike(DistributedDataParallel, adapted(BF16), in_two, CLIPPED)


def check_fsdp2():
    assert_trains_alike(sharded, adapted(), in_two, CLIPPED)


def check_fsdp2_bfloat16_base():
    assert_trains_alike(sharded, adapted(BF16))


def check_fsdp2_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    assert_trains_alike(partial(sharded, mp_policy=policy), adapted(BF16), in_two, CLIPPED)


def check_fsdp2_bfloat16_reduction():
    """Without ``reduce_dtype`` FSDP2 reduces gradients in ``param_dtype``, here bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=BF16)
    assert_trains_alike(partial(sharded, mp_policy=policy), adapted(BF16))


def check_hsdp():
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("outer", "in"))
    assert_trains_alike(partial(sharded, mesh=mesh), adapted(BF16), in_two, CLIPPED)


class Reductions(TorchDispatchMode):
    """Records the bytes passed to every reduce-scatter."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "reduce_scatter" in op.name():
            self.sizes.append(args[1].nbytes)
        return op(*args, **(kwargs or {}))


def check_fsdp2_reduces_adapters_alone():
    """Only adapter gradients are reduced: in float32, with rows padded to equal shares."""
    model, processes = sharded(adapted(BF16)), dist.get_world_size()
    with Reductions() as reductions:
        backward(model, *batches(split=True)[0])
    rows = [-(-p.shape[0] // processes) * processes for p in lora_parameters(model)]
    widths = [p.shape[1] for p in lora_parameters(model)]
    assert sum(reductions.sizes) == 4 * sum(r * w for r, w in zip(rows, widths, strict=True))


def check_checkpointing():
    """Recomputed layers use the same dropout masks, so gradients are bit-identical."""
    for wrap in (DistributedDataParallel, sharded):
        kept = gradients(wrap, lambda layer: layer, seed=3)
        recomputed = gradients(wrap, checkpoint_wrapper, seed=3)
        other = gradients(wrap, checkpoint_wrapper, seed=4)
        assert len(kept) == 6
        for one, two, three in zip(kept, recomputed, other, strict=True):
            assert torch.equal(one, two)
            assert not torch.equal(one, three)


def gradients(wrap: Callable, wrap_layer: Callable, seed: int) -> list[Tensor]:
    """Adapter gradients of one step with dropout; each process draws its own masks."""
    model = adapted(dropout=0.3)
    model[0], model[2] = wrap_layer(model[0]), wrap_layer(model[2])
    model = wrap(model)
    torch.manual_seed(10 * seed + dist.get_rank())
    backward(model, *batches(split=True)[0])
    return [whole(parameter.grad) for parameter in lora_parameters(model)]
