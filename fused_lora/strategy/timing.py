"""Timing of calls, in seconds: on the GPU by its own clock, and on the host that queues them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

ROUNDS = 30
_WARM_UPS = 3  # the first call compiles; the others let clocks and allocator settle
_FLUSH_OF_L2 = 2  # bytes written to flush L2, in multiples of its size
_LEAST_FLUSH_BYTES = 64 << 20  # used if the device does not report the size of its cache
_HOST_CALLS = 3  # queued in a row; few, since with a full queue the host waits for the device


class Times(NamedTuple):
    """Seconds per call, one value per round.

    Attributes:
        device: time on the GPU.
        host: time on the host until the call returned.
    """

    device: list[float]
    host: list[float]

    def call_time(self) -> list[float]:
        """Time of an eager call in a loop: the longer one, since host and device overlap."""
        return [max(pair) for pair in zip(self.device, self.host, strict=True)]


def call_times(
    calls: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int = ROUNDS
) -> dict[str, Times]:
    """Device and host times of every call, by name.

    The host's time is the mean over a few calls in a row, queued on an idle device.

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
    """Device time of every call in seconds, by name, one value per round.

    Each call is captured in a CUDA graph and the replays are timed, which excludes launch overhead.
    A round runs every call once in a new random order, so that drift affects all calls equally. The
    L2 cache is overwritten before each call, as other layers do in training.

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
    # By default torch uses one stream for every capture, on the device of the process's first one.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        call()
    return graph.replay
