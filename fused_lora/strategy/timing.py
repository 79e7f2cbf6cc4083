"""Seconds that calls take: on a GPU by its own clock, and on the host that queues them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

ROUNDS = 30
_WARM_UPS = 3  # the first compiles; after it clocks and allocator settle
_FLUSH_OF_L2 = 2  # times its size
_LEAST_FLUSH_BYTES = 64 << 20  # where the device does not tell the size of its cache
_HOST_CALLS = 3  # queued in a row: the queue must not fill, or the host waits for the device


class Times(NamedTuple):
    """Seconds of one call.

    Attributes:
        device: of the GPU, a value per round.
        host: of the host until the call returned, a value per round.
    """

    device: list[float]
    host: list[float]

    def call_time(self) -> list[float]:
        """Of an eager call in a loop, by round: the host queues while the device works."""
        return [max(pair) for pair in zip(self.device, self.host, strict=True)]


def call_times(
    calls: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int = ROUNDS
) -> dict[str, Times]:
    """Both clocks for every call, by name.

    The host's time is the mean of a few calls in a row, queued on an idle device.

    Args:
        device: a CUDA or ROCm device.
    """
    with torch.cuda.device(device):
        _warm_up(calls)
        host = _host_seconds(calls, device, rounds)
    seconds = device_seconds(calls, device=device, rounds=rounds)
    return {name: Times(seconds[name], host[name]) for name in calls}


def device_seconds(
    calls: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of the device for every call, by name: a value per round.

    Each call is captured in a CUDA graph and its replays are timed, so that no launch counts. A
    round runs each once in an order drawn anew, so that drift falls on all alike. Before each the
    L2 cache is overwritten, as other layers do in training.

    Args:
        device: a CUDA or ROCm device.
    """
    with torch.cuda.device(device):
        _warm_up(calls)
        replays = {name: _captured(call, device) for name, call in calls.items()}
        return _timed(replays, device, rounds)


def _warm_up(calls) -> None:
    for call in calls.values():
        for _ in range(_WARM_UPS):
            call()


def _host_seconds(calls, device: torch.device, rounds: int) -> dict[str, list[float]]:
    order, shuffle = list(calls), random.Random(0).shuffle
    times = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            call = calls[name]
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(_HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - start) / _HOST_CALLS)
    torch.cuda.synchronize(device)
    return times


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


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # By default the stream is one of the device that was current at the first capture of all.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        call()
    return graph.replay
