"""A linear layer that computes its own product, with an adapter beside it.

    y = base(x) + s·D(x) Aᵀ Bᵀ

For layers whose product is not ``x Wᵀ + bias`` of a plain weight: quantised ones (bitsandbytes,
for example), other subclasses of ``nn.Linear``, and layers whose ``forward`` was replaced, as
accelerate does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..distributed import sharding
from ..ops.functional import fused_lora_add
from ..ops.validation import check_passes_gradient, multiplies_itself
from .base import leaf_call
from .config import AdapterConfig
from .offload import has_own_hook
from .replacing import is_own_forward
from .wrapping import BASE, WrappingLayer


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer, as its attributes state it; None if they do not.

    A quantised weight may be packed, so its shape says nothing.
    """
    for outward, inward in (("out_features", "in_features"), ("nf", "nx")):  # nf, nx: Conv1D
        sizes = getattr(module, outward, None), getattr(module, inward, None)
        if all(type(size) is int for size in sizes):
            return sizes
    return None


def computes_itself(linear: nn.Module) -> bool:
    """Whether a module of class Linear or Conv1D must run its own forward."""
    if _forward_is_replaced(linear) or linear._parameters.get("weight") is None:
        return True  # without a weight: a hook computes it
    # Only nn.Linear's product is that of a tensor subclass: Conv1D's is with the transposed weight.
    return not isinstance(linear, nn.Linear) and multiplies_itself(linear.weight)


