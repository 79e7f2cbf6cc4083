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
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Proxy

from ..distributed import sharding
from ..ops.modes import outside_graphs, without_autocast
from ..ops.validation import check_dtype, multiplies_itself
from .base import leaf_call
from .config import AdapterConfig
from .expert_calls import call_reason, experts_reason
from .experts import ExpertAdapter, experts_forward, matrices, stacks, unsupported
from .merging import MergeableLayer
from .replacing import check_own_forward
from .wrapping import BASE, WrappingLayer

# Their weights belong to layers that are adapted themselves.
_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


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

    Attributes are those of :class:`fused_lora.FusedLoRALinear`, and ``parameter_name``, with, for
    ``E`` matrices (1 for a Parameter of two dimensions), ``lora_A (E·rank, in)``, the expert
    slowest, and ``lora_B (out, rank·E)``, the expert fastest. ``weight`` is the Parameter.
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
                with a replaced forward.
            ValueError: another number of dimensions, an empty one, or a sharded one.
        """
        kind, weight = type(base.holder).__name__, base.weight
        if isinstance(base.holder, _LAYERS):
            raise TypeError(f"expected a Parameter of no layer, got a {kind}'s: name the layer")
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
        *E, N, K = weight.shape
        return {
            "lora_A": (math.prod(E) * config.rank, K),
            "lora_B": (N, config.rank * math.prod(E)),
        }

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
    def weight_owner(self) -> nn.Module:
        return self.holder

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
        y = _adapted(base, active, kept, args, kwargs) if active or kept else base(*args, **kwargs)
        for layer in layers:
            layer.note_call()
        return y

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
            "expected weights from a checkpoint: experts cannot initialise themselves"
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
        adapter = [
            key for name in self.adapter_parameters() if (key := prefix + name) in state_dict
        ]
        plain = (prefix + self._state_key()[cut:] for cut in self._prefixes())
        weight = any(key in state_dict for key in plain)
        if self.merged and (adapter or weight):
            if self._base_weight is not None:
                self.unmerge()
                self.__dict__["_merges_again"] = True
            elif adapter and weight:
                self._forget_merge()  # the state replaces weight and adapter
            else:
                error_msgs.append(
                    f"expected the whole state of {prefix[:-1] or 'the layer'}, merged with"
                    " keep_base=False, got it only in part"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _prefixes(self) -> range:
        """How much of :meth:`_state_key` an unadapted model's state lacks, at each depth."""
        step = len(BASE) + 1
        return range(0, step * len(self.chain()) + 1, step)

    def _after_loading(self, incompatible_keys) -> None:
        if self.__dict__.pop("_merges_again", False):
            self.merge()

    def extra_repr(self) -> str:
        return f"{self.parameter_name!r}, {super().extra_repr()}"


def _is_turned(holder: nn.Module, weight: Tensor) -> bool:
    """Whether a stack is ``(E, in, out)``: GPT-OSS's, which says so as transformers do."""
    return weight.dim() == 3 and bool(getattr(holder, "is_transposed", False))


def unfused_reason(module: nn.Module, frozen: bool = True) -> str | None:
    """Why a module with adapters runs its own forward; None if it is experts that run fused.

    Args:
        frozen: whether its Parameters must be frozen already.
    """
    return unsupported(module) or experts_reason(module, frozen)


@outside_graphs  # the number of an expert's tokens is data
def _adapted(
    base: nn.Module,
    active: list[LoRAParameter],
    kept: list[LoRAParameter],
    args: tuple,
    kwargs: dict,
):
    """The forward of ``base`` with the adapters of some layers.

    Args:
        active: these layers.
        kept: layers whose base weight is kept aside, and computes.
    """
    for layer in active:
        if sharding.is_shard(layer.weight, layer.lora_A, layer.lora_B):
            raise ValueError(
                "expected whole tensors, got sharded ones: call fully_shard on the outermost layer"
                " around the experts or on a module that contains it, not on a part of it"
            )
        if layer.lora_A.is_meta and not layer.weight.is_meta:
            layer.check_values()
    reason = "a Parameter that is merged and disabled" if kept else unfused_reason(base)
    if reason is None:
        reason = "other arguments" if len(args) != 3 or kwargs else call_reason(base, *args)
    if reason is None:
        return experts_forward(
            base, *args, {x.parameter_name: _adapter(x) for x in active}, impl=active[0].impl
        )
    if dropping := [x.parameter_name for x in active if x.dropout and x.training]:
        raise RuntimeError(
            f"expected dropout=0, got dropout of the adapters of {' and '.join(dropping)}, which"
            f" compute W + s·B A as one matrix ({reason}): set layer.dropout = 0"
        )
    weights = {layer.parameter_name: layer.plain_weight() for layer in kept}
    weights |= {layer.parameter_name: _sum(layer) for layer in active}
    if not kept:
        _tell_once(active[0], base, reason)
    return functional_call(base, weights, args, kwargs)


def _adapter(layer: LoRAParameter) -> ExpertAdapter:
    p = layer.dropout if layer.training else 0.0
    return ExpertAdapter.of(layer.lora_A, layer.lora_B, layer.num_matrices, layer._scale(), p)


def _sum(layer: LoRAParameter) -> Tensor:
    """``W + s·B A`` in the Parameter's shape and dtype, differentiable in the adapter."""
    weight = layer.weight_like(layer)
    A, B = layer.stacked({"lora_A": layer.lora_A, "lora_B": layer.lora_B})
    with without_autocast(weight):
        delta = torch.bmm(B.to(weight.dtype), A.to(weight.dtype)) * layer._scale()
    return layer.from_matrix(weight + delta.to(weight.dtype).view(weight.shape))


def _tell_once(layer: LoRAParameter, base: nn.Module, reason: str) -> None:
    """Warn that experts do not run fused, once per layer; of other modules that is expected."""
    if layer.weight.dim() == 3 and not layer.__dict__.get("_told"):
        layer.__dict__["_told"] = True
        warnings.warn(
            f"fused_lora: the adapters of a {type(base).__name__} compute W + s·B A at every call"
            f" ({reason})",
            stacklevel=2,
        )
