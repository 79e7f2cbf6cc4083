"""A small tensor-parallel model, and the results of one process to compare it with."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

import torch
import torch.distributed as dist
from models import train_like
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fused_lora import apply_lora
from fused_lora.ops import torch_impl
from fused_lora.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel
from support import assert_as_good_as_eager

OWN = LoRAColwiseParallel, LoRARowwiseParallel
STOCK = ColwiseParallel, RowwiseParallel
BATCH, TOKENS, FEATURES, HIDDEN = 4, 8, 12, 16


class Block(nn.Module):
    """linear → activation → linear with adapters; the processes do not divide the rank evenly."""

    def __init__(self, hidden: int = HIDDEN, rank: int = 3, dtype=None, **arguments):
        super().__init__()
        self.up = nn.Linear(FEATURES, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, FEATURES, dtype=dtype)
        apply_lora(self, rank=rank, **arguments)
        train_like(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """``x`` and the gradient of ``y``."""
    return torch.randn(2, BATCH, TOKENS, FEATURES).to(dtype).unbind()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(
    model: Block, styles=OWN, up: dict | None = None, down: dict | None = None, on=None
) -> Block:
    """A parallel copy; ``up`` and ``down`` are the arguments of their styles."""
    colwise, rowwise = styles
    plan = {"up": colwise(**(up or {})), "down": rowwise(**(down or {}))}
    return parallelize_module(copy.deepcopy(model), on or mesh(), plan)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(size: int) -> slice:
    """This rank's part of a sharded dimension."""
    part = size // dist.get_world_size()
    return slice(part * dist.get_rank(), part * (dist.get_rank() + 1))


def step(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, gathered; a gradient must have its parameter's placements."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    results = {"y": y.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_replicas_equal(name, parameter.grad)
            if isinstance(parameter, DTensor):
                assert parameter.grad.placements == parameter.placements, name
            results[name] = whole(parameter.grad)
    return results


def assert_replicas_equal(name: str, tensor: Tensor) -> None:
    """A replicated tensor is bit-identical on every rank."""
    if isinstance(tensor, DTensor) and all(p.is_replicate() for p in tensor.placements):
        mine = tensor.to_local().contiguous()
        copies = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, mine)
        assert all(torch.equal(other, mine) for other in copies), name


def yardsticks(model: Block, x: Tensor, dy: Tensor) -> tuple[dict, dict]:
    """Results of the plain formula in one process: in float64, and in the model's dtype."""
    wide, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    for layer in (wide.up, wide.down, eager.up, eager.down):
        layer.impl = "reference"
    return step(wide, x.double(), dy.double()), step(eager, x, dy)


def assert_matches(model: Block, shards: nn.Module, x: Tensor, dy: Tensor) -> None:
    assert_as_good_as_eager(step(shards, x, dy), *yardsticks(model, x, dy))


def run_sharded(function: Callable, inputs: dict, places: dict, dy: Tensor) -> dict[str, Tensor]:
    """Gathered output and gradients of a function of DTensors, named as by ``support.run``."""
    on = mesh()
    tensors = {name: distribute_tensor(t, on, [places[name]]) for name, t in inputs.items()}
    keys = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "bias": "dbias"}
    for name in keys:
        tensors[name].requires_grad_()
    y = function(**tensors)
    assert_replicas_equal("y", y)
    full = y.full_tensor()
    full.backward(dy)
    return {"y": full.detach()} | {
        key: tensors[name].grad.full_tensor() for name, key in keys.items()
    }


def sent(function: Callable[[], object]) -> tuple[object, Counter]:
    """What ``function`` returns, and how often it called each collective."""
    with CommDebugMode() as mode:
        result = function()
    return result, Counter({str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()})


@contextmanager
def watched_operands() -> Iterator[set[type]]:
    """Collect the tensor types that reach the products."""
    seen = set()
    original = torch_impl.forward, torch_impl.backward

    def watch(product):
        def watched(operands):
            seen.update(type(a) for a in operands if isinstance(a, Tensor))
            return product(operands)

        return watched

    torch_impl.forward, torch_impl.backward = map(watch, original)
    try:
        yield seen
    finally:
        torch_impl.forward, torch_impl.backward = original


def assert_same_bits(model: Block, other: nn.Module) -> None:
    results = []
    x, dy = data()
    for m in (model, other):
        torch.manual_seed(dist.get_rank())
        results.append(list(step(m, x, dy).values()))
    assert all(map(torch.equal, *results))
