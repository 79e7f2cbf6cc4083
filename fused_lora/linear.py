"""``nn.Linear`` with a LoRA adapter, as a drop-in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import fused_lora_linear
from .validation import FLOATS, check_adapter_dtype, check_hyperparameters

_ADAPTER_KEYS = ("lora_A", "lora_B")


class FusedLoRALinear(nn.Linear):
    """A frozen ``nn.Linear`` with a trainable low-rank adapter: ``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ``.

    ``weight`` and ``bias`` keep their names and are frozen; a bias set to require grad again gets
    its gradient. ``lora_B`` starts at zero, so a new layer computes what the plain one did.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: ``R >= 1``, the inner size of the adapter.
        alpha: ``s = alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        dropout: probability in [0, 1) of dropping an entry of ``x`` on the adapter's way, in
            training mode.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        impl: see :func:`fused_lora.fused_lora_linear`.
        adapter_dtype: of ``lora_A`` and ``lora_B``; by default float32 on half-precision bases, as
            in PEFT, else the base's.

    Attributes:
        lora_A: ``(rank, in_features)``, Kaiming-uniform with ``a = √5``.
        lora_B: ``(out_features, rank)``, zeros.
        scaling: ``s``; may be assigned.
        enabled: False computes the base layer alone.
        merged: whether ``weight`` contains the adapter at present.

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
        impl: str = "auto",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_hyperparameters(rank, alpha, dropout, impl)
        check_adapter_dtype(adapter_dtype)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(rank, alpha, dropout, use_rslora, impl, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        impl: str = "auto",
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRALinear:
        """Adapt ``linear``: its very Parameters are kept (tying survives) and frozen.

        Raises:
            TypeError: not exactly an ``nn.Linear``, whose forward alone is reproduced.
            ValueError: an argument out of range.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        if linear.weight.dtype not in FLOATS:
            raise TypeError(f"expected a floating-point weight, got {linear.weight.dtype}")
        check_hyperparameters(rank, alpha, dropout, impl)
        check_adapter_dtype(adapter_dtype)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._add_adapter(rank, alpha, dropout, use_rslora, impl, adapter_dtype)
        return layer.train(linear.training)

    def _add_adapter(self, rank, alpha, dropout, use_rslora, impl, adapter_dtype) -> None:
        weight = self.weight
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.impl = impl
        self.enabled = True
        self.merged = False
        where = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty((rank, self.in_features), **where))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, rank), **where))
        scale = torch.empty((), device=weight.device)
        self.register_buffer("_scaling_tensor", scale, persistent=False)
        self.register_buffer("_base_weight", None, persistent=False)
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.reset_adapter()

    @property
    def scaling(self) -> float:
        """``s``, the factor of the adapter's output."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = float(value)
        self._scaling_tensor.fill_(self._scaling)

    def reset_parameters(self) -> None:
        """Initialise the weight, the bias and the adapter (after ``to_empty``, for example)."""
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.scaling = self._scaling
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise ``lora_A`` (Kaiming-uniform, ``a = √5``) and ``lora_B`` (zeros)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if self.merged or not self.enabled:
            return F.linear(x, self._plain_weight(), self.bias)
        # A view of a sharded parameter requires grad although the parameter is frozen.
        weight = self.weight if isinstance(self.weight, nn.Parameter) else self.weight.detach()
        return fused_lora_linear(
            x,
            weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self._scaling_tensor if x.is_cuda else self._scaling,
            dropout_p=self.dropout,
            training=self.training,
            impl=self.impl,
        )

    def _plain_weight(self) -> Tensor:
        if not self.merged or self.enabled:
            return self.weight
        if self._base_weight is None:
            raise RuntimeError(
                "expected a base weight to disable the adapter, got a layer merged with"
                " keep_base=False"
            )
        return self._base_weight

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Add ``s·B A`` to the weight in place, computed in float32 (float64 for float64).

        The base weight is kept aside, on the same device, for ``unmerge``; ``keep_base=False``
        frees it and makes the merge final. A module that shares the weight sees it merged too.

        Raises:
            RuntimeError: already merged.
        """
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got one that is merged already")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.to(wide) @ self.lora_A.to(wide)
        merged = self.weight.to(wide) + delta.mul_(self._scaling)
        self._base_weight = self.weight.detach().clone() if keep_base else None
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: not merged, or merged with ``keep_base=False``.
        """
        if not self.merged:
            raise RuntimeError("expected a merged layer, got one that is not merged")
        if self._base_weight is None:
            raise RuntimeError(
                "expected a base weight to restore, got a layer merged with keep_base=False"
            )
        self.weight.copy_(self._base_weight)
        self._base_weight = None
        self.merged = False

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # ``.to(bfloat16)`` casts floating buffers; the scale stays exact.
        if self._scaling_tensor.dtype != torch.float32:
            self._scaling_tensor = self._scaling_tensor.float()
            self._scaling_tensor.fill_(self._scaling)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight
        else:
            # The adapter is part of the weight for good: saved beside it, it would count twice.
            destination[prefix + "lora_B"] = torch.zeros_like(self.lora_B)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        remerge = self.merged
        if remerge and self._base_weight is None:
            error_msgs.append(
                f"expected {prefix[:-1] or 'the layer'} to be unmerged, got one merged with"
                " keep_base=False: its base weight is gone"
            )
            return
        if remerge:
            self.unmerge()
        first_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        adapter_keys = [prefix + name for name in _ADAPTER_KEYS]
        if all(key in missing_keys[first_missing:] for key in adapter_keys):
            # The state of a plain nn.Linear: the adapter stays as it is.
            for key in adapter_keys:
                missing_keys.remove(key)
        if remerge:
            self.merge()

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"rank={self.rank}", f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.impl != "auto":
            parts.append(f"impl={self.impl!r}")
        parts += [state for state in ("merged",) if self.merged]
        parts += [] if self.enabled else ["disabled"]
        return ", ".join(parts)
