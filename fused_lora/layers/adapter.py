"""The adapters of a layer: hyper-parameters, Parameters, scale, initialisation, switching.

A layer exposes its weight as a matrix ``(out, in)`` and its adapter as ``lora_A (rank, in)`` and
``lora_B (out, rank)``; ``to_matrix`` and ``from_matrix`` convert. The active adapter's tensors are
Parameters; the others are in ``inactive_adapters``, outside ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..ops.modes import is_dynamo_compiling
from ..ops.validation import check_dtype, check_impl, multiplies_itself
from . import dora, initialization
from .config import Adapter, AdapterConfig
from .inactive import InactiveAdapters
from .offload import has_values, with_values
from .replacing import class_name
from .segment_route import SegmentRoute
from .shared_input import SharedInput

ADAPTER_NAMES = ("lora_A", "lora_B", "lora_magnitude_vector")


class AdapterLayer(InactiveAdapters):
    """The adapters' part of :class:`.base.LoRALayer`, which documents the attributes."""

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")
    has_dora: ClassVar[bool] = False
    runs_base: ClassVar[bool] = False  # the plain layer computes its own product

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
    def matrix_shape(cls, weight: Tensor) -> tuple[int, int]:
        """``(out, in)``, of the weight's shape alone: a quantised one may have no transpose."""
        return tuple(cls.to_matrix(torch.empty(weight.shape, device="meta")).shape)

    @classmethod
    def adapter_shapes(cls, weight: Tensor, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors, by parameter name."""
        out_features, in_features = cls.matrix_shape(weight)
        shapes = {"lora_A": (config.rank, in_features), "lora_B": (out_features, config.rank)}
        if config.use_dora:
            shapes["lora_magnitude_vector"] = (out_features,)
        return shapes

    def stacked(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An adapter's factors as ``(E, rank, in)`` and ``(E, out, rank)``; ``E`` is 1 here."""
        return tensors["lora_A"].flatten(1)[None], tensors["lora_B"].flatten(1)[None]

    def unstacked(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The tensors of an adapter with these factors; the inverse of :meth:`stacked`."""
        config = AdapterConfig(A.shape[1])
        shapes = self.adapter_shapes(self.weight_like(self), config)
        return {"lora_A": A.view(shapes["lora_A"]), "lora_B": B.view(shapes["lora_B"])}

    @classmethod
    def check_config(cls, weight: Tensor, config: AdapterConfig) -> None:
        """Check that this kind of layer supports an adapter with these hyper-parameters.

        Raises:
            ValueError: it does not.
        """
        kind = class_name(cls.plain_class())
        if (config.use_dora or config.init == "pissa") and (
            cls.runs_base or multiplies_itself(weight)
        ):
            option = "use_dora=True" if config.use_dora else "init='pissa'"
            raise ValueError(
                f"expected a plain weight for {option}, which computes with its values, got a layer"
                " that computes its own product (quantised, hooked or of another class): use a"
                " plain adapter, or leave the layer out with exclude_modules"
            )
        if config.init not in cls.inits:
            raise ValueError(
                f"expected init to be one of {', '.join(cls.inits)} for {kind}, got {config.init!r}"
            )
        if config.use_dora and not cls.has_dora:
            raise ValueError(f"expected a linear layer for use_dora, got {kind}")
        largest = min(cls.matrix_shape(weight))
        if config.init == "pissa" and config.rank > largest:
            raise ValueError(f"expected rank <= {largest} for init='pissa', got {config.rank}")

    def _add_adapter(self, config: AdapterConfig, impl: str, adapter_dtype) -> None:
        check_impl(impl)
        check_dtype("adapter_dtype", adapter_dtype)
        weight = self.weight_like(self)
        self.check_config(weight, config)
        weight.requires_grad_(False)
        if isinstance(bias := getattr(self, "bias", None), Tensor):
            bias.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.impl = impl
        self.enabled = True
        self.merged = False
        self.has_run = self.was_traced = False
        self.shared_input: SharedInput | None = None
        self.segment_route: SegmentRoute | None = None
        self.adapter_name = "default"
        self.inactive_adapters: dict[str, Adapter] = {}
        # For PiSSA. Not set as an attribute: nn.Module would register it as a Parameter.
        self.__dict__["_original_weight"] = None
        self._configure(config)
        self.lora_magnitude_vector = None
        for name, shape in self.adapter_shapes(weight, config).items():
            tensor = torch.empty(shape, device=weight.device, dtype=adapter_dtype)
            setattr(self, name, nn.Parameter(tensor))
        self._base_weight = None
        self._write_scale(config.scaling)
        self.reset_adapter()

    def _configure(self, config: AdapterConfig) -> None:
        for name, value in vars(config).items():
            setattr(self, name, value)

    def exchange_adapter(self, adapter: Adapter) -> None:
        """Make an adapter active by its own Parameters, in the place of the active one's."""
        for name in ADAPTER_NAMES:
            setattr(self, name, adapter.tensors.get(name))
        self._configure(adapter.config)
        self.scaling = adapter.scaling

    def note_call(self) -> None:
        """Set ``has_run``."""
        if is_dynamo_compiling():
            self.note_traced_call()
        elif not self.has_run:
            self.has_run = True

    def note_traced_call(self) -> None:
        """Set ``has_run`` while Dynamo traces a forward: no side effect enters the graph.

        A side effect is an error within an operator such as activation checkpointing.
        """
        self.__dict__["has_run"] = self.__dict__["was_traced"] = True

    # Set as torch.compiler.assume_constant_result sets it, without importing Dynamo.
    note_traced_call._dynamo_marked_constant = True

    def misfit(self) -> str | None:
        """Why the active adapter does not fit the weight, which other code may have resized."""
        weight = self.weight_like(self)
        if weight.dim() < 2 or self.lora_A.dim() < 2:
            return None  # FSDP1's 1-D pieces
        expected = self.adapter_shapes(weight, self.adapter_config)
        for name, parameter in self.adapter_parameters().items():
            if tuple(parameter.shape) != expected[name]:
                return (
                    f"expected {name} of shape {expected[name]} for a weight of shape"
                    f" {tuple(weight.shape)}, got {tuple(parameter.shape)}: resize the layer"
                    " before it is adapted, or call unload_lora first and adapt it again"
                )
        return None

    def check_fit(self) -> None:
        """Check that the active adapter fits the weight.

        Raises:
            RuntimeError: it does not.
        """
        if problem := self.misfit():
            raise RuntimeError(problem)

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

    def adapter_device(self) -> torch.device:
        """The device of the adapter's values: its Parameters', the weight's if they are on meta."""
        weight = self.weight_like(self)
        tensors = self.lora_A, weight, self._buffers["_scaling_tensor"]
        return next((t.device for t in tensors if not t.is_meta), weight.device)

    def check_values(self) -> None:
        """Check that weight and active adapter have values, here or where accelerate offloads them.

        Raises:
            ValueError: they are on the meta device.
        """
        if not has_values(self, "weight", *ADAPTER_NAMES):
            raise ValueError(f"expected tensors with values, got {self._without_values()}")

    def _without_values(self) -> str:
        if self.weight_like(self).is_meta:
            return (
                "a layer on the meta device: load its weights first (load_state_dict with"
                " assign=True, or to_empty and load_state_dict), or remove the hooks that offload"
                " it as a part of another module"
                " (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        return (
            "an adapter on the meta device: load it (load_adapter or load_state_dict), or"
            " initialise it by moving the model to its device (model.to)"
        )

    @torch.no_grad()
    @with_values
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

    @with_values
    def stash_adapter(self) -> Adapter:
        """A copy of the active adapter; if it is sharded, of this process's shard.

        Raises:
            RuntimeError: a parametrization computes one of its tensors, or FSDP1 has flattened it.
            ValueError: it has no values (meta).
        """
        self.check_values()
        weight = self.weight_like(self)
        sharding.check_gathered(weight, self.lora_A)
        sharding.reshard(self)
        parameters = self.adapter_parameters()
        for name in self.adapter_shapes(weight, self.adapter_config):
            if name not in parameters:
                raise RuntimeError(
                    f"expected {name} to be a Parameter, got one that a parametrization computes:"
                    " remove it first"
                )
        tensors = {name: p.detach().clone() for name, p in parameters.items()}
        return Adapter(self.adapter_config, self.scaling, tensors)

    def active_adapter(self) -> Adapter:
        """The active adapter: the layer's Parameters themselves, also those on meta."""
        return Adapter(self.adapter_config, self.scaling, dict(self.adapter_parameters()))

    @torch.no_grad()
    @with_values
    def new_adapter(self, config: AdapterConfig) -> Adapter:
        """A new initialised adapter for this layer; the active one stays active.

        Raises:
            ValueError: the layer does not support these hyper-parameters.
        """
        weight = self.weight_like(self)
        self.check_config(weight, config)
        like = {"device": self.adapter_device(), "dtype": self.lora_A.dtype}
        tensors = {
            n: torch.empty(s, **like) for n, s in self.adapter_shapes(weight, config).items()
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
        sharding.check_gathered(self.weight_like(self), self.lora_A)
        return {n: p.shape for n, p in self.adapter_parameters().items()} == {
            n: t.shape for n, t in adapter.tensors.items()
        }

    @torch.no_grad()
    @with_values
    def activate_adapter(self, adapter: Adapter) -> bool:
        """Give the active adapter these values; return False if its Parameters were replaced.

        If shapes match, the Parameters are written in place and an optimizer that holds them
        stays valid. Their gradients belong to the previous adapter and are dropped.

        Raises:
            ValueError: the layer has no values (meta).
        """
        self._leave_meta()
        self.check_values()
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

    def _leave_meta(self) -> None:
        """Initialise what is still on meta of adapters whose weight was loaded with values."""
        weight = self.weight_like(self)
        if weight.is_meta or self.merged:
            return
        parameters = self.adapter_parameters()
        if any(p.is_meta for p in parameters.values()):
            for name, p in parameters.items():
                tensor = torch.empty_like(p, device=weight.device)
                setattr(self, name, nn.Parameter(tensor, requires_grad=p.requires_grad))
            self.reset_adapter()
            for name, p in parameters.items():
                if not p.is_meta:
                    setattr(self, name, p)
        for adapter in self.inactive_adapters.values():
            if any(t.is_meta for t in adapter.tensors.values()):
                adapter.tensors = self.new_adapter(adapter.config).tensors

    @torch.no_grad()
    def _apply(self, fn, recurse=True):
        original = self._original_weight
        moved = None if original is None else fn(original.data)
        if moved is not None and moved.is_meta:
            raise RuntimeError(
                "expected a device with memory for a PiSSA layer, got meta, where the weight it was"
                " made from would be lost"
            )
        self._leave_meta()
        was_meta = self.lora_A.is_meta
        scaling = self.scaling  # ``.to(bfloat16)`` rounds the buffer; meta and ``to_empty`` lose it
        super()._apply(fn, recurse)
        if original is not None:
            original.data = moved
        if self._base_weight is not None:
            self._base_weight = fn(self._base_weight)
        self._move_inactive(fn)
        if was_meta and not self.lora_A.is_meta:
            self._fill_all()
        self._write_scale(scaling)
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
