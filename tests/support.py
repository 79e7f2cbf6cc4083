"""Shared by the tests: reference results (in float64, in eager PyTorch), comparisons, inputs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora.ops import reference
from fused_lora.peft import patch as peft_patch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
swept = pytest.mark.sweep
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NAMES = ("y", "dx", "dA", "dB", "dbias")


def by_default(kept: list, cases: Iterable) -> list:
    """``cases`` as test parameters: those in ``kept`` run by default, the rest in the sweep."""
    cases = list(cases)
    assert all(case in cases for case in kept), kept
    return [case if case in kept else pytest.param(case, marks=swept) for case in cases]


def caught(function, *arguments, **keywords) -> tuple:
    """The result of a call, and this library's warnings, each of which names the caller's line."""
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        result = function(*arguments, **keywords)
    ours = [w for w in log if "fused_lora" in str(w.message)]
    tests = Path(__file__).parent
    assert all(Path(w.filename).parent == tests for w in ours), ours
    return result, [str(w.message) for w in ours]


def warned(function, *arguments, **keywords) -> list[str]:
    """This library's warnings during a call."""
    return caught(function, *arguments, **keywords)[1]


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error relative to that of ``expected``; 0/0 is 0, NaN is NaN."""
    error = (actual.double() - expected.double()).norm()
    size = expected.double().norm()
    return 0.0 if error == 0 else (error / size).item()


def run(function, inputs: dict, dy: Tensor) -> dict[str, Tensor | None]:
    """Output and gradients of ``function(**inputs)`` under the cotangent ``dy``."""
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in ("x", "lora_A", "lora_B", "bias")
        if inputs.get(name) is not None
    }
    y = function(**{**inputs, **leaves})
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    keys = dict(zip(("x", "lora_A", "lora_B", "bias"), NAMES[1:], strict=True))
    return {"y": y.detach()} | {keys[name]: grad for name, grad in grads.items()}


def textbook(x, weight, lora_A, lora_B, bias, scaling, mask=None):
    """The usual eager formula, adapters cast to x's dtype as autocast would."""
    dropped = x if mask is None else x * mask
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, A), B)


def in_float64(inputs: dict, dy: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The reference's results for the same inputs in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    mask = None if mask is None else mask.double()
    return run(lambda **kw: reference.lora_linear(**kw, mask=mask), wide, dy.double())


def in_eager(inputs: dict, dy: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The results of eager PyTorch in the inputs' own dtypes."""
    mask = None if mask is None else mask.to(inputs["x"].dtype)
    return run(lambda **kw: textbook(**kw, mask=mask), inputs, dy)


def assert_as_good_as_eager(actual: dict, expected: dict, eager: dict) -> None:
    """Each result's error is at most twice eager's in its dtype, plus one unit round-off."""
    unit = UNIT_ROUNDOFF[actual["y"].dtype]
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert value.dtype == eager[name].dtype, name
        error = relative_rms(value, expected[name])
        bound = 2 * relative_rms(eager[name], expected[name]) + unit
        assert_error(name, error, bound, value.dtype)


def assert_error(name: str, error: float, bound: float, dtype: torch.dtype) -> None:
    """``error`` is within ``bound``; ``benchmarks/gpu/numerics_rows.py`` reads the message."""
    assert error <= bound, f"{name}: relative RMS {error:.2e}, bound {bound:.2e}, {dtype}"


def pooled(results: list[dict]) -> dict[str, Tensor]:
    """Stack the results of several draws: the error of a handful of numbers varies too much."""
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def watch_patch(replace=setattr) -> list[str]:
    """A list that gets the name of each fused product of the PEFT patch when it runs."""
    calls = []
    for name in ("_fused", "_added"):
        run = getattr(peft_patch, name)
        replace(
            peft_patch, name, lambda *args, name=name, run=run: calls.append(name) or run(*args)
        )
    return calls


def kept_bytes(layer: torch.nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of a call for backward, without parameters, each storage once."""
    own = {
        p.untyped_storage().data_ptr() for p in layer.parameters() if type(p) is torch.nn.Parameter
    }
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), t  # alive, so addresses stay unique
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(size for size, _ in kept.values())


def make_inputs(M, K, N, R, dtype, adapter_dtype=None, bias=True, scaling=1.3) -> dict:
    """Random tensors of one call, scaled so that base and adapter terms have similar magnitudes."""
    adapter_dtype = adapter_dtype or dtype
    return {
        "x": torch.randn(M, K).to(dtype),
        "weight": (torch.randn(N, K) / max(1, K) ** 0.5).to(dtype),
        "lora_A": (torch.randn(R, K) / max(1, K) ** 0.5).to(adapter_dtype),
        "lora_B": (torch.randn(N, R) / R**0.5).to(adapter_dtype),
        "bias": torch.randn(N).to(dtype) if bias else None,
        "scaling": scaling,
    }
