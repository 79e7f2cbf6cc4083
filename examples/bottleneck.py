"""Bottleneck adapters (Houlsby et al., 2019, https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

BOTTLENECK = 32


class Bottleneck(nn.Module):
    """``x + up(gelu(down(x)))``, initially close to the identity.

    It has 2md + d + m parameters for width d and bottleneck size m.
    """

    def __init__(self, width: int, size: int = BOTTLENECK):
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=1e-2, a=-2e-2, b=2e-2)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def insert_bottlenecks(layers: Iterable[nn.Module], size: int = BOTTLENECK) -> None:
    """Insert two into each BERT layer, as the paper does: after attention and after the MLP."""
    for layer in layers:
        for part in (layer.attention.output, layer.output):
            width, weight = part.dense.out_features, part.dense.weight
            adapter = Bottleneck(width, size).to(weight.device, weight.dtype)
            part.dense = nn.Sequential(part.dense, adapter)
