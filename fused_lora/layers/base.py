"""What every adapted layer shares: construction, merging, named adapters, state.

A layer sees its weight as a matrix ``(out, in)`` and its adapter as ``lora_A (rank, in)`` and
``lora_B (out, rank)``; ``to_matrix`` and ``from_matrix`` say how. The active adapter is Parameters;
the others wait in ``inactive_adapters``, outside ``state_dict``.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..ops.modes import is_compiling, is_exporting
from ..ops.validation import check_dtype, check_impl
from . import dora, initialization
from .config import Adapter, AdapterConfig, check_scaling
from .merging import MergeableLayer
from .replacing import check_own_forward, class_name, copy_module

ADAPTER_NAMES = ("lora_A", "lora_B", "lora_magnitude_vector")
# What an adapted layer has and its plain one has not.
_ADDED = {
    *ADAPTER_NAMES,
    *(field.name for field in fields(AdapterConfig)),
    *("impl", "enabled", "merged", "adapter_name", "inactive_adapters"),
    *("_scaling", "_scaling_tensor", "_base_weight", "_original_weight"),
}


class LoRALayer(MergeableLayer):
    """The base of adapted layers; comes before the plain layer's class.

    Attributes:
        rank, alpha, use_rslora, use_dora, init: as given; the scale follows ``scaling`` alone.
        dropout, impl: as given; may be assigned.
        scaling: ``s``; may be assigned.
        enabled: False computes the base layer alone.
        merged: whether ``weight`` contains the adapter at present.
        adapter_name: of the active adapter; the others are in ``inactive_adapters``.
    """

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")
    has_dora: ClassVar[bool] = False
    no_kernel: ClassVar[str | None] = None  # why no kernel computes this layer

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        """The class that this one adapts."""
        raise NotImplementedError

    @classmethod
    def from_plain(
        cls,
        base: nn.Module,
        config: AdapterConfig,
        impl: str = "torch",
        adapter_dtype: torch.dtype | None = None,
    ):
        """Adapt ``base``, whose very Parameters (frozen), hooks and attributes are kept."""
        cls.check_plain(base)
        layer = cls.__new__(cls)
        copy_module(base, layer)
        with torch.inference_mode(False):  # whose tensors could not train
            layer._add_adapter(config, impl, adapter_dtype)
        return layer

    @classmethod
    def check_plain(cls, base: nn.Module) -> None:
        """Check that ``base`` is a layer whose forward this class reproduces.

        Raises:
            TypeError: another class, a replaced forward, or a weight that is no float Parameter.
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

        While merged it has the merged weight, else the base weight; a PiSSA layer that is not
        merged gives back the very weight it was made from.

        Raises:
            RuntimeError: not merged, and there is no base weight.
            TypeError: a forward that was replaced on the instance.
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

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """A weight as ``(out, in)``."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix ``(out, in)`` as a weight."""
        return matrix

    @classmethod
    def adapter_shapes(cls, weight: Tensor, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors, by parameter name."""
        out_features, in_features = cls.to_matrix(weight).shape
        shapes = {"lora_A": (config.rank, in_features), "lora_B": (out_features, config.rank)}
        if config.use_dora:
            shapes["lora_magnitude_vector"] = (out_features,)
        return shapes

    @classmethod
    def check_config(cls, weight: Tensor, config: AdapterConfig) -> None:
        """Check that a layer of this kind can have such an adapter.

        Raises:
            ValueError: it cannot.
        """
        kind = class_name(cls.plain_class())
        if config.init not in cls.inits:
            raise ValueError(
                f"expected init to be one of {', '.join(cls.inits)} for {kind}, got {config.init!r}"
            )
        if config.use_dora and not cls.has_dora:
            raise ValueError(f"expected a linear layer for use_dora, got {kind}")
        largest = min(cls.to_matrix(weight).shape)
        if config.init == "pissa" and config.rank > largest:
            raise ValueError(f"expected rank <= {largest} for init='pissa', got {config.rank}")

    def _add_adapter(self, config: AdapterConfig, impl: str, adapter_dtype) -> None:
        check_impl(impl)
        check_dtype("adapter_dtype", adapter_dtype)
        self.check_config(self.weight, config)
        weight = self.weight
        weight.requires_grad_(False)
        if getattr(self, "bias", None) is not None:
            self.bias.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.impl = impl
        self.enabled = True
        self.merged = False
        self.adapter_name = "default"
        self.inactive_adapters: dict[str, Adapter] = {}
        self.__dict__["_original_weight"] = None  # PiSSA's; a Parameter, but not of this layer
        self._configure(config)
        self.lora_magnitude_vector = None
        for name, shape in self.adapter_shapes(self.weight, config).items():
            tensor = torch.empty(shape, device=weight.device, dtype=adapter_dtype)
            setattr(self, name, nn.Parameter(tensor))
        self.register_buffer("_scaling_tensor", None, persistent=False)
        self.register_buffer("_base_weight", None, persistent=False)
        self.scaling = config.scaling
        self.reset_adapter()

    def _configure(self, config: AdapterConfig) -> None:
        for name, value in vars(config).items():
            setattr(self, name, value)

    @property
    def adapter_config(self) -> AdapterConfig:
        """The active adapter's hyper-parameters."""
        return AdapterConfig(
            self.rank, self.alpha, self.dropout, self.use_rslora, self.use_dora, self.init
        )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The active adapter's Parameters, by name."""
        named = {name: self._parameters.get(name) for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def scaling(self) -> float:
        """``s``, the factor of the adapter's output."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_scaling(value)
        self._scaling = float(value)
        self._renew_scaling_tensor()

    def _scale(self) -> float | Tensor:
        """``s`` in a forward; a tensor for compilers, whose graph then holds for every value."""
        tensor = self._buffers["_scaling_tensor"]
        if tensor.is_cuda or (is_compiling() and not is_exporting()):
            return tensor
        return self._scaling

    def _renew_scaling_tensor(self) -> None:
        """The scale where kernels read it: fp32 at least, in place as long as the place serves."""
        tensor, device = self._scaling_tensor, self.lora_A.device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if (
            tensor is None
            or tensor.device != device
            or tensor.dtype != dtype
            or tensor.is_inference()
        ):
            with torch.inference_mode(False):
                tensor = torch.empty((), dtype=dtype, device=device)
            self._scaling_tensor = tensor
        tensor.fill_(self._scaling)

    def reset_parameters(self) -> None:
        """Initialise the weight, the bias and the adapter (after ``to_empty``, for example)."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self._forget_merge()
            self.__dict__["_original_weight"] = None
            self._renew_scaling_tensor()
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise the active adapter as its ``init`` says; see :mod:`.initialization`.

        Raises:
            RuntimeError: while merged.
        ValueError: PiSSA of a weight with NaN or infinity in it, without values, or sharded.
        """
        if self.merged:
            raise RuntimeError("expected an unmerged layer to initialise, got a merged one")
        if self.init == "pissa":
            self._take_principal_part()
        else:
            sharding.fill(partial(self._fill, self.init), self.lora_A, self.lora_B)
        if self.use_dora:
            norm = dora.row_norm(
                self.to_matrix(self.weight), self.lora_A, self.lora_B, self.scaling
            )
            self.lora_magnitude_vector.copy_(norm)

    def _fill(self, init: str, lora_A: Tensor, lora_B: Tensor) -> None:
        initialization.fill("default" if init == "pissa" else init, lora_A, lora_B)

    def _take_principal_part(self) -> None:
        original = self.weight if self._original_weight is None else self._original_weight
        if original.is_meta:
            raise ValueError("expected a weight with values for init='pissa', got a meta tensor")
        sharding.check_whole_weight(self.weight, "split for init='pissa'")
        if not original.isfinite().all():
            raise ValueError("expected a finite weight for init='pissa', got NaN or infinity in it")
        residual = initialization.principal(
            self.to_matrix(original), self.lora_A, self.lora_B, self.scaling
        )
        # A Parameter of its own: whoever shares the original must not see it change.
        self.__dict__["_original_weight"] = original
        self.weight = nn.Parameter(
            self.from_matrix(residual).to(original.dtype).contiguous(), requires_grad=False
        )

    def stash_adapter(self) -> Adapter:
        """A copy of the active adapter; of a sharded one, this process's part.

        Raises:
            RuntimeError: a parametrization computes part of it, or FSDP1 shows it flat.
        """
        sharding.check_gathered(self.weight, self.lora_A)
        sharding.reshard(self)
        parameters = self.adapter_parameters()
        for name in self.adapter_shapes(self.weight, self.adapter_config):
            if name not in parameters:
                raise RuntimeError(
                    f"expected {name} to be a Parameter, got one that a parametrization computes:"
                    " remove it first"
                )
        tensors = {name: p.detach().clone() for name, p in parameters.items()}
        return Adapter(self.adapter_config, self.scaling, tensors)

    @torch.no_grad()
    def new_adapter(self, config: AdapterConfig) -> Adapter:
        """An initialised adapter for this layer, aside.

        Raises:
            ValueError: the layer cannot have such an adapter.
        """
        self.check_config(self.weight, config)
        like = {"device": self.lora_A.device, "dtype": self.lora_A.dtype}
        tensors = {
            n: torch.empty(s, **like) for n, s in self.adapter_shapes(self.weight, config).items()
        }
        lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
        self._fill(config.init, lora_A, lora_B)
        if config.use_dora:
            tensors["lora_magnitude_vector"].copy_(
                dora.row_norm(self.to_matrix(self.weight), lora_A, lora_B, config.scaling)
            )
        return Adapter(config, config.scaling, tensors)

    def fits(self, adapter: Adapter) -> bool:
        """Whether an adapter has the shapes of the active one.

        Raises:
            RuntimeError: FSDP1 shows that one flat.
        """
        sharding.check_gathered(self.weight, self.lora_A)
        return {n: p.shape for n, p in self.adapter_parameters().items()} == {
            n: t.shape for n, t in adapter.tensors.items()
        }

    @torch.no_grad()
    def activate_adapter(self, adapter: Adapter) -> bool:
        """Give the active adapter these values; False if its Parameters had to be replaced.

        Where shapes match they are written in place, so that whatever optimizer holds the
        Parameters stays valid. Gradients, which are the other adapter's, are dropped.
        """
        in_place = self.fits(adapter)
        current = self.adapter_parameters()
        for name in ADAPTER_NAMES:
            tensor = adapter.tensors.get(name)
            if in_place and tensor is not None:
                current[name].copy_(sharding.like(tensor, current[name]))
                current[name].grad = None
            elif not in_place and tensor is None:
                setattr(self, name, None)
            elif not in_place:
                like = current.get(name, self.lora_B)
                with torch.inference_mode(False), torch.no_grad():
                    tensor = tensor.to(like.device, like.dtype, copy=True)
                setattr(self, name, nn.Parameter(tensor, requires_grad=like.requires_grad))
        self._configure(adapter.config)
        self.scaling = adapter.scaling
        return in_place

    @torch.no_grad()
    def _apply(self, fn, recurse=True):
        original = self._original_weight
        moved = None if original is None else fn(original.data)
        if moved is not None and moved.is_meta:
            raise RuntimeError(
                "expected a device with memory for a PiSSA layer, got meta, where the weight it was"
                " made from would be lost"
            )
        was_meta = self.lora_A.is_meta
        super()._apply(fn, recurse)
        if original is not None:
            original.data = moved
        for adapter in self.inactive_adapters.values():
            adapter.tensors = {name: fn(tensor) for name, tensor in adapter.tensors.items()}
        if was_meta and not self.lora_A.is_meta:
            self._fill_all()
        # ``.to(bfloat16)`` casts floating buffers and ``to_empty`` forgets them.
        self._renew_scaling_tensor()
        return self

    def _fill_all(self) -> None:
        """Give values to adapters that come from the meta device: none may stay uninitialised."""
        sharding.fill(partial(self._fill, self.init), self.lora_A, self.lora_B)
        for adapter in self.inactive_adapters.values():
            tensors = adapter.tensors
            self._fill(adapter.config.init, tensors["lora_A"], tensors["lora_B"])

    def extra_repr(self) -> str:
        parts = [f"rank={self.rank}", f"scaling={self.scaling:g}"]
        if plain := super().extra_repr():
            parts.insert(0, plain)
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.use_dora:
            parts.append("DoRA")
        if self.impl not in ("auto", "torch") or (self.impl == "torch" and not self.no_kernel):
            parts.append(f"impl={self.impl!r}")
        if self.adapter_name != "default" or self.inactive_adapters:
            parts.append(f"adapter={self.adapter_name!r}")
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        return ", ".join(parts)
