"""An adapter's hyper-parameters, and an adapter that is kept aside."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .validation import check_flag, check_hyperparameters


@dataclass(frozen=True)
class AdapterConfig:
    """The hyper-parameters of one layer's adapter.

    Attributes:
        rank: ``R >= 1``, the inner size of the adapter.
        alpha: ``s = alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        dropout: probability in [0, 1) of dropping an entry of ``x`` on the adapter's way.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        use_dora: a trained magnitude a column of output (Liu et al., 2024); see
            :mod:`fused_lora.dora`.
        init: "default", "gaussian", "orthogonal" or "pissa"; see :mod:`fused_lora.initialization`.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"

    def __post_init__(self):
        check_hyperparameters(self.rank, self.alpha, self.dropout, self.init)
        check_flag("use_rslora", self.use_rslora)
        check_flag("use_dora", self.use_dora)
        object.__setattr__(self, "rank", int(self.rank))  # NumPy's numbers are not JSON's
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scaling(self) -> float:
        """``s``."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass
class Adapter:
    """An adapter aside: its hyper-parameters, its scale, and its tensors by parameter name."""

    config: AdapterConfig
    scaling: float
    tensors: dict[str, Tensor]
