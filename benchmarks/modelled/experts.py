"""Adapters on the experts of one layer: bytes that they move, by PEFT and over segments.

Compulsory bytes only, each address once: forward and backward of both matrices of every expert,
``(in, 2·inner)`` and ``(inner, in)``, in bfloat16 with adapters in float32, without dropout. The
frozen products, ``x W`` and ``dY Wᵀ``, are the same for both and are left out; so are sorting, the
activation and the tables of the segments. The launches are those of ``ops/segmented_triton.py`` and
of PEFT 0.21 (``peft/tuners/lora/layer.py``: ``baddbmm`` makes ``W + s·B A``).
"""

from __future__ import annotations

from dataclasses import dataclass

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
# Experts, experts per token, width, inner width: the models' published configs.
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "mixtral-8x7b": (8, 2, 4096, 14_336),
    "deepseek-v3": (256, 8, 7168, 2048),
}
HEAD = (
    f"{'experts':<16}{'tokens':>8}{'frozen GB':>12}{'beyond: PEFT GB':>18}{'segments GB':>13}"
    f"{'ratio':>7}"
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

    def segments(self) -> dict[str, int]:
        """Bytes that the kernels over segments move beyond the frozen products'."""
        A, B = self.E * self.R * self.K, self.E * self.R * self.N
        S, cast = HALF * self.M * self.R, FULL + HALF
        return {
            "cast A": A * cast,
            "shrink S": self.x + A * HALF + S,
            "cast B": B * cast,
            "lora_add y": 2 * self.y + S + B * HALF,
            "cast B again": B * cast,
            "shrink G": self.y + B * HALF + S,
            "rank_grad dB": self.y + S + B * FULL,
            "cast A again": A * cast,
            "rank_grad dA": self.x + S + A * FULL,
            "lora_add dx": 2 * self.x + S + A * HALF,
            "dB in PEFT's order": B * 2 * FULL,  # lora_B has the expert fastest
        }


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
        "segments_bytes": sum(sum(m.segments().values()) for m in both),
    }


def text(found: dict) -> str:
    """One line of the table."""
    frozen, peft, segments = (found[f"{n}_bytes"] / 1e9 for n in ("frozen", "peft", "segments"))
    return (
        f"{found['model']:<16}{found['tokens']:>8}{frozen:>12.2f}{peft:>18.2f}{segments:>13.2f}"
        f"{segments / peft:>7.3f}"
    )
