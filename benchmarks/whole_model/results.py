"""The results of model_step.py and adapter_latency.py."""

from __future__ import annotations

from dataclasses import dataclass

from harness.timing import Quartiles
from whole_model.process_memory import Resident
from whole_model.trainers import Setting


@dataclass(frozen=True)
class Result:
    """One provider's step, in one setting.

    Attributes:
        seconds, parts: time of a whole step, and of its forward, backward and optimizer.
        ratio: to PEFT's step on the same batch.
        held_bytes: weights, adapters and the optimizer's state.
        step_bytes: the peak that a step allocates beyond these, gradients included; see
            :func:`memory.peak_of`.
        process: on a CPU under Linux, the memory of a process of its own. None for tiny models,
            which Python's own memory would hide.
    """

    seconds: Quartiles
    parts: dict[str, Quartiles]
    ratio: Quartiles
    tokens_per_second: float
    held_bytes: int
    step_bytes: int
    process: Resident | None


@dataclass(frozen=True)
class Row:
    """Every provider in one setting."""

    setting: Setting
    results: dict[str, Result]


@dataclass(frozen=True)
class Point:
    """One depth and text length; ``extra`` is the time beyond the plain model's in that round."""

    depth: int
    tokens: int
    seconds: dict[str, Quartiles]
    extra: dict[str, Quartiles]
