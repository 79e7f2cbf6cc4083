"""Seconds that calls take on a GPU, by its own clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch

ROUNDS = 30
_WARM_UPS = 3  # the first compiles; after it clocks and allocator settle
_FLUSH_OF_L2 = 2  # times its size
_LEAST_FLUSH_BYTES = 64 << 20  # where the device does not tell the size of its cache


def device_seconds(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = ROUNDS,
    graphs: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every call, by name: the same number for each, one a round.

    A round runs each once in an order drawn anew, so that drift falls on all alike. Before each the
    L2 cache is overwritten, as other layers do in training; that also gives the host time to queue
    what follows, so that launches do not count.

    Args:
        device: a CUDA or ROCm device.
        graphs: capture each call in a CUDA graph, and time the replays.
    """
    with torch.cuda.device(device):
        for call in calls.values():
            for _ in range(_WARM_UPS):
                call()
        if graphs:
            calls = {name: _captured(call) for name, call in calls.items()}
        return _timed(calls, device, rounds)


def _timed(calls, device: torch.device, rounds: int) -> dict[str, list[float]]:
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    size = max(_FLUSH_OF_L2 * cache, _LEAST_FLUSH_BYTES)
    flush = torch.empty(size, dtype=torch.int8, device=device)
    order, shuffle = list(calls), random.Random(0).shuffle
    events = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            calls[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [s.elapsed_time(e) / 1e3 for s, e in pairs] for name, pairs in events.items()}


def _captured(call: Callable[[], object]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
