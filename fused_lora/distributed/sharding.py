"""What sharding and data parallelism change.

FSDP2 (``fully_shard``): between calls a Parameter is a shard, a DTensor. FSDP may leave a module's
Parameters gathered after a forward (the outermost module's, by default), or after one that failed:
in its ``MixedPrecisionPolicy``'s dtype, and what is written into them is lost when FSDP frees them.

FSDP1 (``FullyShardedDataParallel``): between calls a Parameter is a piece of a flat one, 1-D.

Tensor parallelism (:mod:`.dtensor`): a Parameter is a DTensor within calls too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
    # torch.compile reads it too; unlike the classes it also marks the parts of a sharded model.
    by_fsdp = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    if by_fsdp or any(map(is_shard, model.parameters())):
        raise _sharded("model", doing)


def check_whole_weight(weight: Tensor, doing: str) -> None:
    """Check one weight as :func:`check_whole` checks a model."""
    if is_shard(weight):
        raise _sharded("weight", doing)


def _sharded(what: str, doing: str) -> ValueError:
    return ValueError(
        f"expected a whole {what} to {doing}, got a sharded one: do it before fully_shard,"
        " FullyShardedDataParallel or parallelize_module"
    )


def check_replaceable(model: nn.Module, doing: str) -> None:
    """Check that Parameters of ``model`` may be new ones: no wrapper holds the old ones.

    Raises:
        ValueError: it is sharded or in ``DistributedDataParallel``.
    """
    check_whole(model, doing)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"expected a model without wrapper to {doing}, got one in DistributedDataParallel,"
            " which would not reduce gradients of new Parameters: do it before wrapping"
        )


def check_original_parameters(place: str, layer: nn.Module) -> None:
    """Check that FSDP1 has left a layer its Parameters, which are found by name and identity.

    Raises:
        ValueError: it has not.
    """
    if not getattr(layer, "_fsdp_use_orig_params", True):
        raise ValueError(
            "expected FullyShardedDataParallel(..., use_orig_params=True), got False, which leaves"
            f" {place} no lora_A and lora_B of its own"
        )


def check_gathered(*matrices: Tensor) -> None:
    """Check that FSDP1 shows weights and factors as they are, not as pieces of a flat Parameter.

    Raises:
        RuntimeError: it does not.
    """
    if any(matrix.dim() < 2 for matrix in matrices):
        raise RuntimeError(
            "expected whole Parameters, got FSDP1's flat ones: do it on every rank within"
            " FullyShardedDataParallel.summon_full_params(model)"
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


def is_shard(*tensors: Tensor) -> bool:
    """Whether one of ``tensors`` is a DTensor."""
    kind = getattr(sys.modules.get(_TENSOR), "DTensor", ())
    for tensor in tensors:  # noqa: SIM110 - a generator costs more than the questions
        if isinstance(tensor, kind):
            return True
    return False


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """``tensor`` distributed as ``target`` is: sharded, gathered, or neither."""
    if not is_shard(target):
        return tensor.full_tensor() if is_shard(tensor) else tensor
    mesh = target.device_mesh
    if is_shard(tensor) and tensor.device_mesh != mesh:
        tensor = tensor.full_tensor()
    if not is_shard(tensor):
        from torch.distributed.tensor import Replicate, distribute_tensor

        # Replicas first: nothing can be cut into what FSDP2 makes of tensor parallelism's shards.
        tensor = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)
    return tensor.redistribute(placements=target.placements)


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


def mesh_of(modules: Iterable[nn.Module]) -> DeviceMesh | None:
    """The device mesh of the first DTensor among the modules' Parameters, or None."""
    for module in modules:
        reshard(module)
        for parameter in module.parameters():
            if is_shard(parameter):
                return parameter.device_mesh
    return None


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this process is the first of ``mesh``, or the only one."""
    return mesh is None or not any(mesh.get_coordinate())


def on_first(
    mesh: DeviceMesh | None, action: Callable[[], None], error: BaseException | None = None
) -> None:
    """Run ``action`` in the first process of ``mesh``; the others wait for it.

    Args:
        error: of the first process before that, instead of the action.

    Raises:
        RuntimeError: in the others, if it failed.
    """
    if mesh is None:
        return action()
    from torch.distributed import broadcast_object_list

    report = [None if error is None else f"{type(error).__name__}: {error}"]
    if is_first(mesh) and error is None:
        try:
            action()
        except BaseException as caught:  # raised below: the others must not wait for ever
            error, report = caught, [f"{type(caught).__name__}: {caught}"]
    for dimension in range(mesh.ndim):  # the first of each row, then of each column of those
        broadcast_object_list(report, group=mesh.get_group(dimension), group_src=0)
    if error is not None:
        raise error
    if report[0] is not None:
        raise RuntimeError(f"expected the first process to write the files, it failed: {report[0]}")
