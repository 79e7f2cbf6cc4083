"""Measure one row: verify every provider, time all in interleaved rounds, count their memory."""

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
FAILED = "failed: "  # prefix of the reason for a provider that raised or was wrong
MIN_ROUNDS, MAX_ROUNDS = 5, 500
MIN_SECONDS = 2.0  # of rounds even if no time is left, so that fast rows get many


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
    """Time a forward and backward of one layer by each of ``providers`` and by the frozen layer.

    Args:
        seconds: for the whole row. MIN_ROUNDS and MIN_SECONDS of rounds always run, and never more
            than MAX_ROUNDS.
        skip_failures: skip a provider that raises or is wrong, and record the reason. An error that
            leaves the device unusable is still raised.

    Raises:
        WrongResultError: a provider computes something else than the layer.
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
