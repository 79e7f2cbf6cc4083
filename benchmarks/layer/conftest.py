"""Options and fixtures of the pytest-benchmark suites: ``pytest benchmarks/ --benchmark-only``."""

import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # unbound threads cause millisecond outliers

from functools import lru_cache

import pytest
import torch

from harness import machine
from harness.shapes import Shape, default_set, is_for_emulation
from layer.problem import Layer, Problem, verified
from layer.providers import PROVIDERS, UnavailableError

SLOW_TO_MAKE = ("compiled",)  # seconds of compilation per row: --bench-full only
MEMORY = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    group = parser.getgroup("fused-lora benchmarks")
    group.addoption("--bench-full", action="store_true", help="every shape, dtype and provider")
    group.addoption("--bench-device", default=None, help="cpu, cuda or mps")


def pytest_configure(config):
    config.stash[MEMORY] = []
    # A provider that is skipped does not use the fixture.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_generate_tests(metafunc):
    if "layer" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("bench_full")
    names = [name for name in PROVIDERS if full or name not in SLOW_TO_MAKE]
    cases = [
        pytest.param(row, name, id=f"{name}-{'-'.join(map(str, row))}".replace(" ", "-"))
        for row in _rows(_device(metafunc.config), full)
        for name in names
    ]
    metafunc.parametrize(("row", "provider"), cases)


def _device(config) -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return config.getoption("bench_device") or (accelerator.type if accelerator else "cpu")


def _rows(device: str, full: bool) -> list[tuple[Shape, str, float]]:
    if full:
        shapes = default_set(device, full)
        rows = [(s, d, p) for d in ("bfloat16", "float32") for p in (0.0, 0.1) for s in shapes]
    else:
        small, _, wide, _ = default_set(device, full)
        rows = [(small, "bfloat16", 0.0), (wide, "bfloat16", 0.1), (wide, "float32", 0.0)]
    emulated = machine.emulated(device)
    return [row for row in rows if row[1] not in emulated or is_for_emulation(row[0], full)]


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    return _device(pytestconfig)


@pytest.fixture
def layer(request, row, provider, device, benchmark) -> Layer:
    """A provider's layer, its results checked; sets the benchmark's group to suite and row."""
    shape, dtype, p = row
    try:
        layer = verified(PROVIDERS[provider], _problem(shape, dtype, device, p), provider)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    suite = request.function.__name__.removeprefix("test_").replace("_", " ")
    benchmark.group = f"{suite}, {shape}, {dtype}, dropout {p:g}"
    benchmark.extra_info |= machine.describe(device)
    return layer


@lru_cache(maxsize=1)
def _problem(shape: Shape, dtype: str, device: str, p: float) -> Problem:
    return Problem.make(shape, getattr(torch, dtype), device, p)


@pytest.fixture
def memory_lines(pytestconfig) -> list[str]:
    """Lines printed at the end of the run: pytest-benchmark's table has no memory columns."""
    return pytestconfig.stash[MEMORY]


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash[MEMORY]:
        terminalreporter.section("memory, in multiples of the bytes of x")
        for line in lines:
            terminalreporter.write_line(line)
