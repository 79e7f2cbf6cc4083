"""Adapters on the experts of one layer: bytes that they move, by PEFT and over segments.

Compulsory bytes only, each address once: forward and backward of both matrices of every expert,
``(in, 2·inner)`` and ``(inner, in)``, in bfloat16 with adapters in float32, without dropout. The
frozen products, ``x W`` and ``dY Wᵀ``, are the same for all and are left out; so are sorting, the
activation and the tables of the segments. The launches over segments are those of
``strategy/schedule.py``, whose bytes ``tests/test_traffic.py`` compares with recorded ones: added
to the vendor's product (*addmm*), or in one launch with it (*split*). PEFT's are counted by hand,
of PEFT 0.21 (``peft/tuners/lora/layer.py``: ``baddbmm`` makes ``W + s·B A``).
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_lora.strategy import schedule
from fused_lora.strategy.devices import KNOWN
from fused_lora.strategy.traffic import Kernel, Product

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
# Experts, experts per token, width, inner width: the models' published configs.
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "mixtral-8x7b": (8, 2, 4096, 14_336),
    "deepseek-v3": (256, 8, 7168, 2048),
}
STRATEGIES = {"segments": "addmm", "segments in lora_gemm": "split"}
HEAD = (
    f"{'':<36}{'beyond: PEFT':>15}{'segments':>12}{'of':>7}{'in lora_gemm':>15}{'of':>7}\n"
    f"{'experts':<16}{'tokens':>8}{'frozen GB':>12}"
    f"{'GB':>15}{'GB':>12}{'PEFT':>7}{'GB':>15}{'PEFT':>7}"
)


@dataclass(frozen=True)
class Matrices:
    """One matrix of every expert.

    Attributes:
        E, K, N, R: experts, in and out features, rank.
        M: rows, one for each expert of each token.
    """

    E: int
    K: int
    N: int
    R: int
    M: int

    @property
    def weights(self) -> int:
        return HALF * self.E * self.K * self.N

    @property
    def x(self) -> int:
        return HALF * self.M * self.K

    @property
    def y(self) -> int:
        return HALF * self.M * self.N

    def frozen(self) -> int:
        """Bytes of the frozen products in both directions."""
        return 2 * (self.weights + self.x + self.y)

    def peft(self) -> dict[str, int]:
        """Bytes that PEFT's launches move beyond these."""
        A, B = self.E * self.R * self.K, self.E * self.R * self.N
        return {
            "cast A, B": (A + B) * (FULL + HALF),
            "baddbmm": 2 * self.weights + (A + B) * HALF,
            "dW": self.x + self.y + self.weights,
            "dA": self.weights + B * HALF + A * HALF,
            "dB": self.weights + A * HALF + B * HALF,
            "scale and cast dA, dB": (A + B) * (2 * HALF + HALF + FULL),
        }

    def segments(self, strategy: str) -> dict[str, int]:
        """Bytes that each launch over segments moves beyond the frozen products'."""
        ahead = Product(self.M, self.K, self.N, self.R, HALF, FULL, segments=self.E, weights=self.E)
        found = {}
        for c in (ahead, schedule.back(ahead)):
            result = "dx" if c.backward else "y"
            for kernel in schedule.direction(KNOWN["h100"], strategy, c):
                name = f"{kernel.name} for {result}"
                found[name] = found.get(name, 0) + _beyond(kernel)
        return found


def _beyond(kernel: Kernel) -> int:
    """Compulsory bytes, without those of a frozen product's own operands."""
    own = ("p", "q", "o") if kernel.gemm else ()
    moved = (*kernel.reads.items(), *kernel.writes.items())
    return sum(size for name, size in moved if name not in own)


def matrices(model: str, tokens: int, rank: int) -> list[Matrices]:
    """Both matrices of a model's experts."""
    E, top, width, inner = MODELS[model]
    M = tokens * top
    return [Matrices(E, width, 2 * inner, rank, M), Matrices(E, inner, width, rank, M)]


def row(model: str, tokens: int, rank: int) -> dict:
    """The bytes of one model's layer."""
    both = matrices(model, tokens, rank)
    return {
        "model": model,
        "tokens": tokens,
        "rank": rank,
        "frozen_bytes": sum(m.frozen() for m in both),
        "peft_bytes": sum(sum(m.peft().values()) for m in both),
        **{
            f"{name}_bytes": sum(sum(m.segments(strategy).values()) for m in both)
            for name, strategy in STRATEGIES.items()
        },
    }


def text(found: dict) -> str:
    """One line of the table."""
    frozen, peft = found["frozen_bytes"], found["peft_bytes"]
    line = f"{found['model']:<16}{found['tokens']:>8}{frozen / 1e9:>12.2f}{peft / 1e9:>15.2f}"
    for name, width in zip(STRATEGIES, (12, 15), strict=True):
        moved = found[f"{name}_bytes"]
        line += f"{moved / 1e9:>{width}.2f}{moved / peft:>7.3f}"
    return line
