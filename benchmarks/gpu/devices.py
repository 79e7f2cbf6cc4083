"""The devices that the steps of ``gpu_acceptance.py`` run on: a GPU, or a rehearsal of one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fused_lora.kernels import launch, select_config
from fused_lora.strategy import timing, tuning_cache
from fused_lora.strategy.timing import Times
from fused_lora.tune import Layer
from gpu import probe
from harness import fast_interpreter, machine
from harness.shapes import GPU_TARGETS

P = 0.1  # the probability of cases with dropout
TEST_PROCESSES = 16  # at most, of the tests: each has a GPU context


class Gpu:
    """A GPU: the shapes that run on it, its capture of graphs and its timing."""

    small = ((63, 300, 123, 8), (48, 1024, 2048, 16), (2048, 2048, 512, 128))
    probed = tuple((*shape, rank) for shape in probe.SHAPES for rank in probe.RANKS)

    test_processes = min(TEST_PROCESSES, os.cpu_count() or 1)

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def layers(self) -> list[Layer]:
        """The layers that are tuned and timed, largest first."""
        shapes = sorted(GPU_TARGETS, key=lambda s: -s.M * s.K * s.N)
        return [Layer(*shape, p=p) for shape in shapes for p in (0.0, P)]

    def environment(self) -> dict:
        """The device, versions and settings that the results hold for."""
        properties = torch.cuda.get_device_properties(self.device)
        return machine.describe(self.device) | {
            "arch": select_config.target_of(self.device).arch,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "tuned_for": tuning_cache.environment(self.device),
            "repeated_launches": launch.REPEATS,
        }

    def capture(self, step: Callable[[], tuple[Tensor, ...]]):
        """Capture ``step`` as a CUDA graph: ``(results, replay)``; a replay updates the results."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            results = step()
        return results, graph.replay

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self.device)

    def device_seconds(self, calls) -> dict[str, list[float]] | None:
        """Device times of each call, for the probe; None if they cannot be measured."""
        return timing.device_seconds(calls, device=self.device, rounds=15)

    def call_times(self, calls) -> dict[str, Times]:
        """Device and host times of each call, for :func:`fused_lora.tune.tune`."""
        return timing.call_times(calls, device=self.device)


class Rehearsal(Gpu):
    """Triton's interpreter on a CPU: the same code on small shapes; its times are meaningless."""

    small = ((17, 40, 24, 4),)
    probed = ((96, 128, 64, 8),)
    layers = (
        Layer(80, 32, 48, 4, torch.float32),
        Layer(80, 32, 48, 4, torch.float32, P),
    )

    def __init__(self, device: torch.device):
        super().__init__(device)
        fast_interpreter.install()

    def environment(self) -> dict:
        return machine.describe(self.device) | {"rehearsal": "interpreted: times are not a GPU's"}

    def capture(self, step):
        results = step()

        def replay():
            for old, new in zip(results, step(), strict=True):
                old.copy_(new)

        return results, replay

    def synchronize(self) -> None:
        pass

    def device_seconds(self, calls):
        return None

    def call_times(self, calls):
        def seconds(call) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return {name: Times([seconds(call)] * 8, [0.0] * 8) for name, call in calls.items()}
