"""Test setup: kernels run under Triton's interpreter on the CPU; uninitialised memory is NaN.

GPUs are hidden, so that every test does the same on every machine. If there is a GPU,
``test_gpu.py`` runs the tests of the kernels and of the layer again, compiled, in a process with
FUSED_LORA_TEST_DEVICE set.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections import Counter

if os.environ.get("FUSED_LORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
if "FUSED_LORA_TEST_DEVICE" not in os.environ:
    os.environ.setdefault("FUSED_LORA_HIDDEN_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is initialised

import pytest
import torch

import harness.checkout  # noqa: F401  finds the package if it is not installed

_cache = tempfile.TemporaryDirectory()
os.environ["FUSED_LORA_CACHE"] = _cache.name  # not the user's own tuning results
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already use every core
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from harness import fast_interpreter

    fast_interpreter.install()


_SWEPT = pytest.StashKey[dict[str, list[bool]]]()


@pytest.hookimpl(tryfirst=True)  # before -m and -k deselect
def pytest_collection_modifyitems(config, items):
    found = config.stash[_SWEPT] = {}
    for item in items:
        marks = found.setdefault(f"{item.path.name}::{item.originalname}", [])
        marks.append(item.get_closest_marker("sweep") is not None)


@pytest.fixture
def swept_cases(request) -> dict[str, list[bool]]:
    """For each collected test function: whether each of its cases is in the sweep."""
    return request.config.stash[_SWEPT]


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Reads of unwritten memory show: ``torch.empty`` is filled with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _on_the_device():
    """Create tensors on FUSED_LORA_TEST_DEVICE, which ``benchmarks/gpu_acceptance.py`` sets."""
    device = os.environ.get("FUSED_LORA_TEST_DEVICE")
    with torch.device(device) if device else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def nothing_compiled():
    """Drop compiled graphs: Dynamo limits their number, and other tests' would count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """How often a chain was opened, a layer computed its part of one, and a block ran."""
    from fused_lora.layers import gated_block
    from fused_lora.ops import shared_input

    counts = Counter()

    def counted(module, function, name):
        original = getattr(module, function)

        def count(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, count)

    counted(shared_input, "shrink", "chains")
    counted(shared_input, "expand", "layers")
    counted(gated_block, "as_block", "blocks")
    return counts


@pytest.fixture
def expert_calls(monkeypatch) -> list:
    """Gets the names of the adapted Parameters of each fused call of experts."""
    from fused_lora.peft import experts as peft_experts

    found, run = [], peft_experts.fused

    def fused(parts, *args):
        found.append(sorted(parts.adapters))
        return run(parts, *args)

    monkeypatch.setattr(peft_experts, "fused", fused)
    return found


@pytest.fixture
def unpatched():
    """Unpatch PEFT before and after the test, and check that its forward is restored."""
    from peft.tuners.lora import Linear

    from fused_lora import unpatch_peft

    unpatch_peft()
    forward = Linear.forward
    yield
    unpatch_peft()
    assert Linear.forward is forward
