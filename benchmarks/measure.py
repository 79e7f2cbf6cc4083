"""One row: every provider verified, timed in interleaved rounds, and its memory counted."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from memory import peak_bytes, saved_bytes
from problem import Problem, verified
from providers import PROVIDERS, UnavailableError
from records import Result, Row
from shapes import Shape
from timing import interleaved, quartiles, ratios

BASE = "frozen"
MIN_ROUNDS, MAX_ROUNDS = 5, 500
MIN_SECONDS = 2.0  # of rounds, so that a row of microseconds has many when time has run out


def measure(
    shape: Shape,
    dtype: str,
    p: float,
    *,
    device: str,
    providers: Iterable[str],
    seconds: float,
) -> Row:
    """Forward and backward of one layer by each of ``providers``, and by the frozen layer.

    Args:
        seconds: for all of it; MIN_ROUNDS and MIN_SECONDS of rounds are run in any case, and no
            more than MAX_ROUNDS.

    Raises:
        WrongResultError: a provider computes something else.
    """
    start = time.perf_counter()
    problem = Problem.make(shape, getattr(torch, dtype), device, p)
    layers, skipped = {}, {}
    for name in dict.fromkeys((BASE, *providers)):
        try:
            layers[name] = verified(PROVIDERS[name], problem, name)
        except UnavailableError as reason:
            skipped[name] = str(reason)
    memory = {name: (saved_bytes(layer), peak_bytes(layer)) for name, layer in layers.items()}
    times = interleaved(
        {name: layer.step for name, layer in layers.items()},
        device=device,
        seconds=max(MIN_SECONDS, seconds - (time.perf_counter() - start)),
        min_rounds=MIN_ROUNDS,
        max_rounds=MAX_ROUNDS,
    )
    ratio = ratios(times, BASE)
    results = {name: Result(quartiles(times[name]), ratio[name], *memory[name]) for name in layers}
    return Row(shape, dtype, p, len(times[BASE]), results, skipped)
