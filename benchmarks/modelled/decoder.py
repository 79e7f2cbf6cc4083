"""The layers of a decoder, as separate layers and together, as in ``strategy/decoder.py``.

One decoder layer of a Llama-like model: q, k, v and o of the attention, and the gated MLP. The
attention itself, norms and residuals are left out, since they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fused_lora.strategy import cost, decoder, schedule
from fused_lora.strategy.devices import Device
from fused_lora.strategy.traffic import Kernel, Product
from fused_lora.strategy.tuning_cache import KERNEL_STRATEGIES

from . import peer_traffic

STRATEGIES = ("auto", "split")
HEAD = (
    f"{'strategy':<10}{'part':<14}{'passes apart':>14}{'together':>10}{'ratio':>7}"
    f"{'launches apart':>17}{'together':>10}{'frozen µs':>12}{'beyond: apart':>15}{'together':>10}"
    f"{'ratio':>7}"
)


@dataclass(frozen=True)
class Part:
    """A part of the decoder layer on one GPU.

    Attributes:
        name: of the part.
        x_bytes: size of the decoder layer's input: one pass.
        products: its frozen products.
        kernels: by "apart" and "together".
        valid: whether all operands are too large to be served from the cache.
        timed: whether a speed was published for all products.
    """

    name: str
    device: Device
    x_bytes: int
    products: list[Product]
    kernels: dict[str, list[Kernel]]
    valid: bool
    timed: bool

    def passes(self, name: str) -> float:
        """Thin traffic in passes over x."""
        return sum(kernel.thin_bytes for kernel in self.kernels[name]) / self.x_bytes

    def frozen(self) -> float:
        """Seconds of the frozen products alone."""
        products = (peer_traffic.frozen(self.device, c) for c in self.products)
        return sum(cost.seconds(kernels, self.device) for kernels in products)

    def beyond(self, name: str) -> float:
        """Seconds beyond the frozen products'."""
        return cost.seconds(self.kernels[name], self.device) - self.frozen()

    def text(self) -> str:
        """One line of the table, without the strategy."""
        (apart, together), launches = (
            [count(name) for name in self.kernels]
            for count in (self.passes, lambda name: len(self.kernels[name]))
        )
        cells = f"{self.name:<12}{' ' if self.valid else '*'} {apart:>14.2f}{together:>10.2f}"
        cells += f"{together / apart:>7.3f}{launches[0]:>17}{launches[1]:>10}"
        cells += f"{self.frozen() * 1e6:>12.0f}"
        if not self.timed:
            return f"{cells}{'-':>15}{'-':>10}{'-':>7}"
        apart, together = (self.beyond(name) * 1e6 for name in self.kernels)
        return f"{cells}{apart:>15.0f}{together:>10.0f}{together / apart:>7.3f}"

    def record(self) -> dict:
        """The row as JSON-compatible data."""
        return {
            "part": self.name,
            "valid": self.valid,
            "frozen_seconds": self.frozen(),
            "modelled": {
                name: {
                    "thin_bytes": sum(kernel.thin_bytes for kernel in kernels),
                    "launches": [[k.name, k.thin_bytes, k.gemm_bytes] for k in kernels],
                    "seconds_beyond": self.beyond(name) if self.timed else None,
                }
                for name, kernels in self.kernels.items()
            },
        }


def make_parts(
    device: Device, sizes: dict[str, tuple[int, int]], case: Product, strategies: str
) -> tuple[list[str], list[Part]]:
    """The strategies that are used, and all parts; the last one is the whole layer.

    Args:
        sizes: ``(K, N)`` of the projections, by the names of ``harness/shapes.py``.
        case: rows, rank and dropout.
        strategies: "auto": as ``impl="auto"`` selects them without tuning; or one for all.
    """
    q, k, inner, down = (
        replace(case, L=K, N=N) for K, N in (sizes[n] for n in ("q, o", "k, v", "gate, up", "down"))
    )
    groups = {"q, k, v": [q, k, k], decoder.INNER: [inner, inner], decoder.DOWN: [down], "o": [q]}

    def chosen(c: Product, backward: bool = False) -> str:
        return _chosen(device, c, backward) if strategies == "auto" else strategies

    both = {c: (chosen(c), chosen(schedule.back(c), True)) for c in (q, k, inner, down)}
    apart = {
        name: decoder.separate(device, group, [both[c] for c in group])
        for name, group in groups.items()
    }
    apart[decoder.ACTIVATION] = decoder.torch_activation(case.M, down.L, case.itemsize)
    # A member's forward is chosen without its dropout, whose kernel has run; a block's, for gate.
    forward = [chosen(replace(c, masked=None)) for c in groups["q, k, v"]]
    together = {"q, k, v": decoder.chain(device, groups["q, k, v"], forward), "o": apart["o"]}
    block = decoder.gated_mlp(device, [inner, inner, down], 3 * [chosen(inner)])
    for name in (decoder.INNER, decoder.ACTIVATION, decoder.DOWN):
        together[name] = [kernel for part, kernel in block if part == name]

    used = {s for pair in both.values() for s in pair} | {*forward, chosen(inner)}
    timed = device.has_gemm_ratio or not used & {"split", "single_pass"}

    def part(name: str, names: Sequence[str]) -> Part:
        products = [c for n in names for c in groups.get(n, ())]
        columns = [min(c.L, c.N) for c in products] or [down.L]
        valid = cost.is_valid(device, case.M * min(columns) * case.itemsize)
        kernels = {
            "apart": [kernel for n in names for kernel in apart[n]],
            "together": [kernel for n in names for kernel in together[n]],
        }
        x_bytes = case.M * q.L * case.itemsize
        return Part(name, device, x_bytes, products, kernels, valid, timed)

    names = ("q, k, v", "o", decoder.INNER, decoder.ACTIVATION, decoder.DOWN)
    parts = [*(part(name, [name]) for name in names), part("layer", names)]
    return sorted(used), parts


def _chosen(device: Device, c: Product, backward: bool) -> str:
    return cost.choose_strategy(
        device, c.itemsize, c.M, c.N, c.L, c.R,
        masked=c.masked, aligned=c.aligned, gradients=backward, strategies=KERNEL_STRATEGIES,
    )[0]  # fmt: skip
