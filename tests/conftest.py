"""Kernels run under Triton's interpreter on CPU tensors, and fresh memory is NaN."""

import contextlib
import os
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

import numpy as np
import pytest
import torch

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    interpreter = None


def _mend_interpreter() -> None:
    """Two faults of Triton's interpreter (seen in 3.7 to 3.9) would hide ours.

    bfloat16 lives in uint16 arrays there: ``tl.dot`` multiplies the bit patterns as integers, and
    casts from float32 truncate instead of rounding to nearest even. Both go through PyTorch here.
    """
    builder = interpreter.InterpreterBuilder
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def to_float(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, to_float(a), to_float(b), d, input_precision, max_num_imprecise_acc)

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            data = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast_impl(self, src, dst_type)

    builder.create_dot = dot
    builder.cast_impl = cast
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))


_cache = tempfile.TemporaryDirectory()
os.environ["FUSED_LORA_CACHE"] = _cache.name  # what the machine's user has tuned is no test's
if interpreter is not None:
    _mend_interpreter()
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
