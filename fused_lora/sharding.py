"""What FSDP2 (``fully_shard``) changes: between calls a Parameter is a shard, a DTensor.

So it is under tensor parallelism (:mod:`.placements`), and within calls too.

FSDP may leave a module's Parameters gathered after a forward (the outermost module's, by default),
or after one that failed. Values written into gathered Parameters are lost when FSDP frees them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Not imported, they have sharded nothing.
_FSDP = "torch.distributed.fsdp"
_TENSOR = "torch.distributed.tensor"


def reshard(module: nn.Module) -> None:
    """Free the gathered Parameters of ``module``, so that its Parameters can be written."""
    if _FSDP in sys.modules and module._state_dict_pre_hooks:
        module.state_dict()  # FSDP's hook frees them always; its reshard() may decline to


def check_whole(model: nn.Module, doing: str) -> None:
    """Check that ``model`` is not sharded.

    Raises:
        ValueError: it is; says what cannot be done.
    """
    kind = getattr(sys.modules.get(_FSDP), "FSDPModule", ())
    by_fsdp = any(isinstance(module, kind) for module in model.modules())
    if by_fsdp or any(map(is_shard, model.parameters())):
        raise _sharded("model", doing)


def check_whole_weight(weight: Tensor, doing: str) -> None:
    """Check one weight as :func:`check_whole` checks a model."""
    if is_shard(weight):
        raise _sharded("weight", doing)


def _sharded(what: str, doing: str) -> ValueError:
    return ValueError(
        f"expected a whole {what} to {doing}, got a sharded one: do it before fully_shard or"
        " parallelize_module"
    )


def ready(tensor: Tensor) -> Tensor:
    """``tensor``, waited for if a collective is still bringing it: kernels need its memory."""
    return _Wait.apply(tensor) if hasattr(tensor, "trigger_wait") else tensor


class _Wait(torch.autograd.Function):
    """An AsyncCollectiveTensor, as DTensors give and as their gradients are, as a plain tensor."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.trigger_wait()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return isinstance(tensor, getattr(sys.modules.get(_TENSOR), "DTensor", ()))


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """``tensor`` distributed as ``target`` is: sharded, gathered, or neither."""
    if is_shard(tensor) == is_shard(target):
        return tensor
    if is_shard(tensor):
        return tensor.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, target.device_mesh, target.placements)


def fill(draw: Callable[..., None], *parameters: Tensor) -> None:
    """``draw(*parameters)``, random numbers written in place; one rank draws for all.

    The ranks' generators may differ, and replicas must not.
    """
    if not is_shard(parameters[0]):
        draw(*parameters)
        return
    whole = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    draw(*whole)
    for parameter, tensor in zip(parameters, whole, strict=True):
        parameter.copy_(like(tensor, parameter))
