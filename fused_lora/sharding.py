"""What FSDP2 (``fully_shard``) changes: between calls a Parameter is a shard, a DTensor.

FSDP may leave a module's Parameters gathered after a forward (the outermost module's, by default),
or after one that failed. Values written into gathered Parameters are lost when FSDP frees them.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

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
    kind = getattr(sys.modules.get(_FSDP), "FSDPModule", ())
    if any(isinstance(module, kind) for module in model.modules()):
        raise ValueError(
            f"expected a whole model to {doing}, got a sharded one: do it before fully_shard"
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
