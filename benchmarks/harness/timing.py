"""Comparable times: callables run in interleaved rounds, with medians and quartiles."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UPS = 1  # untimed calls of each callable


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some numbers."""

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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every callable once per round; return the seconds of its calls, by name.

    Each round shuffles the order, so that drift, and what the previous call left in the caches,
    affect all alike. Index ``i`` of every list belongs to round ``i``. A call's result is freed
    after its time is measured.

    Args:
        callables: what to time; a call may return once its work is queued on ``device``.
        device: synchronised before and after each call.
        seconds: no round starts after this time, once ``min_rounds`` are complete.
        max_rounds: no more rounds than this, however much time is left.
        clock: ``time.process_time`` counts the process's CPU seconds, which other work on the
            machine disturbs less.
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
            times[name].append(_call(callables[name], device, clock))
        rounds += 1
    return times


def _call(
    function: Callable[[], object], device: torch.device, clock: Callable[[], float]
) -> float:
    synchronize(device)
    start = clock()
    result = function()
    synchronize(device)
    elapsed = clock() - start
    del result
    return elapsed


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished its queued work; a no-op on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def synchronised(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Wrap ``function`` so that it returns only once its work on ``device`` is done."""

    def run():
        result = function()
        synchronize(device)
        return result

    return run


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles, interpolated between neighbours; a single value is all three."""
    if len(values) < 2:
        return Quartiles(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, q1, q3)


def ratios(times: dict[str, list[float]], base: str) -> dict[str, Quartiles]:
    """Times over those of ``base`` in the same round, which cancels what slows both."""
    return {
        name: quartiles([t / b for t, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }
