"""Memory that a layer keeps for backward, and the peak that a step allocates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from layer.problem import Layer

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at first use: silences the profiler


def saved_bytes(layer: Layer) -> int:
    """Bytes that autograd keeps of one forward: each storage counted once, without parameters."""
    return kept_of(layer.forward, (*layer.parameters, *layer.frozen))


def kept_of(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps of ``forward``, each storage once, without those given."""
    own = {t.untyped_storage().data_ptr() for t in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive: addresses stay unique
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in kept.values())


def peak_bytes(layer: Layer) -> int | None:
    """Peak bytes of one step of a layer: its inputs excluded, its results included."""
    return peak_of(layer.step, layer.x.device)


def peak_of(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes that ``step`` allocates on top of what was allocated before, results included.

    On CUDA the caching allocator counts them. On a CPU the profiler records torch's allocator,
    which does not include what a vendor's GEMM allocates itself. None on other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = step()
        torch.cuda.synchronize(device)
        del results
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = step()
        del results
    return _peak(profiled)


def _peak(profiled: profile) -> int:
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
