"""An adapter's hyper-parameters, their checks, and the container of an inactive adapter."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from ..ops.validation import check_dropout

_LARGEST_RANK = 2**31 - 1
INITS = ("default", "gaussian", "orthogonal", "pissa")


@dataclass(frozen=True)
class AdapterConfig:
    """The hyper-parameters of one layer's adapter.

    Attributes:
        rank: ``R >= 1``, the inner size of the adapter.
        alpha: ``s = alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        dropout: probability in [0, 1) that an entry of the adapter's input is dropped.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        use_dora: one trained magnitude per output feature (Liu et al., 2024); see
            :mod:`.dora`.
        init: "default", "gaussian", "orthogonal" or "pissa"; see :mod:`.initialization`.

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
        object.__setattr__(self, "rank", int(self.rank))  # JSON cannot hold NumPy scalars
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scaling(self) -> float:
        """``s``, the factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass
class Adapter:
    """An adapter outside the layer's Parameters: its tensors are keyed by parameter name.

    ``scaling`` can differ from ``config.scaling``: a layer's may be assigned.
    """

    config: AdapterConfig
    scaling: float
    tensors: dict[str, Tensor]


def check_hyperparameters(rank: int, alpha: float, dropout: float, init: str) -> None:
    """Check the hyper-parameters of a new adapter.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """
    check_rank(rank)
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(f"expected alpha to be a number, got {alpha!r} ({type(alpha).__name__})")
    if not abs(alpha) <= sys.float_info.max:  # an int may be too large for math.isfinite
        raise ValueError(f"expected a finite alpha, got {alpha}")
    check_dropout(dropout)
    if init not in INITS:
        raise ValueError(f"expected init to be one of {', '.join(INITS)}, got {init!r}")
    # One factor uses the even rows of an orthogonal (rank, rank) matrix, the other the odd ones.
    if init == "orthogonal" and rank % 2:
        raise ValueError(f"expected an even rank for init='orthogonal', got {rank}")
    # PiSSA's factors contain √(Σ/s).
    if init == "pissa" and alpha <= 0:
        raise ValueError(f"expected alpha > 0 for init='pissa', got {alpha}")


def check_rank(rank: int) -> None:
    """Check a rank: an int of at least 1 that a tensor's size can be."""
    if not isinstance(rank, Integral) or isinstance(rank, bool):
        raise TypeError(f"expected rank to be an int, got {rank!r} ({type(rank).__name__})")
    if rank < 1:
        raise ValueError(f"expected rank >= 1, got {rank}")
    if rank > _LARGEST_RANK:
        raise ValueError(f"expected rank <= {_LARGEST_RANK}, got {rank}")


def check_flag(name: str, value: bool) -> None:
    """Check a flag: a bool, since a string such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be True or False, got {value!r}")


def check_scaling(value: float) -> None:
    """Check a scale: a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected scaling to be a number, got {value!r} ({type(value).__name__})")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"expected a finite scaling, got {value}")


def check_features(in_features: int, out_features: int) -> None:
    """Check a linear layer's sizes: ints of at least 0, as ``nn.Linear`` allows."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"expected {name} to be an int, got {size!r} ({type(size).__name__})")
        if size < 0:
            raise ValueError(f"expected {name} >= 0, got {size}")
