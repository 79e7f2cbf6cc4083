"""The base class of adapted layers: a plain layer, adapted in place, and the plain layer again."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn

from ..distributed import sharding
from ..ops.validation import check_dtype
from .adapter import ADAPTER_NAMES
from .config import AdapterConfig
from .merging import MergeableLayer
from .replacing import check_own_forward, class_name, copy_module

# Attributes that an adapted layer has in addition to those of its plain layer.
_ADDED = {
    *ADAPTER_NAMES,
    *(field.name for field in fields(AdapterConfig)),
    *("impl", "enabled", "merged", "adapter_name", "inactive_adapters"),
    *("_scaling", "_scaling_tensor", "_base_weight", "_original_weight"),
}


class LoRALayer(MergeableLayer):
    """Base class of adapted layers; in a class statement it precedes the plain layer's class.

    Attributes:
        rank, alpha, use_rslora, use_dora, init: as given; the scale follows ``scaling`` alone.
        dropout, impl: as given; may be assigned.
        scaling: ``s``; may be assigned.
        enabled: False computes the base layer alone.
        merged: whether ``weight`` contains the adapter.
        adapter_name: name of the active adapter; the others are in ``inactive_adapters``.
    """

    @classmethod
    def from_plain(
        cls,
        base: nn.Module,
        config: AdapterConfig,
        impl: str = "torch",
        adapter_dtype: torch.dtype | None = None,
    ):
        """Adapt ``base``: its Parameters are frozen and reused; its hooks and attributes stay."""
        cls.check_plain(base)
        layer = cls.__new__(cls)
        copy_module(base, layer)
        with torch.inference_mode(False):  # inference tensors could not be trained
            layer._add_adapter(config, impl, adapter_dtype)
        return layer

    @classmethod
    def check_plain(cls, base: nn.Module) -> None:
        """Check that ``base`` is a layer whose forward this class reproduces.

        Raises:
            TypeError: another class, a replaced forward, or a weight that is not a float Parameter.
            ValueError: a setting that cannot be adapted, or a sharded weight.
        """
        plain = cls.plain_class()
        if type(base) is not plain:
            raise TypeError(f"expected an {class_name(plain)}, got {type(base).__name__}")
        check_own_forward(base)
        if not isinstance(base.weight, nn.Parameter):
            raise TypeError(
                "expected weight to be a Parameter, got one that pruning or weight norm computes"
            )
        check_dtype("the weight's dtype", base.weight.dtype)
        sharding.check_whole_weight(base.weight, "adapt")

    def plain(self) -> nn.Module:
        """The plain layer again, with the same Parameters (still frozen), hooks and attributes.

        While merged it has the merged weight, else the base weight. A PiSSA layer that is not
        merged returns the Parameter it was split from.

        Raises:
            RuntimeError: not merged, and the base weight is lost.
            TypeError: a forward was replaced on the instance.
        """
        check_own_forward(self)
        if not self.merged:
            self.check_base()
        cls = self.plain_class()
        base = cls.__new__(cls)
        copy_module(self, base, _ADDED)
        if not self.merged:
            base.weight = self.base_weight
        if self.merged:
            self.disown_weight()
        return base

    def reset_parameters(self) -> None:
        """Initialise the weight, the bias and the adapter, for example after ``to_empty``."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self._forget_merge()
            self.__dict__["_original_weight"] = None
            self._renew_scaling_tensor()
            self.reset_adapter()
