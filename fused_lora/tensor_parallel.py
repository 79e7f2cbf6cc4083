"""Tensor parallelism: ``parallelize_module`` styles that split adapted linear layers over a mesh.

    apply_lora(model, rank=16)
    plan = {"up": LoRAColwiseParallel(), "down": LoRARowwiseParallel()}
    parallelize_module(model, mesh, plan)

PyTorch's own ``ColwiseParallel`` and ``RowwiseParallel`` give the same numbers. They shard a
column-wise layer's ``lora_A`` along its rank dimension, so every forward gathers it, and replicate
a row-wise layer's, so every backward gathers its gradient. The styles here distribute the adapter
as :mod:`.distributed.dtensor` needs it, so neither gather happens.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from .distributed.sharding import is_shard
from .layers.base import LoRALayer
from .layers.linear import FusedLoRALinear

__all__ = ["LoRAColwiseParallel", "LoRARowwiseParallel"]


class _LoRAStyle:
    """Mixin that precedes PyTorch's style; that style handles the layers without an adapter."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, LoRALayer):
            _check(module)
        return super()._apply(module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not isinstance(module, LoRALayer):
            return super()._partition_linear_fn(name, module, device_mesh)
        for key, placement in self.lora_placements.items():
            parameter = module._parameters[key]
            if parameter is not None:
                tensor = distribute_tensor(
                    parameter, device_mesh, [placement], src_data_rank=self.src_data_rank
                )
                tensor = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                module.register_parameter(key, tensor)


class LoRAColwiseParallel(_LoRAStyle, ColwiseParallel):
    """``weight``, ``bias`` and ``lora_B`` sharded by output feature, ``lora_A`` on every rank.

    With the default layouts, forward needs no communication; backward reduces ``dx`` and the
    gradient of ``lora_A``. Takes the arguments of ``ColwiseParallel``, and is the same as that
    style for a layer without an adapter.

    Raises (in ``parallelize_module``):
        TypeError: an adapted layer that is not a :class:`FusedLoRALinear`.
        ValueError: DoRA, or a layer that is already merged or sharded.
    """

    lora_placements: ClassVar[dict[str, Placement]] = {
        "weight": Shard(0),
        "bias": Shard(0),
        "lora_A": Replicate(),
        "lora_B": Shard(0),
    }


class LoRARowwiseParallel(_LoRAStyle, RowwiseParallel):
    """``weight`` and ``lora_A`` sharded by input feature, ``bias`` and ``lora_B`` on every rank.

    Forward adds base and adapter locally and reduces the sum once; backward reduces the gradient of
    ``lora_B``. Arguments as for ``RowwiseParallel``, errors as for :class:`LoRAColwiseParallel`.
    """

    lora_placements: ClassVar[dict[str, Placement]] = {
        "weight": Shard(1),
        "bias": Replicate(),
        "lora_A": Shard(1),
        "lora_B": Replicate(),
    }


def _check(layer: LoRALayer) -> None:
    if not isinstance(layer, FusedLoRALinear):
        raise TypeError(
            f"expected a FusedLoRALinear, got {type(layer).__name__}: use PyTorch's styles for"
            " embeddings; no style supports other adapted layers"
        )
    if layer.use_dora:
        raise ValueError(
            "expected a layer without DoRA, whose norms need whole rows of W + s·B A: set"
            " use_dora=False"
        )
    if layer.merged:
        raise ValueError("expected an unmerged layer, got a merged one: merge after parallelizing")
    if any(is_shard(parameter) for parameter in layer.parameters()):
        raise ValueError(
            "expected a whole layer, got a sharded one: call parallelize_module only once, and"
            " before fully_shard"
        )
