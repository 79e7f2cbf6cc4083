"""The implementations of the layer that are compared, one function each in :data:`PROVIDERS`.

A provider builds its layer from a :class:`problem.Problem`, or raises UnavailableError with the
reason. No provider is timed before :func:`problem.verified` has checked its results.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

import fused_lora
from fused_lora.kernels.config import (
    SINGLE_PASS_MAX_RANK,
    SINGLE_PASS_MAX_ROWS,
    single_pass_applies,
)
from fused_lora.ops import dropout
from layer.floor import Floor
from layer.problem import SCALING, Layer, Problem
from layer.schedules import Addmm, Forced

Provider = Callable[[Problem], Layer]


class UnavailableError(Exception):
    """The reason why a provider cannot run this problem on this machine."""


def _frozen(problem: Problem) -> Layer:
    return Layer(problem, problem.linear)


class _Eager(nn.Module):
    """The textbook formula, with the layouts of PyTorch's own linear layers."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.linear, self.p = problem.linear, problem.p
        self.lora_A = nn.Parameter(problem.lora_A)
        self.lora_B = nn.Parameter(problem.lora_B)

    def forward(self, x):
        dropped = F.dropout(x, self.p) if self.p else x
        return self.linear(x) + SCALING * F.linear(F.linear(dropped, self.lora_A), self.lora_B)


def _eager(problem: Problem) -> Layer:
    module = _Eager(problem)
    return Layer(problem, module, module.lora_A, module.lora_B)


def _compiled(problem: Problem) -> Layer:
    if problem.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UnavailableError("torch.compile needs a C++ compiler for a CPU")
    # Graphs of many shapes would exceed Dynamo's recompile limit, and eager would run instead.
    torch._dynamo.reset()
    module = _Eager(problem)
    module.compile(fullgraph=True, dynamic=False)
    return Layer(problem, module, module.lora_A, module.lora_B)


