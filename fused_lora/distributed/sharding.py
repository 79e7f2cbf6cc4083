"""Checks and helpers for sharded and data-parallel models. A Parameter of such a model:

FSDP2 (``fully_shard``): between calls it is a shard, a DTensor. FSDP may leave a module's
Parameters gathered after a forward (by default the outermost module's) or after one that failed.
Gathered Parameters have the dtype of the ``MixedPrecisionPolicy``, and values written into them are
lost when FSDP frees them; see :func:`reshard`.

FSDP1 (``FullyShardedDataParallel``): between calls it is a 1-D piece of a flat Parameter.

Tensor parallelism (:mod:`.dtensor`): it is a DTensor, during calls too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# If these modules were never imported, nothing can be sharded.
_FSDP = "torch.distributed.fsdp"
_TENSOR = "torch.distributed.tensor"


def reshard(module: nn.Module) -> None:
    """Free the gathered Parameters of ``module``, so that its shards can be read and written."""
    if _FSDP in sys.modules and module._state_dict_pre_hooks:
        module.state_dict()  # FSDP2's hook always frees them; its reshard() may be a no-op


def check_whole(model: nn.Module, doing: str) -> None:
    """Check that ``model`` is not sharded.

    Args:
        doing: what needs a whole model, for the error: "to {doing}".

    Raises:
        ValueError: it is sharded.
    """
    # The attribute, which torch.compile reads too, also marks the submodules of a sharded model;
    # FSDP's classes mark only the module that was wrapped.
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
    """Check that Parameters of ``model`` may be replaced: no wrapper holds the old ones.

    Raises:
        ValueError: it is sharded or wrapped in ``DistributedDataParallel``.
    """
    check_whole(model, doing)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"expected a model without wrapper to {doing}, got one in DistributedDataParallel,"
            " which would not reduce gradients of new Parameters: do it before wrapping"
        )


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, without the one that ``fully_shard`` puts before it."""
    fsdp = getattr(sys.modules.get(_FSDP), "FSDPModule", ())
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, fsdp))


def check_original_parameters(place: str, layer: nn.Module) -> None:
    """Check that FSDP1 kept a layer's own Parameters, which are found by name and identity.

    Raises:
        ValueError: it replaced them by its flat Parameter.
    """
    if not getattr(layer, "_fsdp_use_orig_params", True):
        raise ValueError(
            "expected FullyShardedDataParallel(..., use_orig_params=True), got False, which leaves"
            f" {place} without lora_A and lora_B of its own"
        )


def check_gathered(*matrices: Tensor) -> None:
    """Check that weights and factors are whole, not FSDP1's 1-D pieces of a flat Parameter.

    Raises:
        RuntimeError: one is such a piece.
    """
    if any(matrix.dim() < 2 for matrix in matrices):
        raise RuntimeError(
            "expected whole Parameters, got FSDP1's flat ones: do it on every rank within"
            " FullyShardedDataParallel.summon_full_params(model)"
        )


def is_flat_view(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` is FSDP1's view into a flat Parameter.

    It requires grad if the flat Parameter does, even where the original Parameter is frozen.
    """
    attributes = module.__dict__
    if "_is_fsdp_managed_module" not in attributes:
        return False
    return getattr(weight._base, "_is_flat_param", False) or (
        is_shard(weight)
        and "weight" in attributes  # of tensor parallelism; no property computes it
    )


def ready(tensor: Tensor) -> Tensor:
    """``tensor``, after waiting for a collective that still fills it: kernels read its memory."""
    return _Wait.apply(tensor) if hasattr(tensor, "trigger_wait") else tensor


class _Wait(torch.autograd.Function):
    """Unwraps an AsyncCollectiveTensor, which a DTensor's local part or its gradient can be."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.trigger_wait()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def is_shard(*tensors: Tensor) -> bool:
    """Whether one of ``tensors`` is a DTensor."""
    kind = getattr(sys.modules.get(_TENSOR), "DTensor", ())
    for tensor in tensors:  # noqa: SIM110 - a generator costs more than the checks
        if isinstance(tensor, kind):
            return True
    return False


def anywhere(flag: Tensor | bool, tensor: Tensor) -> bool:
    """Whether ``flag`` is true in any process that holds a part of ``tensor``."""
    if not is_shard(tensor):
        return bool(flag)
    from torch.distributed.tensor import DTensor, Partial

    mesh = tensor.device_mesh
    count = torch.full((1,), int(flag), device=tensor.to_local().device)
    return bool(DTensor.from_local(count, mesh, [Partial()] * mesh.ndim).full_tensor())


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """``tensor`` distributed as ``target`` is: with its mesh and placements, or plain."""
    if not is_shard(target):
        return tensor.full_tensor() if is_shard(tensor) else tensor
    mesh = target.device_mesh
    if is_shard(tensor) and tensor.device_mesh != mesh:
        tensor = tensor.full_tensor()
    if not is_shard(tensor):
        from torch.distributed.tensor import Replicate, distribute_tensor

        # Replicated first: distribute_tensor cannot create the strided shards that FSDP2 makes of
        # tensor-parallel Parameters.
        tensor = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)
    return tensor.redistribute(placements=target.placements)


def fill(draw: Callable[..., None], *parameters: Tensor) -> None:
    """Call ``draw(*parameters)``, which writes random numbers in place, alike on all ranks.

    The ranks' generators may differ, but replicas must not: the first rank's numbers are used.
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
        reshard(module)  # a gathered Parameter is a plain tensor
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
        error: an earlier error of the first process, which is raised instead of running ``action``.

    Raises:
        RuntimeError: in the other processes, if the first one failed.
    """
    if mesh is None:
        return action()
    from torch.distributed import broadcast_object_list

    report = [None if error is None else f"{type(error).__name__}: {error}"]
    if is_first(mesh) and error is None:
        try:
            action()
        except BaseException as caught:  # raised after the broadcast that the others wait for
            error, report = caught, [f"{type(caught).__name__}: {caught}"]
    for dimension in range(mesh.ndim):  # one dimension after another, until all ranks have it
        broadcast_object_list(report, group=mesh.get_group(dimension), group_src=0)
    if error is not None:
        raise error
    if report[0] is not None:
        raise RuntimeError(f"expected the first process to write files, but it failed: {report[0]}")
