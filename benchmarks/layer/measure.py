"""One row: every provider verified, timed in interleaved rounds, and its memory counted."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from fused_lora.ops.triton_impl import is_sticky
from harness.shapes import Shape
from harness.timing import interleaved, quartiles, ratios
from layer.memory import peak_bytes, saved_bytes
from layer.problem import Problem, verified
from layer.providers import PROVIDERS, UnavailableError
from report.records import Result, Row

BASE = "frozen"
FAILED = "failed: "  # begins the reason of a provider that did not give its result
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
    skip_failures: bool = False,
) -> Row:
    """Forward and backward of one layer by each of ``providers``, and by the frozen layer.

    Args:
        seconds: for all of it; MIN_ROUNDS and MIN_SECONDS of rounds are run in any case, and no
            more than MAX_ROUNDS.
        skip_failures: leave out a provider that raises or is wrong, with the reason; an error
            after which the device is unusable is raised all the same.

    Raises:
        WrongResultError: a provider computes something else.
    """
    start = time.perf_counter()
    problem = Problem.make(shape, getattr(torch, dtype), device, p)
    layers, memory, skipped = {}, {}, {}
    for name in dict.fromkeys((BASE, *providers)):
        try:
            layers[name] = verified(PROVIDERS[name], problem, name)
            memory[name] = saved_bytes(layers[name]), peak_bytes(layers[name])
        except UnavailableError as reason:
            skipped[name] = str(reason)
        except Exception as error:
            if not skip_failures or name == BASE or is_sticky(error):
                raise
            layers.pop(name, None)
            first_line = str(error).strip().partition("\n")[0]
            skipped[name] = f"{FAILED}{type(error).__name__}: {first_line}"
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
