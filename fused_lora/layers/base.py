"""The base class of adapted layers: a plain layer, adapted in place, and the plain layer again."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..distributed import sharding
from ..ops.validation import check_dtype
from .adapter import ADAPTER_NAMES
from .config import AdapterConfig
from .merging import MergeableLayer
from .offload import give_hook, has_own_hook, onloaded, with_values
from .replacing import check_own_forward, class_name, copy_module

# Attributes that an adapted layer has in addition to those of its plain layer.
ADDED = {
    *ADAPTER_NAMES,
    *(field.name for field in fields(AdapterConfig)),
    *("impl", "enabled", "merged", "adapter_name", "inactive_adapters"),
    *("has_run", "was_traced", "shared_input", "segment_route"),
    *("_scaling_tensor", "_base_weight", "_original_weight", "_adapted"),
}


class LoRALayer(MergeableLayer):
    """Base class of adapted layers; in a class statement it precedes the plain layer's class.

    ``state_dict`` holds the weight, the bias and the active adapter's tensors. It does not hold the
    scale, the rank, the dropout or other adapters: files of :func:`fused_lora.save_adapter` do.

    Attributes:
        rank, alpha, use_rslora, use_dora, init: as given; the scale follows ``scaling`` alone.
        dropout, impl: as given; may be assigned.
        scaling: ``s``; may be assigned. Kept in one buffer, in float32 or the weight's float64.
        enabled: False computes the base layer alone.
        merged: whether ``weight`` contains the adapter.
        has_run: whether forward was ever called, or a gradient of the adapter arrived.
        was_traced: whether a compiler traced the forward; it may run that code for other layers,
            whose ``has_run`` it does not set.
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

    @property
    def weight_owner(self) -> tuple[nn.Module, str]:
        """The module that holds ``weight``, and its name there."""
        return self, "weight"

    def plain(self) -> nn.Module:
        """The plain layer again, with the same Parameters (still frozen), hooks and attributes.

        While merged it has the merged weight, else the base weight. A PiSSA layer that is not
        merged returns the Parameter it was split from.

        Raises:
            RuntimeError: not merged, and the base weight is lost.
            TypeError: a forward was replaced on the instance, other than by accelerate's hooks.
        """
        self.check_forward()
        if not self.merged:
            self.check_base()
        cls = self.plain_class()
        base = cls.__new__(cls)
        copy_module(self, base, ADDED)
        give_hook(self, base, ADDED)
        if self.merged:
            self.disown_weight()
        elif self.base_weight is not self.weight:
            with onloaded(base):
                base.weight = self.base_weight
        return base

    def __prepare_scriptable__(self):
        # torch.jit.script calls this method of every module.
        raise RuntimeError(
            f"expected layers that TorchScript can compile, got a {type(self).__name__}: use"
            " torch.jit.trace or torch.export, or unload_lora(model) first, which merges"
        )

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's output, with the adapter unless merged or disabled.

        Raises:
            RuntimeError: disabled while merged with ``keep_base=False``, or the weight was resized.
            ValueError: the adapter has no values (meta).
        """
        if isinstance(input, Proxy):
            return leaf_call(self, input)
        y = self._compute(input)
        self.note_call()
        return y

    def _compute(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def check_forward(self) -> None:
        """Raise the TypeError that ``plain`` would; accelerate's hooks go over to the new layer."""
        if not has_own_hook(self):
            check_own_forward(self)

    @with_values
    def reset_parameters(self) -> None:
        """Initialise the weight, the bias and the adapter, for example after ``to_empty``."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self._forget_merge()
            self.__dict__["_original_weight"] = None
            self._write_scale(self.scaling)
            self.reset_adapter()


def leaf_call(layer: LoRALayer, *args, **kwargs) -> Proxy:
    """The result of a call while ``torch.fx`` traces: ``layer`` is a leaf, as PyTorch's layers are.

    FX decides by the name of the class's module, and would trace into ``forward``.

    Raises:
        TypeError: ``layer`` is the root of the trace, which cannot be a leaf.
    """
    tracer = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Proxy)).tracer
    if tracer.root is layer:
        raise TypeError(
            f"expected a model that contains the {type(layer).__name__}, got the layer itself as"
            " the root of torch.fx: trace nn.Sequential(layer), or use torch.export"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, kwargs)
