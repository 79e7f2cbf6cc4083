"""What sharding and data parallelism change.

FSDP2 (``fully_shard``): between calls a Parameter is a shard, a DTensor. FSDP may leave a module's
Parameters gathered after a forward (the outermost module's, by default), or after one that failed:
in its ``MixedPrecisionPolicy``'s dtype, and what is written into them is lost when FSDP frees them.

FSDP1 (``FullyShardedDataParallel``): between calls a Parameter is a piece of a flat one, 1-D.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_FSDP = "torch.distributed.fsdp"  # not imported, it has sharded nothing


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
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules()):
        raise ValueError(
            f"expected a whole model to {doing}, got a sharded one: do it before fully_shard or"
            " FullyShardedDataParallel"
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


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return hasattr(tensor, "full_tensor")


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """``tensor`` distributed as ``target`` is: sharded, gathered, or neither."""
    if is_shard(tensor) == is_shard(target):
        return tensor
    if is_shard(tensor):
        return tensor.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, target.device_mesh, target.placements)


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


def on_first(mesh: DeviceMesh | None, action: Callable[[], None]) -> None:
    """Run ``action`` in the first process of ``mesh``; the others wait for it.

    Raises:
        RuntimeError: in the others, if it failed.
    """
    if mesh is None:
        return action()
    from torch.distributed import broadcast_object_list

    error, report = None, [None]
    if is_first(mesh):
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
