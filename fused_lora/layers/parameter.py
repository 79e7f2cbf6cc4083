"""The adapter of a Parameter that belongs to no linear layer, such as the experts of a mixture.

    W_e + s·B_e A_e          for each expert e of a stack (E, out, in), or one matrix (out, in)

In transformers' experts no such sum is computed: :func:`.experts.experts_forward` runs instead of
the module's forward. Elsewhere (routers, experts of other kinds) the module's own forward runs with
the sum in the Parameter's place, as in PEFT.

A layer adapts one Parameter. Layers of several Parameters of one module are nested, the last
Parameter outermost, so that names and files are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..distributed import sharding
from ..ops.modes import without_autocast
from ..ops.validation import check_dtype, multiplies_itself
from .adapter import ADAPTER_NAMES
from .base import leaf_call
from .config import AdapterConfig
from .experts import matrices, stacks
from .merging import MergeableLayer
from .offload import offload_hook
from .parameter_forward import check_active, of_experts, summed
from .replacing import check_own_forward
from .wrapping import BASE, WrappingLayer

# Their weights belong to layers that are adapted themselves, or are read by another module's code.
_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_OPERATORS = ("__getitem__", "__len__", "__iter__")  # which Python looks up in the class


@dataclass(frozen=True, eq=False)
class ParameterTarget:
    """A Parameter to adapt.

    Attributes:
        module: the module that holds it, or the layer of another Parameter around that.
        name: its name in the module.
    """

    module: nn.Module
    name: str

    @property
    def holder(self) -> nn.Module:
        """The module that holds the Parameter."""
        return self.module.holder if isinstance(self.module, LoRAParameter) else self.module

    @property
    def parameter_name(self) -> str:
        return self.name

    @property
    def weight(self) -> Tensor | None:
        return self.holder._parameters.get(self.name)


class LoRAParameter(WrappingLayer):
    """A module one of whose Parameters has an adapter; in full, see :mod:`.parameter`.

    Created by :meth:`from_plain`. Calls take and return what the module's own forward does.

    It has the attributes of :class:`fused_lora.FusedLoRALinear`, and ``parameter_name``. With ``E``
    matrices (1 for a Parameter of two dimensions), ``lora_A`` is ``(E·rank, in)``, the expert
    slowest, and ``lora_B`` ``(out, rank·E)``, the expert fastest. ``weight`` is the Parameter.
    Other attributes are the module's; of a name that both have, such as ``alpha``, the layer's.
    """

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian")

    parameter_name: str

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        return nn.Parameter

    @classmethod
    def from_plain(
        cls,
        base: ParameterTarget,
        config: AdapterConfig,
        impl: str = "torch",
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAParameter:
        """Adapt a Parameter: its module is frozen and becomes the innermost ``base_layer``.

        Raises:
            TypeError, ValueError: a Parameter or an argument that does not fit.
        """
        cls.check_plain(base)
        base.holder.requires_grad_(False)
        layer = cls.wrap(base.module, config, impl, adapter_dtype, parameter_name=base.name)
        layer.register_load_state_dict_post_hook(LoRAParameter._after_loading)
        layer.register_state_dict_post_hook(LoRAParameter._after_saving)
        layer._exchange_hooks()
        return layer

    @classmethod
    def check_plain(cls, base: ParameterTarget) -> None:
        """Check that a Parameter is a matrix or a stack of matrices that no layer adapts.

        Raises:
            TypeError: a linear layer's weight, a tensor that is no float Parameter, or a module
                that has no forward of its own, is indexed, or has names that the layer needs.
            ValueError: another number of dimensions, an empty one, or a sharded one.
        """
        kind, weight = type(base.holder).__name__, base.weight
        if isinstance(base.holder, _LAYERS):
            raise TypeError(
                f"expected a Parameter of no layer, got one of a {kind}: name the layer"
            )
        indexed = [name for name in _OPERATORS if hasattr(type(base.holder), name)]
        if indexed or type(base.holder).forward is nn.Module.forward:
            what = f"whose {indexed[0]}" if indexed else "which has no forward: its readers"
            raise TypeError(
                f"expected a module that is only called, got a {kind}, {what} would bypass the"
                " adapter"
            )
        names = set(ADAPTER_NAMES) if base.name == "weight" else {*ADAPTER_NAMES, "weight"}
        if taken := sorted(name for name in names if hasattr(base.holder, name)):
            raise TypeError(
                f"expected a module without attributes of an adapted layer, got a {kind} with"
                f" {', '.join(taken)} beside {base.name}"
            )
        if weight is None or multiplies_itself(weight):
            raise TypeError(f"expected {base.name} to be a plain Parameter, got one that is not")
        sharding.check_whole_weight(weight, "adapt")
        if weight.dim() not in (2, 3) or not weight.numel():
            raise ValueError(
                "expected a Parameter (out, in) or (experts, out, in), got one of shape"
                f" {tuple(weight.shape)}"
            )
        check_dtype(f"the dtype of {base.name}", weight.dtype)
        check_own_forward(base.holder)

    @classmethod
    def weight_like(cls, module: LoRAParameter | ParameterTarget) -> Tensor:
        """``(E, out, in)``, or ``(out, in)`` of a single matrix."""
        weight = module.weight
        return weight.mT if _is_turned(module.holder, weight) else weight

    @classmethod
    def matrix_shape(cls, weight: Tensor) -> tuple[int, int]:
        return tuple(weight.shape[-2:])

    @classmethod
    def adapter_shapes(cls, weight: Tensor, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        *stack, N, K = weight.shape
        ranks = math.prod(stack) * config.rank
        return {"lora_A": (ranks, K), "lora_B": (N, ranks)}

    def stacked(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An adapter's matrices of all experts: ``(E, rank, in)`` and ``(E, out, rank)``."""
        return stacks(tensors["lora_A"], tensors["lora_B"], self.num_matrices)

    def unstacked(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`stacked`."""
        return dict(zip(("lora_A", "lora_B"), matrices(A, B), strict=True))

    @property
    def num_matrices(self) -> int:
        """``E``."""
        return math.prod(self.weight.shape[:-2])

    @property
    def holder(self) -> nn.Module:
        """The module that holds the Parameter."""
        return self.chain()[-1]._modules[BASE]

    @property
    def weight(self) -> nn.Parameter:
        """The Parameter, of its module."""
        return getattr(self.holder, self.parameter_name)

    @property
    def weight_owner(self) -> tuple[nn.Module, str]:
        return self.holder, self.parameter_name

    def chain(self) -> list[LoRAParameter]:
        """The layers of the module's Parameters from this one inward."""
        found = [self]
        while isinstance(inner := found[-1]._modules[BASE], LoRAParameter):
            found.append(inner)
        return found

    def __setattr__(self, name: str, value) -> None:
        if name == "weight":
            setattr(self.holder, self.parameter_name, value)
        else:
            super().__setattr__(name, value)

    def _fill(self, init: str, lora_A: Tensor, lora_B: Tensor) -> None:
        super()._fill(init, lora_A, lora_B)
        if init == "gaussian":  # by the rank of one expert
            nn.init.normal_(lora_A, std=self.num_matrices / len(lora_A))

    def forward(self, *args, **kwargs):
        """The module's forward, with the adapters of all its Parameters.

        Raises:
            RuntimeError: dropout where the sum ``W + s·B A`` must be computed, or a merged layer
                that is disabled and has lost its base weight.
            ValueError: sharded on its own, or an adapter without values (meta).
        """
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return leaf_call(self, *args, **kwargs)
        layers = self.chain()
        base = layers[-1]._modules[BASE]
        active = [layer for layer in layers if layer.enabled and not layer.merged]
        kept = [layer for layer in layers if layer.merged and not layer.enabled]
        if not active and not kept:
            y = base(*args, **kwargs)
        elif any(layer.weight.dim() == 3 for layer in layers):
            y = of_experts(base, active, kept, args, kwargs)
        else:
            check_active(active)
            y = summed(base, active, kept, "no experts", args, kwargs)
        for layer in layers:
            layer.note_call()
        return y

    def segment_reason(self, names: Sequence[str]) -> str | None:
        """Why no segments of rows can have these adapters."""
        return "an adapter on a Parameter"

    def check_values(self) -> None:
        """Check that the Parameter and the active adapter have values.

        Raises:
            ValueError: they are on the meta device, or accelerate offloads the module.
        """
        if self.weight.is_meta and offload_hook(self.holder) is not None:
            raise ValueError(
                f"expected {self.parameter_name} with values, got one that accelerate offloads:"
                " an adapted Parameter cannot be offloaded, remove the hooks"
                " (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        if self.weight.is_meta or self.lora_A.is_meta:
            raise ValueError(f"expected tensors with values, got {self._without_values()}")

    def check_forward(self) -> None:
        """Raise the TypeError that ``plain`` would."""
        check_own_forward(self)

    @property
    def base_weight(self) -> Tensor | None:
        """The Parameter without the adapter; None if it is lost."""
        return self._base_weight if self.merged else self.weight

    def _adapted_matrix(self) -> Tensor:
        """``W + s·B A`` as :meth:`weight_like` has it; at least float32."""
        weight = self.weight_like(self)
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = self.stacked({"lora_A": self.lora_A.to(wide), "lora_B": self.lora_B.to(wide)})
        with without_autocast(weight):
            sums = torch.baddbmm(
                weight.to(wide).view(-1, *weight.shape[-2:]), B, A, alpha=self.scaling
            )
        return sums.view(weight.shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if _is_turned(self.holder, self.weight) else matrix

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise the ValueError that ``merge`` would."""
        self._check_finite(self._adapted_matrix())

    def plain(self) -> nn.Module:
        """The module with the Parameter without an adapter, or merged; see :class:`LoRALayer`."""
        self.check_forward()
        if self.merged:
            self.disown_weight()
        return super().plain()

    def reset_parameters(self) -> None:
        raise RuntimeError(
            "expected weights from a checkpoint: a module cannot initialise one of its Parameters"
        )

    def _state_key(self) -> str:
        """The Parameter's key in ``state_dict``, from this layer on.

        The module saves and loads it, after this layer.
        """
        return f"{BASE}." * len(self.chain()) + self.parameter_name

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        kept = self.merged and self._base_weight is not None
        # Of a merged layer MergeableLayer would save the weight beside the adapter.
        of = super(MergeableLayer, self) if kept else super()
        of._save_to_state_dict(destination, prefix, keep_vars)

    def _after_saving(self, destination, prefix, local_metadata) -> None:
        if self.merged and self._base_weight is not None:
            destination[prefix + self._state_key()] = self._base_weight

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        keys = {name: prefix + name for name in self.adapter_parameters()}
        plain = (prefix + self._state_key()[cut:] for cut in self._prefixes())
        keys["weight"] = next((key for key in plain if key in state_dict), "")
        state = {name: state_dict[key].shape for name, key in keys.items() if key in state_dict}
        if self.merged and state:
            assigns = local_metadata.get("assign_to_params_buffers", False)
            problem = self._leave_merge(state, assigns, prefix[:-1] or "the layer", error_msgs)
            if problem is not None:
                error_msgs.append(problem)
                state_dict.pop(keys["weight"], None)  # which the module would load
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _leave_merge(
        self, state: dict[str, torch.Size], assigns: bool, where: str, errors: list[str]
    ) -> str | None:
        """Unmerge to load a state of these shapes; returns why it cannot be loaded, or None."""
        if self._base_weight is None:
            own = {
                name: getattr(self, name).shape for name in ("weight", *self.adapter_parameters())
            }
            if state != own:
                return (
                    f"expected the whole state of {where}, merged with keep_base=False, got it only"
                    " in part or in other shapes"
                )
            self._forget_merge()  # the state replaces weight and adapter
            return None
        try:
            self.unmerge()
        except (RuntimeError, TypeError) as error:
            return f"{where}: {error}"
        self.__dict__["_merges_again"] = where, assigns, errors
        return None

    def _prefixes(self) -> range:
        """How much of :meth:`_state_key` an unadapted model's state lacks, at each depth."""
        step = len(BASE) + 1
        return range(0, step * len(self.chain()) + 1, step)

    def _after_loading(self, incompatible_keys) -> None:
        where, assigns, errors = self.__dict__.pop("_merges_again", (None, False, None))
        if errors is None:
            return
        if assigns:  # the Parameter is now the caller's tensor, which merging must not change
            self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        try:
            self.merge()
        except ValueError as error:  # the loaded values overflow
            errors.append(f"{where}, now unmerged: {error}")

    def extra_repr(self) -> str:
        return f"{self.parameter_name!r}, {super().extra_repr()}"


def _is_turned(holder: nn.Module, weight: Tensor) -> bool:
    """Whether a stack is ``(E, in, out)``: GPT-OSS's, whose modules set ``is_transposed``."""
    return weight.dim() == 3 and bool(getattr(holder, "is_transposed", False))
