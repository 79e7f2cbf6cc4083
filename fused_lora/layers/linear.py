"""``nn.Linear`` with a LoRA adapter, as a drop-in; and transformers' ``Conv1D``, its transpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.sharding import is_shard
from ..ops.functional import fused_lora_linear
from ..ops.modes import autocasts, is_observed
from ..ops.validation import check_dtype, check_same_dtype, check_tensors
from . import dora
from .base import LoRALayer
from .config import AdapterConfig, check_features

_LINEAR_INITS = ("default", "gaussian", "orthogonal", "pissa")


class _LinearForward(LoRALayer):
    """The forward of a layer that is linear in its last dimension."""

    inits = _LINEAR_INITS
    has_dora = True

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, dtypes as in the functional form.

        Raises:
            TypeError, ValueError: as the functional form, in every state of the adapter.
            RuntimeError: disabled while merged with ``keep_base=False``.
        """
        if self.merged or not self.enabled:
            return self._plain_forward(x)
        if self.use_dora:
            return self._dora_forward(x)
        found = self._parameters  # nn.Module.__getattr__ costs ten times a look at its table
        weight, bias = found.get("weight"), found.get("bias")
        lora_A, lora_B = found.get("lora_A"), found.get("lora_B")
        if weight is None or lora_A is None or lora_B is None:  # computed, as by a parametrization
            weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if bias is None and "bias" not in found:
            bias = self.bias
        if not isinstance(weight, nn.Parameter):
            weight = weight.detach()
        return fused_lora_linear(
            x,
            self.to_matrix(weight),
            lora_A,
            lora_B,
            bias,
            scaling=self._scaling if weight.is_cpu and not is_observed() else self._scale(),
            dropout_p=self.dropout,
            training=self.training,
            impl=self.impl,
        )

    def _matrix(self, weight: Tensor) -> Tensor:
        """A weight as ``(out, in)``, for the products."""
        # A view of a sharded parameter requires grad although the parameter is frozen.
        return self.to_matrix(weight if isinstance(weight, nn.Parameter) else weight.detach())

    def _dora_forward(self, x: Tensor) -> Tensor:
        """The equations of :mod:`.dora`, around the fused product."""
        weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if is_shard(weight):
            raise ValueError(
                "expected a whole weight for DoRA, got a sharded one, where the norm of a row of"
                " W + s·B A would be that of a part: under tensor parallelism use_dora=False"
            )
        matrix, bias, scaling = self._matrix(weight), self.bias, self._scale()
        drops = self.dropout > 0 and self.training
        dropped = F.dropout(x, self.dropout) if drops else x
        y = fused_lora_linear(dropped, matrix, lora_A, lora_B, scaling=scaling, impl=self.impl)
        gain = dora.gain(self.lora_magnitude_vector, matrix, lora_A, lora_B, scaling)
        y = y * gain.to(y.dtype)
        if drops:
            y = y + F.linear(x - dropped, matrix).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _plain_forward(self, x: Tensor) -> Tensor:
        matrix = self._matrix(self.plain_weight())
        check_tensors(x, matrix, self.lora_A, self.lora_B, self.bias, self._scaling)
        if not autocasts(x):
            check_same_dtype(x, matrix)
        return F.linear(x, matrix, self.bias)


class FusedLoRALinear(_LinearForward, nn.Linear):
    """A frozen ``nn.Linear`` with a trainable low-rank adapter: ``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``.

    ``weight`` and ``bias`` keep their names and are frozen; a bias set to require grad again gets
    its gradient. The adapter starts with ``B A = 0``, so a new layer computes what the plain one
    did.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: ``R >= 1``, the inner size of the adapter.
        alpha: ``s = alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        dropout: probability in [0, 1) of dropping an entry of ``x`` on the adapter's way, in
            training mode.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        use_dora: a trained magnitude for every output (:mod:`.dora`).
        init: "default", "gaussian", "orthogonal" or "pissa" (:mod:`.initialization`).
            PiSSA gives the layer a weight of its own, the residual; the one it came from is kept.
        impl: see :func:`fused_lora.fused_lora_linear`.
        adapter_dtype: of ``lora_A`` and ``lora_B``; by default float32 on half-precision bases, as
            in PEFT, else the base's.

    Attributes:
        lora_A: ``(rank, in_features)``.
        lora_B: ``(out_features, rank)``.
        lora_magnitude_vector: ``(out_features,)`` with ``use_dora``, else None.
        scaling: ``s``; may be assigned.
        enabled: False computes the base layer alone.
        merged: whether ``weight`` contains the adapter at present.
        adapter_name: of the active adapter.
        dropout, impl: as given; may be assigned.
        rank, alpha, use_rslora, use_dora, init: as given; the scale follows ``scaling`` alone.

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
        """Adapt ``linear``: its very Parameters are kept (tying survives) and frozen.

        Raises:
            TypeError: not exactly an ``nn.Linear``, whose forward alone is reproduced.
            ValueError: an argument out of range.
        """
        config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
        return cls.from_plain(linear, config, impl, adapter_dtype)


class FusedLoRAConv1D(_LinearForward):
    """GPT-2's ``transformers.pytorch_utils.Conv1D`` with an adapter: its weight is ``(in, out)``.

    Made by :meth:`from_conv1d`. The weight is used as it lies; adapter and attributes are those of
    :class:`FusedLoRALinear`.
    """

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        from transformers.pytorch_utils import Conv1D

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

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def reset_parameters(self) -> None:
        raise RuntimeError("expected weights from a checkpoint: a Conv1D cannot initialise itself")

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"
