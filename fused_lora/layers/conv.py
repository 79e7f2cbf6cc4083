"""``nn.Conv2d`` with a LoRA adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.reference import add_scaled
from ..ops.torch_impl import as_dtype
from .base import LoRALayer
from .config import AdapterConfig


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A frozen ``nn.Conv2d`` with an adapter: ``y = W∗x + bias + s·B∗(A∗D(x))``.

    Computed in plain PyTorch, as in PEFT: ``A`` is a convolution to ``rank`` channels with the
    layer's kernel size, stride, padding and dilation; ``B`` is a 1×1 convolution. In training mode
    ``D`` drops single entries of ``x``, not whole channels. ``x`` is ``(N, C, H, W)`` or
    ``(C, H, W)``, as for ``nn.Conv2d``.

    Created by :meth:`from_conv2d`. Attributes as in :class:`fused_lora.FusedLoRALinear`, with
    ``lora_A (rank, in_channels, kH, kW)`` and ``lora_B (out_channels, rank, 1, 1)``.
    """

    no_kernel = "a convolution's adapter is two convolutions"

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        return nn.Conv2d

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, *, adapter_dtype: torch.dtype | None = None, **hyperparameters
    ) -> LoRAConv2d:
        """Adapt ``conv``; hyper-parameters as in ``FusedLoRALinear.from_linear``.

        Raises:
            TypeError: not exactly an ``nn.Conv2d``.
            ValueError: an argument out of range, ``groups > 1``, or a ``padding_mode`` other than
                "zeros".
        """
        config = AdapterConfig(**hyperparameters)
        return cls.from_plain(conv, config, adapter_dtype=adapter_dtype)

    @classmethod
    def check_plain(cls, base: nn.Module) -> None:
        super().check_plain(base)
        if base.groups != 1:
            raise ValueError(
                f"expected groups=1, got {base.groups}: a grouped weight cannot absorb an adapter"
            )
        if base.padding_mode != "zeros":
            raise ValueError(f"expected padding_mode='zeros', got {base.padding_mode!r}")

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    @classmethod
    def adapter_shapes(cls, weight: Tensor, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        return {
            "lora_A": (config.rank, *weight.shape[1:]),
            "lora_B": (weight.shape[0], config.rank, 1, 1),
        }

    def _compute(self, input: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            return self._conv_forward(input, self.plain_weight(), self.bias)
        weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if weight.shape[0] != lora_B.shape[0] or weight.shape[1:] != lora_A.shape[1:]:
            self.check_fit()
        if lora_A.is_meta and not input.is_meta:
            self.check_values()
        y = self._conv_forward(input, weight, self.bias)
        dropped = F.dropout(input, self.dropout, self.training)
        # A convolution does not mix dtypes: the factors are cast to the input's.
        S = self._conv_forward(dropped, as_dtype(lora_A, input.dtype), None)
        return add_scaled(y, F.conv2d(S, as_dtype(lora_B, S.dtype)), self._scale())
