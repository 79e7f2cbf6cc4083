"""LoRA for ``nn.Linear``, as a drop-in, and for transformers' ``Conv1D``, a transposed linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..distributed.sharding import is_flat_view, is_shard
from ..ops.functional import fused_lora_add, fused_lora_linear, linear
from ..ops.modes import autocasts, is_differentiated, is_dynamo_compiling, is_observed
from ..ops.operands import Projection
from ..ops.validation import (
    OF_SEGMENTS,
    check_dtype,
    check_same_dtype,
    check_tensors,
    multiplies_itself,
)
from . import dora
from .base import LoRALayer, leaf_call
from .config import AdapterConfig, check_features
from .scale import current_scale

_LINEAR_INITS = ("default", "gaussian", "orthogonal", "pissa")


class _LinearForward(LoRALayer):
    """The forward that both classes share: linear in the last dimension of ``x``."""

    inits = _LINEAR_INITS
    has_dora = True
    is_transposed: ClassVar[bool] = False  # a call of to_matrix costs host time

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``.

        Dtypes as in :func:`fused_lora.fused_lora_linear`. Differentiable also in a weight that is
        computed, by ``torch.func.functional_call`` or a parametrization: PyTorch then computes
        the base product.

        Raises:
            TypeError, ValueError: as that function, also while merged or disabled; DoRA with a
                sharded weight.
            RuntimeError: disabled while merged with ``keep_base=False``.
        """
        observed = is_observed()  # once: each check costs host time
        if observed and is_dynamo_compiling():
            self.note_traced_call()
        elif not self.has_run:
            self.has_run = True
        if self.segment_route is not None:
            y = self.segment_route.output(self, input)
            if y is not None:
                return y
        if self.merged or not self.enabled:
            return self._plain_forward(input)
        if self.use_dora:
            return self._dora_forward(input)
        if self.shared_input is not None:
            y = self.shared_input.output(self, input)
            if y is not None:
                return y
        found = self._parameters  # nn.Module.__getattr__ costs ten times a look-up in the dict
        weight, bias = found.get("weight"), found.get("bias")
        lora_A, lora_B = found.get("lora_A"), found.get("lora_B")
        if weight is None or lora_A is None or lora_B is None:  # computed by a parametrization
            weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if bias is None and "bias" not in found:
            bias = self.bias
        if not isinstance(weight, nn.Parameter):
            return self._product(input, weight, lora_A, lora_B, bias, self.dropout)
        try:
            return linear(
                input,
                self.to_matrix(weight) if self.is_transposed else weight,
                lora_A,
                lora_B,
                bias,
                current_scale(self, observed),  # a method's look-up costs host time
                self.dropout,
                self.training,
                self.impl,
                observed,
            )
        except TypeError:
            if isinstance(input, Proxy):  # here, because a check before the call costs host time
                return leaf_call(self, input)
            raise

    def lora_projection(self) -> Projection | str:
        """The layer's operands as they are now, or why no other layer can compute with them."""
        if self.merged or not self.enabled:
            return "merged" if self.merged else "disabled"
        if self.segment_route is not None and self.segment_route.is_open(self):
            return "adapter_segments"
        if self.use_dora:
            return "DoRA"
        cls, p = type(self), self.dropout
        if cls.forward not in _FORWARDS or cls.__call__ is not nn.Module.__call__:
            return "a forward of its own"
        if type(p) is not float or not 0.0 <= p < 1.0:
            return "a dropout that is no float in [0, 1)"  # its forward checks it
        found = self._parameters
        weight, lora_A, lora_B = (found.get(name) for name in ("weight", "lora_A", "lora_B"))
        if weight is None or lora_A is None or lora_B is None or "bias" not in found:
            return "a computed weight"
        return Projection(
            self.to_matrix(weight) if self.is_transposed else weight,
            lora_A,
            lora_B,
            found["bias"],
            current_scale(self, False),
            p if self.training else 0.0,
        )

    def segment_reason(self, names: Sequence[str]) -> str | None:
        """Why no segments of rows can have these adapters; None if they can."""
        if reason := super().segment_reason(names):
            return reason
        if type(self).forward not in _FORWARDS:
            return "a forward of its own"
        weight = self._parameters.get("weight")
        if weight is None or "bias" not in self._parameters:
            return "a computed weight"
        if multiplies_itself(weight):
            return f"a weight of class {type(weight).__name__}: quantise before apply_lora"
        if self.impl.startswith("triton:") and self.impl not in OF_SEGMENTS:
            able = " or ".join(map(repr, OF_SEGMENTS))
            return f"impl={self.impl!r}, which does not support segments: use {able}"
        return "a replaced forward (such as accelerate's)" if "forward" in vars(self) else None

    def plain_base(self) -> tuple[Tensor, Tensor | None]:
        """The weight as ``(out, in)``, and the bias."""
        return self.to_matrix(self._parameters["weight"]), self._parameters["bias"]

    def base_output(self, x: Tensor) -> Tensor:
        """The output without an adapter."""
        return self._plain_forward(x)

    def _product(self, x, weight, lora_A, lora_B, bias, dropout_p: float) -> Tensor:
        """``x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``, differentiable also in a weight that is computed."""
        if isinstance(x, Proxy):
            return leaf_call(self, x)
        matrix, constant = self._matrices(weight)
        options = {
            "scaling": self._scale(),
            "dropout_p": dropout_p,
            "training": self.training,
            "impl": self.impl,
        }
        if matrix is constant:
            return fused_lora_linear(x, constant, lora_A, lora_B, bias, **options)
        _check(x, constant, lora_A, lora_B, bias)
        return fused_lora_add(F.linear(x, matrix, bias), x, lora_A, lora_B, **options)

    def _matrices(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight as ``(out, in)``, for a product that autograd records and one that ignores it.

        They are one tensor unless the weight is computed from tensors that are differentiated. A
        Parameter that requires grad stays as it is, which the checks refuse.
        """
        constant = self.to_matrix(weight if isinstance(weight, nn.Parameter) else weight.detach())
        if (
            isinstance(weight, nn.Parameter)
            or not is_differentiated(weight)
            or is_flat_view(self, weight)
        ):
            return constant, constant
        return self.to_matrix(weight), constant

    def _dora_forward(self, x: Tensor) -> Tensor:
        """The equations of :mod:`.dora`, around the fused product."""
        if isinstance(x, Proxy):
            return leaf_call(self, x)
        weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if is_shard(weight):
            raise ValueError(
                "expected a whole weight for DoRA, got a sharded one: its norms need whole rows of"
                " W + s·B A; set use_dora=False under tensor parallelism"
            )
        if multiplies_itself(weight):  # quantised after adapting
            self.check_config(weight, self.adapter_config)
        (matrix, constant), bias = self._matrices(weight), self.bias
        drops = self.dropout > 0 and self.training
        dropped = F.dropout(x, self.dropout) if drops else x
        y = self._product(dropped, weight, lora_A, lora_B, None, 0.0)
        magnitude = self.lora_magnitude_vector
        gain = dora.gain(magnitude, constant, lora_A, lora_B, self._scale())
        y = y * gain.to(y.dtype)
        if drops:
            # g·D(x) Wᵀ + (x - D(x)) Wᵀ = x Wᵀ + (g - 1)·D(x) Wᵀ, as in .dora
            y = y + F.linear(x - dropped, matrix).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _plain_forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf_call(self, x)
        (matrix, constant), bias = self._matrices(self.plain_weight()), self.bias
        # The same errors as with the adapter, so that merging hides no wrong input.
        _check(x, constant, self.lora_A, self.lora_B, bias)
        return F.linear(x, matrix, bias)


def _check(x, matrix, lora_A, lora_B, bias) -> None:
    """The errors of :func:`.fused_lora_linear`, for a product that PyTorch computes."""
    check_tensors(x, matrix, lora_A, lora_B, bias, 1.0)
    if not autocasts(x):
        check_same_dtype(x, matrix)


class FusedLoRALinear(_LinearForward, nn.Linear):
    """A frozen ``nn.Linear`` with a trainable low-rank adapter: ``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``.

    ``weight`` and ``bias`` keep their names and are frozen; a bias set to require grad again gets
    its gradient. The adapter starts with ``B A = 0``, so a new layer computes what the plain one
    did. PiSSA splits the weight instead, which keeps the output up to rounding.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: ``R >= 1``, the inner size of the adapter.
        alpha: ``s = alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        dropout: probability in [0, 1) that an entry of the adapter's input is dropped in training
            mode; the base product always sees all of ``x``.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        use_dora: one trained magnitude per output feature (:mod:`.dora`).
        init: "default", "gaussian", "orthogonal" or "pissa" (:mod:`.initialization`).
            PiSSA gives the layer a new weight, the residual, and keeps the original aside.
        impl: see :func:`fused_lora.fused_lora_linear`.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``. Default: float32 for a half-precision
            base, as in PEFT, else the base's dtype.

    Attributes:
        lora_A: ``(rank, in_features)``.
        lora_B: ``(out_features, rank)``.
        lora_magnitude_vector: ``(out_features,)`` with ``use_dora``, else None.
        scaling: ``s``; may be assigned. Like ``rank`` and ``dropout`` it is not in ``state_dict``,
            which holds weight, bias and the ``lora_*`` tensors: :func:`fused_lora.save_adapter`
            saves it.
        enabled: if False, forward computes the base layer alone.
        merged: whether ``weight`` currently contains the adapter.
        adapter_name: name of the active adapter.
        dropout, impl: as given; may be assigned.
        rank, alpha, use_rslora, use_dora, init: as given. Forward uses ``scaling``: to change the
            scale, assign that, not ``alpha``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "default",
        impl: str = "auto",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_features(in_features, out_features)
        check_dtype("dtype", dtype)
        config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(config, impl, adapter_dtype)

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        return nn.Linear

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "default",
        impl: str = "auto",
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRALinear:
        """Adapt ``linear``, keeping the same Parameter objects (so ties survive), now frozen.

        Raises:
            TypeError: not exactly an ``nn.Linear`` (a subclass may have another forward), a forward
                replaced on the instance, or an argument of the wrong type.
            ValueError: an argument out of range, or a sharded weight.
        """
        config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
        return cls.from_plain(linear, config, impl, adapter_dtype)


class FusedLoRAConv1D(_LinearForward):
    """GPT-2's ``transformers.pytorch_utils.Conv1D`` with an adapter: its weight is ``(in, out)``.

    Created by :meth:`from_conv1d`. The weight is used through a transposed view, without a copy;
    adapter and attributes are those of :class:`FusedLoRALinear`.
    """

    is_transposed = True

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        from transformers.pytorch_utils import Conv1D  # an optional dependency

        return Conv1D

    @classmethod
    def from_conv1d(
        cls,
        conv1d: nn.Module,
        *,
        impl: str = "auto",
        adapter_dtype: torch.dtype | None = None,
        **hyperparameters,
    ) -> FusedLoRAConv1D:
        """Adapt ``conv1d``; hyper-parameters and errors as :meth:`FusedLoRALinear.from_linear`."""
        return cls.from_plain(conv1d, AdapterConfig(**hyperparameters), impl, adapter_dtype)

    def forward(self, x: Tensor) -> Tensor:  # the argument's name is the plain class's
        """``(..., nx)`` to ``(..., nf)``; dtypes and errors as :meth:`FusedLoRALinear.forward`."""
        return super().forward(x)

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def reset_parameters(self) -> None:
        raise RuntimeError("expected weights from a checkpoint: a Conv1D cannot initialise itself")

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"


_FORWARDS = (FusedLoRALinear.forward, FusedLoRAConv1D.forward)  # what lora_projection describes
