"""The inactive adapters of a layer, where they compute and train beside the active one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.modes import is_observed
from .config import Adapter
from .scale import ScaledLayer, current_scale
from .segment_route import NamedAdapter


class InactiveAdapters(ScaledLayer):
    """Their part of :class:`.base.LoRALayer`, which documents the attributes."""

    no_kernel: ClassVar[str | None] = None  # the reason if no kernel computes this layer

    adapter_name: str
    inactive_adapters: dict[str, Adapter]
    dropout: float
    merged: bool

    def named_adapter(self, name: str) -> NamedAdapter:
        """An adapter, active or not, for segments of rows."""
        if name == self.adapter_name:
            tensors, scaling, p = self._parameters, current_scale(self, is_observed()), self.dropout
        else:
            adapter = self.inactive_adapters[name]
            tensors, scaling, p = adapter.tensors, adapter.scaling, adapter.config.dropout
        return NamedAdapter(
            tensors["lora_A"], tensors["lora_B"], scaling, p if self.training else 0.0
        )

    def segment_reason(self, names: Sequence[str]) -> str | None:
        """Why no segments of rows can have these adapters; None if they can."""
        if self.no_kernel is not None:
            return f"a {type(self).__name__}"
        if self.merged:
            return "a merged layer"
        for name in names:
            if name == self.adapter_name:
                tensors, config = self._parameters, self.adapter_config
            elif name in self.inactive_adapters:
                tensors = self.inactive_adapters[name].tensors
                config = self.inactive_adapters[name].config
            else:
                return f"a layer without the adapter {name!r}"
            if config.use_dora:
                return f"DoRA in the adapter {name!r}"
            lora_A, lora_B = tensors.get("lora_A"), tensors.get("lora_B")
            if lora_A is None or lora_B is None:
                return f"a computed adapter {name!r}"
            if lora_A.is_meta and not self.weight_like(self).is_meta:
                return f"the adapter {name!r} on the meta device"
        return None

    @torch.no_grad()
    def train_inactive(self) -> None:
        """Make the tensors of inactive adapters Parameters, which train as the active ones do.

        They stay outside ``parameters()``. From then on each adapter has Parameters of its own.
        """
        with torch.inference_mode(False):
            for adapter in self.inactive_adapters.values():
                for name, tensor in adapter.tensors.items():
                    if not isinstance(tensor, nn.Parameter):
                        like = self._parameters.get(name)
                        trains = like is None or like.requires_grad
                        adapter.tensors[name] = nn.Parameter(tensor, requires_grad=trains)

    @property
    def trains_inactive(self) -> bool:
        """Whether inactive adapters have Parameters, see :meth:`train_inactive`."""
        return any(
            isinstance(tensor, nn.Parameter)
            for adapter in self.inactive_adapters.values()
            for tensor in adapter.tensors.values()
        )

    def _move_inactive(self, fn: Callable[[Tensor], Tensor]) -> None:
        for adapter in self.inactive_adapters.values():
            adapter.tensors = {name: _moved(tensor, fn) for name, tensor in adapter.tensors.items()}


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(tensor)``; a Parameter stays the same object if it can, so that optimizers keep it."""
    if not isinstance(tensor, nn.Parameter):
        return fn(tensor)
    data = fn(tensor.data)
    if not torch._has_compatible_shallow_copy_type(tensor.data, data):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    tensor.data = data
    if tensor.grad is not None:
        tensor.grad.data = fn(tensor.grad.data)
    return tensor
