"""Times every candidate tile of every kernel against the vendor's product, and a plain copy.

A step of ``gpu_acceptance.py``; its results decide the kernels' design. Each call is captured in a
CUDA graph. A race compares the medians of interleaved rounds; the L2 cache is overwritten between
calls. A row has the time in microseconds, and the bandwidth for the least bytes that any
implementation must move.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels import select_config, strategies
from fused_lora.kernels.config import (
    DIGITS,
    Config,
    is_valid,
    single_pass_applies,
)
from fused_lora.kernels.dropout import dropout_mask
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.operands import BackwardOperands
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.single_pass import single_pass
from fused_lora.kernels.thin_pair import thin_pair
from fused_lora.ops import dropout
from fused_lora.ops.triton_impl import is_sticky

# M, K, N of a decoder's square and MLP projections, the largest product first, few rows last.
SHAPES = (
    (4096, 4096, 14336),
    (4096, 14336, 4096),
    (8192, 4096, 4096),
    (1024, 4096, 4096),
    (16, 4096, 14336),
)
RANKS = (16, 64)
SPLITS_OF_SHRINK = (1, 2, 4)
COLUMNS_OF_RANK_GRAD = (128,)  # block_l, in addition to the candidate's own
SPLITS_OF_RANK_GRAD = (3, 4, 8)
SPLITS_OF_PAIR = (12,)
LEAST_ROWS = 256  # per split
INV_KEEP = 1.1

Call = Callable[[], object]


class Race(NamedTuple):
    """Calls that compute the same product, or one to compare it with.

    Attributes:
        what: name of the product.
        moved: the least bytes that a call must move.
        calls: the calls by name.
    """

    what: str
    moved: float
    calls: dict[str, Call]


def named(race: Race, shape: tuple[int, int, int, int]) -> str:
    """Name of a race on one ``(M, K, N, R)`` in the rows."""
    M, K, N, R = shape
    return f"{race.what} {M}x{K}x{N}, rank {R}"


def run(gpu, race: Race, shape: tuple[int, int, int, int]) -> Iterator[dict]:
    """A row per call of a race: first those that failed, then the others, the fastest first."""
    place = {"case": named(race, shape)}
    able = {}
    for name, call in race.calls.items():
        try:
            call()
            gpu.synchronize()  # raises an asynchronous error of this call here
            able[name] = call
        except Exception as error:  # it does not compile or fit here
            if is_sticky(error):
                raise RuntimeError(f"{race.what} by {name}") from error
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield {**place, "name": name, "passed": False, "failures": [failure]}
    times = gpu.device_seconds(able)
    if times is None:
        yield {**place, "ran": list(able)}
        return
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        figures = {"us": round(1e6 * median, 2), "gb_per_s": round(race.moved / median / 1e9, 1)}
        yield {**place, "name": name, **figures}


def races(device: torch.device, M: int, K: int, N: int, R: int) -> Iterator[Race]:
    """The races in bfloat16, with the operands that the kernels have in training."""
    target = select_config.target_of(device)

    def draw(*size) -> Tensor:
        return torch.randn(*size, device=device).bfloat16()

    x, W, o, other, bias = draw(M, K), draw(N, K) / K**0.5, draw(M, N), draw(M, N), draw(N)
    A, B = draw(R, K) / K**0.5, draw(N, R) / R**0.5
    u, scale = draw(M, R), torch.tensor(2.0, device=device)
    keep_bits, x_bits = (dropout.empty_keep_bits(M, n, device) for n in (N, K))
    s = torch.empty_like(u)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    keep = dropout.keep_count(0.1)
    masked = {"keep_bits": keep_bits, "inv_keep": INV_KEEP}
    make_mask = partial(dropout_mask, keep_bits, seed, keep, DIGITS)
    yield Race("copy", 4 * M * N, {"copy_": partial(o.copy_, other)})
    yield Race("mask", M * N / 8, {"dropout_mask": make_mask})

    moved = 2.0 * (M * K + N * K + M * N)
    gemms: dict[str, Call] = {
        "mm": partial(torch.mm, x, W.t(), out=o),
        "addmm_ beta=1": partial(o.addmm_, x, W.t()),
        "mm, then addmm_(S, B)": lambda: torch.mm(x, W.t(), out=o).addmm_(u, B.t()),
    }
    first, *others = select_config.add_candidates(target, 2, R)
    for tried in (first, replace(first, backwards=True), *others):
        run = partial(lora_add, o, u, B.t(), scale, tried)
        # S Bᵀ + b is written first, and the vendor's product accumulates into it.
        write, add = partial(run, base=None, bias=bias), partial(run, base=o)
        gemms[f"seeded {tile(tried)}"] = lambda write=write: (write(), o.addmm_(x, W.t()))
        if tried not in others:
            gemms[f"mm, then {tile(tried)}"] = lambda add=add: (torch.mm(x, W.t(), out=o), add())
    for config in select_config.gemm_candidates(target, 2, R, aligned=True):
        run = partial(lora_gemm, o, x, W.t(), u, B.t(), scale, config)
        gemms |= {f"lora_gemm {tile(config)}": partial(run, bias=bias)}
        gemms |= {f"lora_gemm masked {tile(config)}": partial(run, **masked)}
    if single_pass_applies(M, R, None):
        for config in select_config.single_pass_candidates(target, 2, R, describable=True):
            gemms[f"single_pass {tile(config)}"] = partial(
                single_pass, o, s, x, W.t(), A.t(), B.t(), scale, config, bias=bias
            )
    yield Race("gemm", moved, gemms)

    adds: dict[str, Call] = {"addmm_(S, B)": partial(o.addmm_, u, B.t())}
    for config in select_config.add_candidates(target, 2, R):
        run = partial(lora_add, o, u, B.t(), scale, config)
        adds[f"lora_add {tile(config)}"] = partial(run, base=o)
        adds[f"lora_add masked {tile(config)}"] = partial(run, base=o, **masked)
        adds[f"write {tile(config)}"] = partial(run, base=None)
    yield Race("add", 4 * M * N, adds)

    shrinks: dict[str, Call] = {"mm": partial(torch.mm, x, A.t())}
    for config in select_config.shrink_candidates(target, 2, R, describable=True):
        for splits in SPLITS_OF_SHRINK:
            tried = replace(config, splits=splits)
            shrinks[tile(tried)] = partial(shrink, u, x, A.t(), scale, tried, scale_u=False)
    yield Race("shrink", 2.0 * M * K, shrinks)

    dA = torch.empty(R, K, device=device)
    grads: dict[str, Call] = {"mm": partial(torch.mm, u.t(), x)}
    for config in select_config.rank_grad_candidates(target, 2, R, describable=True):
        for columns in dict.fromkeys((config.block_l, *COLUMNS_OF_RANK_GRAD)):
            for splits in SPLITS_OF_RANK_GRAD:
                tried = replace(config, splits=splits, block_l=columns)
                fits = is_valid(tried, target, 2, R)
                if fits and (M // splits >= LEAST_ROWS or splits == SPLITS_OF_RANK_GRAD[0]):
                    grads[tile(tried)] = partial(rank_grad, dA, u, x, None, tried)
    yield Race("rank_grad", 2.0 * M * K, grads)

    dB, B_half = torch.empty(N, R, device=device), B.bfloat16()
    chosen = select_config.shrink_config(target, 2, M, N, R, describable=True)
    other_chosen = select_config.rank_grad_config(target, 2, M, N, R, describable=True)
    pairs: dict[str, Call] = {
        "shrink, rank_grad": lambda: (
            shrink(u, o, B_half, scale, chosen),
            rank_grad(dB.t(), u, o, scale, other_chosen),
        )
    }
    for config in select_config.thin_pair_candidates(target, 2, R):
        for splits in SPLITS_OF_PAIR:
            tried = replace(config, splits=splits)
            pairs[tile(tried)] = partial(thin_pair, s, dB, o, B_half, u, scale, tried)
    yield Race("pair", 2.0 * M * N, pairs)

    back = BackwardOperands(o, x, W, A, B, u, scale, x_bits, INV_KEEP)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    steps: dict[str, Call] = {"dx alone": partial(torch.mm, o, W)}
    for strategy in ("split", "seeded", "addmm"):
        steps[strategy] = partial(strategies.backward, back, strategy)
        if side is not None:
            steps[f"{strategy}, side stream"] = partial(strategies.backward, back, strategy, side)
    yield Race("backward", moved, steps)


def tile(config: Config) -> str:
    """Name of a config in the rows."""
    shown = [f.name for f in fields(config) if f.name != "descriptors"]
    return " ".join(f"{name}={getattr(config, name)}" for name in shown)
