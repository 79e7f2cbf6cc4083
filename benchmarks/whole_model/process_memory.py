"""Memory of a process that trains a whole model, as counted by the operating system."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from whole_model.trainers import Setting, Trainer, base_model

STATUS = Path("/proc/self/status")
STEPS = 3  # the first one creates the optimizer's state


@dataclass(frozen=True)
class Resident:
    """Resident bytes of a process: with the model adapted, and the peak up to the last step."""

    built: int
    peak: int


def resident(setting: Setting, provider: str) -> Resident | None:
    """Measure in a process of its own, which creates the model and trains some steps.

    Everything resident counts: Python and its packages, weights, what the steps need, what a
    vendor's GEMM and the heap keep for themselves. None without Linux's ``/proc``.
    """
    if not STATUS.is_file():
        return None
    return _server().submit(_in_fork, setting, provider).result()


@cache
def _server() -> ProcessPoolExecutor:
    """A process, started once, that has done the imports but has never held a model."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _in_fork(setting: Setting, provider: str) -> Resident:
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_train, (setting, provider))


def _train(setting: Setting, provider: str) -> Resident:
    trainer = Trainer(base_model(setting), provider, setting)
    built = _status("VmRSS")
    for _ in range(STEPS):
        trainer.step()
    # Not getrusage: ru_maxrss survives exec, and would include the memory of the parent.
    return Resident(built, _status("VmHWM"))


def _status(field: str) -> int:
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{field}:")
