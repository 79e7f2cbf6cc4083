"""LoRA for ``nn.Linear``, as a drop-in, and for transformers' ``Conv1D``, a transposed linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.sharding import is_shard
from ..ops.functional import fused_lora_linear
from ..ops.modes import autocasts
from ..ops.validation import check_dtype, check_same_dtype, check_tensors
from . import dora
from .base import LoRALayer
from .config import AdapterConfig, check_features

_LINEAR_INITS = ("default", "gaussian", "orthogonal", "pissa")


class _LinearForward(LoRALayer):
    """The forward that both classes share: linear in the last dimension of ``x``."""

    inits = _LINEAR_INITS
    has_dora = True

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``.

        Dtypes as in :func:`fused_lora.fused_lora_linear`.

        Raises:
            TypeError, ValueError: as that function, also while merged or disabled; DoRA with a
                sharded weight.
            RuntimeError: disabled while merged with ``keep_base=False``.
        """
        if self.merged or not self.enabled:
            return self._plain_forward(x)
        if self.use_dora:
            return self._dora_forward(x)
        found = self._parameters  # nn.Module.__getattr__ costs ten times a look-up in the dict
        weight, bias = found.get("weight"), found.get("bias")
        lora_A, lora_B = found.get("lora_A"), found.get("lora_B")
        if weight is None or lora_A is None or lora_B is None:  # computed by a parametrization
            weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if bias is None and "bias" not in found:
            bias = self.bias
        if not isinstance(weight, nn.Parameter):
            weight = weight.detach()  # see _matrix
        return fused_lora_linear(
            x,
            self.to_matrix(weight),
            lora_A,
            lora_B,
            bias,
            scaling=self._scale(),
            dropout_p=self.dropout,
            training=self.training,
            impl=self.impl,
        )

    def _matrix(self, weight: Tensor) -> Tensor:
        """A weight as ``(out, in)`` that does not require grad, for the products."""
        # FSDP1's view into its flat parameter requires grad although the weight itself is frozen.
        return self.to_matrix(weight if isinstance(weight, nn.Parameter) else weight.detach())

    def _dora_forward(self, x: Tensor) -> Tensor:
        """The equations of :mod:`.dora`, around the fused product."""
        weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if is_shard(weight):
            raise ValueError(
                "expected a whole weight for DoRA, got a sharded one: its norms need whole rows of"
                " W + s·B A; set use_dora=False under tensor parallelism"
            )
        matrix, bias, scaling = self._matrix(weight), self.bias, self._scale()
        drops = self.dropout > 0 and self.training
        dropped = F.dropout(x, self.dropout) if drops else x
        y = fused_lora_linear(dropped, matrix, lora_A, lora_B, scaling=scaling, impl=self.impl)
        gain = dora.gain(self.lora_magnitude_vector, matrix, lora_A, lora_B, scaling)
        y = y * gain.to(y.dtype)
        if drops:
            # g·D(x) Wᵀ + (x - D(x)) Wᵀ = x Wᵀ + (g - 1)·D(x) Wᵀ, as in .dora
            y = y + F.linear(x - dropped, matrix).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _plain_forward(self, x: Tensor) -> Tensor:
        matrix = self._matrix(self.plain_weight())
        # The same errors as with the adapter, so that merging hides no wrong input.
        check_tensors(x, matrix, self.lora_A, self.lora_B, self.bias, self._scaling)
        if not autocasts(x):
            check_same_dtype(x, matrix)
        return F.linear(x, matrix, self.bias)


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
        scaling: ``s``; may be assigned.
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

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def reset_parameters(self) -> None:
        raise RuntimeError("expected weights from a checkpoint: a Conv1D cannot initialise itself")

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"
