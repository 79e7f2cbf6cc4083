"""The shapes that are measured, from real models, and the lists over which means are computed.

A mean over shapes chosen after the measurement proves nothing. The lists are therefore fixed here,
and a result that lacks one of a list's shapes has no mean over that list.
"""

from __future__ import annotations

from typing import NamedTuple

from fused_lora import tune


class Shape(NamedTuple):
    """A layer's ``M`` tokens, ``K`` inputs and ``N`` outputs, and the rank ``R`` of its adapter."""

    M: int
    K: int
    N: int
    R: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N} r{self.R}"

    @property
    def forward_flops(self) -> int:
        """FLOPs of the adapted layer's three products in forward."""
        return 2 * self.M * (self.K * self.N + (self.K + self.N) * self.R)

    @property
    def step_flops(self) -> int:
        """FLOPs of its eight products in forward and backward."""
        return 2 * self.M * (2 * self.K * self.N + 3 * (self.K + self.N) * self.R)

    @property
    def forward_elements(self) -> int:
        """Elements that a forward reads or writes at least once: x, W, A, B and y."""
        M, K, N, R = self
        return M * K + K * N + R * (K + N) + M * N

    @property
    def step_elements(self) -> int:
        """The same for forward and backward; backward adds dy, W, x, A, B and dx, dA, dB."""
        M, K, N, R = self
        return self.forward_elements + M * N + K * N + 2 * M * K + 2 * R * (K + N)


def _decoder(layers: tuple[tuple[int, int], ...]) -> dict[str, tuple[int, int]]:
    """``(K, N)`` of the projections of a Llama-like block."""
    return dict(zip(("q, o", "k, v", "gate, up", "down"), layers, strict=True))


# From the models' published configurations.
MODELS = {
    "gpt2": {
        "qkv": (768, 2304),
        "out": (768, 768),
        "up": (768, 3072),
        "down": (3072, 768),
    },
    "smollm2-135m": _decoder(((576, 576), (576, 192), (576, 1536), (1536, 576))),
    **{name: _decoder(layers) for name, layers in tune.MODELS.items()},
}


def of_model(name: str, M: int, R: int = 16) -> list[Shape]:
    """The shape of every projection of a model in :data:`MODELS`."""
    return [Shape(M, K, N, R) for K, N in MODELS[name].values()]


CPU_QUICK = (
    Shape(512, 576, 576, 8),
    Shape(512, 768, 768, 8),
    Shape(1024, 768, 3072, 16),
    Shape(512, 2048, 2048, 16),
)
CPU_TARGETS = (
    *CPU_QUICK,
    Shape(512, 576, 1536, 8),
    Shape(1024, 3072, 768, 16),
    Shape(960, 4096, 4096, 64),
)
CPU_FULL = (
    *CPU_TARGETS,
    *(Shape(M, 768, 768, 8) for M in (1, 16, 128)),
    *(Shape(512, 768, 768, R) for R in (4, 64, 256)),
    Shape(512, 2048, 512, 16),
    Shape(512, 2048, 8192, 16),
    Shape(500, 1000, 1000, 10),
    Shape(32768, 576, 576, 8),
)

GPU_QUICK = (
    Shape(1, 4096, 4096, 16),
    Shape(512, 2048, 2048, 16),
    Shape(4096, 4096, 4096, 16),
    Shape(8192, 4096, 4096, 16),
)
GPU_TARGETS = (
    *GPU_QUICK,
    Shape(2048, 768, 3072, 8),
    Shape(8192, 4096, 1024, 16),
    Shape(8192, 4096, 14336, 16),
    Shape(8192, 14336, 4096, 16),
    Shape(8192, 5120, 5120, 16),
    Shape(8192, 8192, 8192, 16),
)
GPU_FULL = (
    *GPU_TARGETS,
    *(Shape(M, 4096, 4096, 16) for M in (16, 64, 512, 32768)),
    *(Shape(8192, 4096, 4096, R) for R in (4, 64, 128, 256)),
    *of_model("gpt2", 8192, 8),
    *of_model("llama3.2-1b", 8192),
    *of_model("qwen2.5-7b", 8192),
    *of_model("qwen2.5-32b", 4096),
    *of_model("llama3-70b", 4096),
)

# Each mean's name and the shapes that it covers.
MEANS = {
    "cpu-quick": CPU_QUICK,
    "cpu-targets": CPU_TARGETS,
    "gpu-quick": GPU_QUICK,
    "gpu-targets": GPU_TARGETS,
}

# The shapes that the README shows.
HEADLINE = (
    Shape(512, 768, 768, 8),
    Shape(1024, 768, 3072, 16),
    Shape(512, 2048, 2048, 16),
    Shape(960, 4096, 4096, 64),
)


# In a dtype that the CPU emulates, a set includes shapes of at most so many multiply-adds, M·K·N.
# The largest step is then 512x576x576, about 0.2 s for every provider but this library's, and in a
# full set 512x768x768, 0.6 s.
EMULATED_QUICK, EMULATED_FULL = 1 << 28, 3 << 27


def is_for_emulation(shape: Shape, full: bool) -> bool:
    """Whether a set includes ``shape`` in a dtype that the CPU has no instructions for."""
    most = EMULATED_FULL if full else EMULATED_QUICK
    return most >= shape.M * shape.K * shape.N


def default_set(device: str, full: bool) -> tuple[Shape, ...]:
    """The shapes of ``--quick`` or ``--full``; an MPS device uses the CPU's."""
    if device == "cuda":
        return GPU_FULL if full else GPU_QUICK
    return CPU_FULL if full else CPU_QUICK
