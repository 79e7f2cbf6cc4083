"""Compile cases in worker processes, one architecture per process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import groupby

from triton.errors import TritonError

from .cases import Case
from .driver import FakeDriver, activate
from .report import Row, inspect

CHUNK = 100  # cases per process: they share the cost of importing torch


def compile_case(fake: FakeDriver, case: Case) -> Row:
    """The row of the kernel that ``case`` names."""
    try:
        launched = fake.compile(case.call())
    except (TritonError, RuntimeError) as error:
        return Row(faults=[f"does not compile: {str(error).strip().splitlines()[0]}"])
    (binary,) = (b for b in launched if b.name == f"_{case.kernel}")
    return inspect(binary, case.expected)


def _compile_chunk(cases: list[Case]) -> list[Row]:
    fake = activate(cases[0].arch)
    return [compile_case(fake, case) for case in cases]


def compile_cases(cases: list[Case], jobs: int) -> Iterator[tuple[Case, Row]]:
    """Yield every case with its row, in the order of ``cases``, as soon as it is compiled."""
    chunks = []
    for _, group in groupby(cases, key=lambda case: case.arch):
        of_arch = list(group)
        chunks += [of_arch[at : at + CHUNK] for at in range(0, len(of_arch), CHUNK)]
    with ThreadPoolExecutor(jobs) as pool:
        for chunk, rows in zip(chunks, pool.map(_in_a_process, chunks), strict=True):
            yield from zip(chunk, rows, strict=True)


def _in_a_process(cases: list[Case]) -> list[Row]:
    """Compile one chunk in a new process; ``max_tasks_per_child`` would need Python 3.11."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_compile_chunk, cases).result()
