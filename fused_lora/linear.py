"""``nn.Linear`` with a LoRA adapter, as a drop-in."""

from __future__ import annotations

import math
import weakref
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .autograd import autocasts
from .functional import fused_lora_linear
from .validation import (
    check_dtype,
    check_features,
    check_hyperparameters,
    check_same_dtype,
    check_tensors,
)

_ADAPTER_KEYS = ("lora_A", "lora_B")
_merged_weights = WeakTensorKeyDictionary()  # Parameter to the layer that merged into it


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
        dropout, impl: as given; may be assigned.
        rank, alpha, use_rslora: as given; the scale follows ``scaling`` alone from then on.

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
        check_features(in_features, out_features)
        check_dtype("dtype", dtype)
        check_hyperparameters(rank, alpha, dropout, impl)
        check_dtype("adapter_dtype", adapter_dtype)
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
        if not isinstance(linear.weight, nn.Parameter):
            raise TypeError(
                "expected weight to be a Parameter, got one that pruning or weight norm computes"
            )
        check_dtype("the weight's dtype", linear.weight.dtype)
        check_hyperparameters(rank, alpha, dropout, impl)
        check_dtype("adapter_dtype", adapter_dtype)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
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
        self.register_buffer("_scaling_tensor", None, persistent=False)
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
        self._renew_scaling_tensor()

    def _renew_scaling_tensor(self) -> None:
        """The scale where kernels read it: exact in fp32, in place as long as the place serves."""
        tensor, device = self._scaling_tensor, self.lora_A.device
        if (
            tensor is None
            or tensor.device != device
            or tensor.dtype != torch.float32
            or tensor.is_inference()
        ):
            with torch.inference_mode(False):
                tensor = torch.empty((), dtype=torch.float32, device=device)
            self._scaling_tensor = tensor
        tensor.fill_(self._scaling)

    def reset_parameters(self) -> None:
        """Initialise the weight, the bias and the adapter (after ``to_empty``, for example)."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self._forget_merge()
            self._renew_scaling_tensor()
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise ``lora_A`` (Kaiming-uniform, ``a = √5``) and ``lora_B`` (zeros)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, dtypes as in the functional form.

        Raises:
            TypeError, ValueError: as the functional form, in every state of the adapter.
            RuntimeError: disabled while merged with ``keep_base=False``.
        """
        # A view of a sharded parameter requires grad although the parameter is frozen.
        weight = self.weight if isinstance(self.weight, nn.Parameter) else self.weight.detach()
        if self.merged or not self.enabled:
            return self._plain_forward(x, weight)
        return fused_lora_linear(
            x,
            weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self._scaling_tensor if self._scaling_tensor.is_cuda else self._scaling,
            dropout_p=self.dropout,
            training=self.training,
            impl=self.impl,
        )

    def _plain_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        check_tensors(x, weight, self.lora_A, self.lora_B, self.bias, self._scaling)
        if not autocasts(x.device.type):
            check_same_dtype(x, weight)
        if self.merged and not self.enabled:
            weight = self._base_weight
            if weight is None:
                raise RuntimeError(
                    "expected a base weight to disable the adapter, got a layer merged with"
                    " keep_base=False"
                )
        return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Add ``s·B A`` to the weight in place, computed in float32 (float64 for float64).

        The base weight is kept aside, on the same device, for ``unmerge``; ``keep_base=False``
        frees it and makes the merge final. Whatever else uses the weight (a tied module, another
        adapter) sees it merged too.

        Raises:
            RuntimeError: already merged, or another layer has merged into the same weight.
            TypeError: the weight is not a Parameter, so that it cannot be written.
        """
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got one that is merged already")
        if not isinstance(self.weight, nn.Parameter):
            raise TypeError("expected weight to be a Parameter, got one computed or sharded")
        other = _merged_weights.get(self.weight)
        if other is not None and other() is not None:
            raise RuntimeError(
                "expected a weight of this layer alone, got one that another layer has merged into:"
                " unmerge that layer first"
            )
        device, wide = (
            self.weight.device.type,
            torch.promote_types(self.weight.dtype, torch.float32),
        )
        with torch.inference_mode(False), torch.no_grad():
            base = self.weight.detach().clone()
        with torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            delta = self.lora_B.to(wide) @ self.lora_A.to(wide)
        self.weight.copy_(delta.mul_(self._scaling).add_(base))
        self._base_weight = base if keep_base else None
        self.merged = True
        _merged_weights[self.weight] = weakref.ref(self)

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
        self._forget_merge()

    def _forget_merge(self) -> None:
        self._base_weight = None
        self.merged = False
        _merged_weights.pop(self.weight, None)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # ``.to(bfloat16)`` casts floating buffers and ``to_empty`` forgets them.
        self._renew_scaling_tensor()
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
        keys = [prefix + name for name in ("weight", *_ADAPTER_KEYS)]
        given = [key in state_dict for key in keys]
        remerge = self.merged and any(given)
        if remerge and self._base_weight is None:
            if not all(given):
                error_msgs.append(
                    f"expected the whole state of {prefix[:-1] or 'the layer'}, merged with"
                    f" keep_base=False, got only part of {', '.join(keys)}"
                )
                return
            self._forget_merge()
            remerge = False
        if remerge:
            self.unmerge()
        first_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if given == [True, False, False]:
            # The state of a plain nn.Linear: the adapter stays as it is.
            added = missing_keys[first_missing:]
            missing_keys[first_missing:] = [key for key in added if key not in keys]
        self._renew_scaling_tensor()
        if remerge:
            if local_metadata.get("assign_to_params_buffers", False):
                # The weight is now the caller's tensor, which merging must not change.
                self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            self.merge()

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"rank={self.rank}", f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.impl != "auto":
            parts.append(f"impl={self.impl!r}")
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        return ", ".join(parts)