def _forward_is_replaced(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is not None and not is_own_forward(module, forward)


def _device(base: nn.Module) -> torch.device:
    """Where ``base`` computes."""
    tensor = next(chain(base.parameters(), base.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    if device.type == "meta":  # accelerate offloads weights between calls
        hook = getattr(base, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "execution_device", None) is not None:
                return torch.device(part.execution_device)
    return device


def _recomputes(hook) -> str | None:
    """The class of a hook of ``torch.nn.utils`` that computes a weight before each call."""
    kinds = type(hook).__mro__
    if any(kind.__module__.startswith("torch.nn.utils.") for kind in kinds):
        return kinds[0].__name__
    return None


class LoRABeside(WrappingLayer):
    """A frozen linear layer that runs its own forward, plus a trainable low-rank adapter.

    Created by :meth:`from_plain`. The layer itself is the child ``base_layer``, unchanged; see
    :class:`.wrapping.WrappingLayer`.

    Attributes are those of :class:`fused_lora.FusedLoRALinear`. It cannot be merged, and has no
    DoRA and no PiSSA: these need the weight's values.
    """

    inits: ClassVar[tuple[str, ...]] = ("default", "gaussian", "orthogonal")
    runs_base = True

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        return nn.Linear

    @classmethod
    def from_plain(
        cls,
        base: nn.Module,
        config: AdapterConfig,
        impl: str = "torch",
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRABeside:
        """Adapt ``base``, which is frozen and becomes the child ``base_layer``.

        Raises:
            TypeError, ValueError: a layer or an argument that does not fit.
        """
        cls.check_plain(base)
        layer = cls.wrap(base, config, impl, adapter_dtype)
        base.requires_grad_(False)
        layer._exchange_hooks()
        return layer

    @classmethod
    def check_plain(cls, base: nn.Module) -> None:
        """Check that ``base`` states its shape and is whole.

        Raises:
            TypeError: no ``in_features`` and ``out_features``, or a weight that a hook of pruning
                or of the old weight norm computes.
            ValueError: a sharded layer, or one without features.
        """
        kind, shape = type(base).__name__, shape_of(base)
        if shape is None:
            raise TypeError(f"expected a layer with in_features and out_features, got a {kind}")
        if min(shape) < 1:
            raise ValueError(
                f"expected at least one feature, got a {kind} of {shape[1]} to {shape[0]}"
            )
        if computed := next(filter(None, map(_recomputes, base._forward_pre_hooks.values())), None):
            raise TypeError(
                "expected weight to be a Parameter, got one that pruning or weight norm computes (a"
                f" hook, {computed}), which could not be removed from the new layer: make it"
                " permanent first (torch.nn.utils.prune.remove, remove_weight_norm or"
                " remove_spectral_norm), or use torch.nn.utils.parametrizations"
            )
        for parameter in base.parameters():
            sharding.check_whole_weight(parameter, "adapt")

    @classmethod
    def weight_like(cls, module: nn.Module) -> Tensor:
        base = module._modules.get(BASE, module)
        dtypes = {tensor.dtype for tensor in chain(base.parameters(), base.buffers())}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return torch.empty((), dtype=wide, device=_device(base)).expand(shape_of(base))

    def forward(self, *args, **kwargs) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, in the dtype of the base's output.

        All arguments are passed to the base layer; the first one is the adapter's input.

        Raises:
            TypeError, ValueError: an output of another shape than a linear layer's, or a dtype or
                ``impl`` that cannot be used, or an adapter without values (meta).
            RuntimeError: the base layer drops the gradient of its input.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Proxy):
            return leaf_call(self, *args, **kwargs)
        base, y = self._modules[BASE], None
        if self.segment_route is not None:
            y = self.segment_route.output(self, x, len(args) + len(kwargs) > 1)
        if y is None:
            y = self._sum(base, x, args, kwargs) if self.enabled else base(*args, **kwargs)
        self.note_call()
        return y

    def segment_reason(self, names: Sequence[str]) -> str | None:
        """Why no segments of rows can have these adapters; None if they can."""
        base = self._modules[BASE]
        if "forward" in vars(self) or has_own_hook(base):
            return "a hook of accelerate"
        return super().segment_reason(names)

    def plain_base(self) -> None:
        """None: the base computes its own product."""

    def base_output(self, x: Tensor) -> Tensor:
        """The base layer's output."""
        base = self._modules[BASE]
        return self._checked(base, x, base(x), shape_of(base)[0])

    def _sum(self, base: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        lora_A, lora_B = self._parameters.get("lora_A"), self._parameters.get("lora_B")
        if lora_A is None or lora_B is None:  # parametrized, or a replica of DataParallel
            lora_A, lora_B = self.lora_A, self.lora_B
        if lora_A.is_meta and not x.is_meta:
            self.check_values()
        y = self._checked(base, x, base(*args, **kwargs), lora_B.shape[0])
        device = lora_A.device
        added = fused_lora_add(
            # Offloading hooks move x to the base's device and y back.
            y if y.device == device else y.to(device),
            x if x.device == device else x.to(device),
            lora_A,
            lora_B,
            scaling=self._scale(),
            dropout_p=self.dropout,
            training=self.training,
            impl=self.impl,
        )
        return added if y.device == device else added.to(y.device)

    @staticmethod
    def _checked(base: nn.Module, x: Tensor, y: Tensor, out_features: int) -> Tensor:
        expected = (*x.shape[:-1], out_features)
        if not isinstance(y, Tensor) or y.shape != expected:
            is_tensor = isinstance(y, Tensor)
            got = f"shape {tuple(y.shape)}" if is_tensor else f"a {type(y).__name__}"
            raise (ValueError if is_tensor else TypeError)(
                f"expected a Tensor of shape {expected} from the {type(base).__name__} beside an"
                f" adapter, got {got}: leave the layer out with exclude_modules"
            )
        check_passes_gradient(x, y, type(base).__name__)
        return y

    @property
    def base_weight(self) -> Tensor | None:
        """The base layer's weight, in its own format; None if it has another name."""
        return getattr(self._modules[BASE], "weight", None)

    def check_base(self) -> None:
        """The base layer always exists."""

    def check_mergeable(self) -> None:
        """Raise the TypeError that ``merge`` does."""
        base = self._modules[BASE]
        kind = type(base).__name__
        if has_own_hook(base):
            kind += " with a hook of accelerate"
            cure = (
                "unload_lora(model, merge=False), remove the hooks"
                " (accelerate.hooks.remove_hook_from_module(model, recurse=True)), load_adapter and"
                " merge in it"
            )
        elif _forward_is_replaced(base):
            kind += " with a forward of its own"
            cure = "load_adapter and merge in a model without that forward"
        else:
            cure = "load_adapter and merge in a model with plain layers"
            if isinstance(base, nn.Linear) and not multiplies_itself(self.base_weight):
                cure += f" (if a {kind} computes no other product, nn.Linear with its weight)"
        raise TypeError(
            f"expected a plain layer to merge into, got a {kind}, which computes its own product,"
            f" so a merged weight cannot be known to be exact: save_adapter, then {cure}; or keep"
            " the adapter beside it"
        )

    def reset_parameters(self) -> None:
        """Initialise the base layer, if it can, and the adapter."""
        if reset := getattr(self._modules[BASE], "reset_parameters", None):
            reset()
        self._write_scale(self.scaling)
        self.reset_adapter()