class _Tutorial(nn.Module):
    """LoRALinear as in tutorials: A ``(in, rank)``, B ``(rank, out)`` and a Dropout module."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.linear = problem.linear
        self.dropout = nn.Dropout(problem.p)
        self.A = nn.Parameter(problem.lora_A.t().contiguous())
        self.B = nn.Parameter(problem.lora_B.t().contiguous())

    def forward(self, x):
        return self.linear(x) + SCALING * (self.dropout(x) @ self.A @ self.B)


def _tutorial(problem: Problem) -> Layer:
    module = _Tutorial(problem)
    return Layer(problem, module, module.A, module.B, transposed=True)


def _peft(problem: Problem, *, autocast_adapters: bool) -> Layer:
    if not autocast_adapters and problem.dtype == torch.float32:
        raise UnavailableError("the same layer as peft where the base is float32")
    peft = _load("peft", "pip install peft")
    config = peft.LoraConfig(
        target_modules=["0"],
        r=problem.shape.R,
        lora_alpha=SCALING * problem.shape.R,
        lora_dropout=problem.p,
    )
    model = peft.get_peft_model(
        nn.Sequential(problem.linear), config, autocast_adapter_dtype=autocast_adapters
    )
    module = model.base_model.model[0]
    return _filled(
        problem, module, module.lora_A["default"].weight, module.lora_B["default"].weight
    )


def _loralib(problem: Problem) -> Layer:
    loralib = _load("loralib", "pip install loralib")
    _, K, N, R = problem.shape
    module = loralib.Linear(
        K,
        N,
        r=R,
        lora_alpha=SCALING * R,
        lora_dropout=problem.p,
        merge_weights=False,
        device=problem.device,
        dtype=problem.dtype,
    )
    module.weight, module.bias = problem.linear.weight, problem.linear.bias
    return _filled(problem, module, module.lora_A, module.lora_B)


def _torchtune(problem: Problem) -> Layer:
    cure = "torchtune 0.6.1 needs torchao<=0.13, which has torchao.dtypes.nf4tensor, and datasets"
    peft = _load("torchtune.modules.peft", cure)
    _, K, N, R = problem.shape
    with problem.device:
        module = peft.LoRALinear(
            K, N, rank=R, alpha=SCALING * R, dropout=problem.p, use_bias=True
        ).to(problem.dtype)
    module.weight, module.bias = problem.linear.weight, problem.linear.bias
    return _filled(problem, module, module.lora_a.weight, module.lora_b.weight)


def _fused(problem: Problem, *, low_precision: bool) -> Layer:
    if low_precision and problem.dtype == torch.float32:
        raise UnavailableError("the same layer as fused where the base is float32")
    module = fused_lora.FusedLoRALinear.from_linear(
        problem.linear,
        rank=problem.shape.R,
        alpha=SCALING * problem.shape.R,
        dropout=problem.p,
        adapter_dtype=problem.dtype if low_precision else None,
    )
    return _filled(problem, module, module.lora_A, module.lora_B, p=_rounded(problem.p))


def _rounded(p: float) -> float:
    """The dropout probability that fused-lora applies for ``p``, a multiple of 2⁻¹⁶."""
    return 1 - dropout.keep_count(p) / dropout.KEEP_ALL


def _schedule(problem: Problem, function, *options, p: float | None = None) -> Layer:
    A, B = nn.Parameter(problem.lora_A), nn.Parameter(problem.lora_B)
    weight, bias = problem.linear.weight, problem.linear.bias
    run = function.apply
    return Layer(
        problem, lambda x: run(x, weight, bias, A, B, SCALING, problem.p, *options), A, B, p=p
    )


def _addmm(problem: Problem) -> Layer:
    return _schedule(problem, Addmm)


def _lorafusion_style(problem: Problem) -> Layer:
    _need_gpu(problem)
    from layer.stored_mask import MAX_RANK, StoredMask

    if problem.shape.R > MAX_RANK:
        raise UnavailableError(f"expected a rank of at most {MAX_RANK}")
    return _schedule(problem, StoredMask)


def _forced(problem: Problem, *, strategy: str) -> Layer:
    _need_gpu(problem)
    if strategy == "single_pass":
        rows, rank = SINGLE_PASS_MAX_ROWS, SINGLE_PASS_MAX_RANK
        masked = "operand" if problem.p else None
        if not single_pass_applies(problem.shape.M, problem.shape.R, masked):
            raise UnavailableError(f"expected M <= {rows}, rank <= {rank} and no dropout")
    return _schedule(problem, Forced, strategy, p=_rounded(problem.p))


def _need_gpu(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise UnavailableError("Triton's kernels run on CUDA and ROCm devices only")


def _filled(problem: Problem, module: nn.Module, lora_A, lora_B, p: float | None = None) -> Layer:
    """Copy the problem's adapter into the module and put it into training mode."""
    with torch.no_grad():
        lora_A.copy_(problem.lora_A)
        lora_B.copy_(problem.lora_B)
    module.train()  # not chained: loralib's train() returns None
    return Layer(problem, module, lora_A, lora_B, p=p)


@lru_cache
def _import(name: str) -> ModuleType | str:
    """The module, or the reason why its import fails; each is tried once."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # incompatible dependencies raise errors of any type
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def _load(name: str, cure: str) -> ModuleType:
    found = _import(name)
    if isinstance(found, str):
        raise UnavailableError(f"{name} does not import ({found}): {cure}")
    return found


PROVIDERS: dict[str, Provider] = {
    "frozen": _frozen,
    "floor": Floor,
    "eager": _eager,
    "tutorial": _tutorial,
    "peft": partial(_peft, autocast_adapters=True),
    "peft-bf16": partial(_peft, autocast_adapters=False),
    "loralib": _loralib,
    "torchtune": _torchtune,
    "compiled": _compiled,
    "addmm": _addmm,
    "fused": partial(_fused, low_precision=False),
    "fused-bf16": partial(_fused, low_precision=True),
    "fused-split": partial(_forced, strategy="split"),
    "fused-single-pass": partial(_forced, strategy="single_pass"),
    "lorafusion-style": _lorafusion_style,
}
