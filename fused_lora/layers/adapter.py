"""The adapters of a layer: hyper-parameters, Parameters, scale, initialisation, switching.

A layer exposes its weight as a matrix ``(out, in)`` and its adapter as ``lora_A (rank, in)`` and
``lora_B (out, rank)``; ``to_matrix`` and ``from_matrix`` convert. The active adapter's tensors are
Parameters; the others are in ``inactive_adapters``, outside ``state_dict``.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..ops.modes import is_compiling, is_exporting
from ..ops.validation import check_dtype, check_impl
from . import dora, initialization
from .config import Adapter, AdapterConfig, check_scaling
from .replacing import class_name

ADAPTER_NAMES = ("lora_A", "lora_B", "lora_magnitude_vector")


class AdapterLayer(nn.Module):
    """The adapters' part of :class:`.base.LoRALayer`, which documents the attributes."""

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")
    has_dora: ClassVar[bool] = False
    no_kernel: ClassVar[str | None] = None  # the reason if no kernel computes this layer

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        """The class of the plain layer, such as ``nn.Linear``."""
        raise NotImplementedError

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """View a weight as ``(out, in)``."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """View a matrix ``(out, in)`` as a weight; the inverse of :meth:`to_matrix`."""
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
        """Check that this kind of layer supports an adapter with these hyper-parameters.

        Raises:
            ValueError: it does not.
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
        # For PiSSA. Not set as an attribute: nn.Module would register it as a Parameter.
        self.__dict__["_original_weight"] = None
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
        """``s`` for a forward: a tensor on GPUs and for compilers, so no graph holds its value."""
        tensor = self._buffers["_scaling_tensor"]
        if tensor.is_cuda or (is_compiling() and not is_exporting()):
            return tensor
        return self._scaling

    def _renew_scaling_tensor(self) -> None:
        """Write the scale where kernels read it, at least fp32.

        In place if device and dtype still match: a captured CUDA graph reads the same memory.
        """
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

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise the active adapter according to ``init``; see :mod:`.initialization`.

        Raises:
            RuntimeError: while merged.
            ValueError: PiSSA of a weight that is not finite, has no values (meta), or is sharded.
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
        # A new Parameter: modules that share the original weight must not see it change.
        self.__dict__["_original_weight"] = original
        self.weight = nn.Parameter(
            self.from_matrix(residual).to(original.dtype).contiguous(), requires_grad=False
        )

    def stash_adapter(self) -> Adapter:
        """A copy of the active adapter; if it is sharded, of this process's shard.

        Raises:
            RuntimeError: a parametrization computes one of its tensors, or FSDP1 has flattened it.
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
        """A new initialised adapter for this layer; the active one stays active.

        Raises:
            ValueError: the layer does not support these hyper-parameters.
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
            RuntimeError: FSDP1 has flattened the active one.
        """
        sharding.check_gathered(self.weight, self.lora_A)
        return {n: p.shape for n, p in self.adapter_parameters().items()} == {
            n: t.shape for n, t in adapter.tensors.items()
        }

    @torch.no_grad()
    def activate_adapter(self, adapter: Adapter) -> bool:
        """Give the active adapter these values; return False if its Parameters were replaced.

        If shapes match, the Parameters are written in place and an optimizer that holds them
        stays valid. Their gradients belong to the previous adapter and are dropped.
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
        # ``.to(bfloat16)`` casts the buffer; ``to_empty`` leaves it uninitialised.
        self._renew_scaling_tensor()
        return self

    def _fill_all(self) -> None:
        """Initialise all adapters after a move from the meta device, where they had no values."""
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
