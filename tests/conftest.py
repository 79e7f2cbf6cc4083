"""Kernels run under Triton's interpreter on CPU tensors, and fresh memory is NaN.

A GPU is hidden, so that every test is the same everywhere. ``test_gpu.py`` runs the tests of the
kernels and of the layer again, compiled, on a GPU that is there: with FUSED_LORA_TEST_DEVICE set.
"""

import contextlib
import os
import tempfile

if os.environ.get("FUSED_LORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
if "FUSED_LORA_TEST_DEVICE" not in os.environ:
    os.environ.setdefault("FUSED_LORA_HIDDEN_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is initialised

import pytest
import torch

import harness.checkout  # noqa: F401  the package is found where it is not installed

_cache = tempfile.TemporaryDirectory()
os.environ["FUSED_LORA_CACHE"] = _cache.name  # what the machine's user has tuned is no test's
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the threads


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Reading what nobody wrote shows: ``torch.empty`` is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _on_the_device():
    """Tensors are made where ``benchmarks/gpu_acceptance.py`` says, on a GPU that is at hand."""
    device = os.environ.get("FUSED_LORA_TEST_DEVICE")
    with torch.device(device) if device else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def nothing_compiled():
    """No graphs of other tests, whose number is limited."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def unpatched():
    """PEFT as it was, whatever the test, or one before it, leaves patched."""
    from peft.tuners.lora import Linear

    from fused_lora import unpatch_peft

    unpatch_peft()
    forward = Linear.forward
    yield
    unpatch_peft()
    assert Linear.forward is forward
