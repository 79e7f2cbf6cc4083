"""The scale of a layer's adapter: one 0-d buffer, which every forward, merge and copy reads.

A number kept beside it would miss what changes the buffers of a model: ``AveragedModel``,
``functional_call``, ``stack_module_state``, a broadcast.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..ops.modes import is_observed, is_recorded, is_transformed
from .config import AdapterConfig, check_scaling


def _unrounded(value: float, configured: float) -> float:
    """The number that float32 rounded to ``value``: ``configured``, else the shortest decimal."""
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((n for n in (configured, *shorter) if _float32(n) == value), value)


def _float32(value: float) -> float:
    return ctypes.c_float(value).value  # infinite if too large


class ScaledLayer(nn.Module):
    """The scale's part of :class:`.base.LoRALayer`, which documents the attributes."""

    adapter_config: AdapterConfig

    @classmethod
    def weight_like(cls, module: nn.Module) -> Tensor:
        """A tensor with the shape, the device and the precision of the weight to adapt.

        Args:
            module: a plain layer, or an adapted one.
        """
        return module.weight

    @property
    def scaling(self) -> float:
        """``s``, the factor of the adapter's output.

        The buffer ``_scaling_tensor`` holds it; float32 rounds, so this is the number that was
        rounded: the configured one, else the shortest.
        """
        tensor, configured = self._buffers["_scaling_tensor"], self.adapter_config.scaling
        if tensor.is_meta or is_fake(tensor):
            return configured
        value = tensor.item()
        return _unrounded(value, configured) if tensor.dtype == torch.float32 else value

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_scaling(value)
        self._write_scale(float(value))

    def _scale(self) -> float | Tensor:
        return current_scale(self, is_observed())

    def _tensor_scale(self, tensor: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None or weight.is_cpu:
            return tensor
        return tensor.to(weight.device)  # the weight was loaded there, or is on meta

    def _write_scale(self, value: float) -> None:
        """Write the scale, at least in float32, where every forward reads it.

        In place if device and dtype still match: a captured CUDA graph reads the same memory. While
        the weight is on the meta device the scale stays where it is, or on the CPU.

        Raises:
            ValueError: a finite number that float32 would make infinite.
        """
        tensor = self._buffers.get("_scaling_tensor")
        weight = self.weight_like(self)
        device = weight.device
        if device.type == "meta":
            device = torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if dtype == torch.float32 and math.isinf(_float32(value)) and not math.isinf(value):
            raise ValueError(f"expected a scaling in float32's range, got {value}")
        if (
            tensor is None
            or tensor.device != device
            or tensor.dtype != dtype
            or tensor.is_inference()
        ):
            with torch.inference_mode(False):
                tensor = torch.empty((), dtype=dtype, device=device)
            # Not by register_buffer, which accelerate's init_empty_weights replaces.
            self._buffers["_scaling_tensor"] = tensor
            self._non_persistent_buffers_set.add("_scaling_tensor")
        tensor.fill_(value)


def current_scale(layer: ScaledLayer, observed: bool) -> float | Tensor:
    """``s`` for a forward: a number on CPUs, whose ``addmm`` applies it in the same pass.

    A tensor on GPUs, where reading it would wait for the device, for compilers and exporters,
    whose graphs must not hold its value (``torch.jit.trace`` does record a number), for ``vmap``
    over several models, and for derivatives in the scale, which a number would drop in silence.

    Args:
        observed: the result of :func:`.modes.is_observed`.
    """
    tensor = layer._buffers["_scaling_tensor"]
    if not tensor.is_cpu:
        return tensor
    if tensor.requires_grad or (observed and (is_recorded() or is_transformed())):
        return layer._tensor_scale(tensor)
    return tensor.item()
