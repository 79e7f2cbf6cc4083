"""Times that can be compared: callables in interleaved rounds, and their medians and quartiles."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UPS = 1  # calls of each before its first time


@dataclass(frozen=True)
class Quartiles:
    """The middle half of some numbers."""

    median: float
    q1: float
    q3: float


def interleaved(
    callables: dict[str, Callable[[], object]],
    *,
    device: str | torch.device,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every call, by name: the same number for each, one a round.

    A round calls each once, in an order drawn anew, so that drift and what the one before left in
    the caches fall on all alike; index ``i`` of every list is of round ``i``. What a call returns
    is freed after its time is taken.

    Args:
        callables: what is timed; returns when its work is queued on ``device``.
        device: waited for before and after each call.
        seconds: after which no round starts, once ``min_rounds`` are complete.
        max_rounds: after which none starts in any case.
    """
    device = torch.device(device)
    for function in callables.values():
        for _ in range(WARM_UPS):
            function()
    times: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        shuffle(order)
        for name in order:
            times[name].append(_call(callables[name], device))
        rounds += 1
    return times


def _call(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was queued; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def synchronised(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function``, returning when its work is done."""

    def run():
        result = function()
        synchronize(device)
        return result

    return run


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles, interpolated between neighbours; of one value, that value."""
    if len(values) < 2:
        return Quartiles(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, q1, q3)


def ratios(times: dict[str, list[float]], base: str) -> dict[str, Quartiles]:
    """Each one's time over that of ``base`` in the same round, which cancels what slows both."""
    return {
        name: quartiles([t / b for t, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }
