"""The cases that cover the shipped tables: all of them, or a slice that CI can afford."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from fused_lora.kernels import select_config
from fused_lora.kernels.config import SINGLE_PASS_MAX_RANK, THIN_PAIR_MAX_RANK, Config

from . import limits
from .cases import (
    DTYPES,
    MASKED,
    MEMBERS,
    OF_MEMBERS,
    OF_SEGMENTS,
    ONLY_MASKED,
    PRODUCTS,
    RANKLESS,
    SIZES,
    Case,
)

ARCHS = tuple(limits.LIMITS)
RANKS = (8, 16, 32, 64, 128, 256)
RANKS_OF = {  # for each key of SIZES; where rows are masked, the code hardly depends on the rank
    "even": RANKS,
    "vector": (16, 64),
    "narrow": (16, 64, 256),
}
FP16_RANKS = (16, 64)  # a sample: fp16 rarely has a fault where bf16 has none
SAMPLE_RANKS = {  # products that need hardly more registers than others
    "gelu_tanh": (16,),
    "relu": (16,),
    **{made: (16, 64) for _, made in OF_SEGMENTS},
}
RANKLESS_AT = 16
SPLIT = ("shrink", "rank_grad")  # kernels whose reduction may be split over programs
THIN = ("dropout_mask", "sum_pair")  # kernels without a config and without a product
GATED = ("gated", "gated_backward")  # elementwise: in the slice, one kind of call for all

NOT_ONLY_MASKED = {(k, p) for k, made in PRODUCTS.items() for p in made} - ONLY_MASKED

SLICE_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
SLICE_PARTS = ("first", "last")  # of the candidates of a call
SLICE = (
    ("bf16", "even", 64),
    ("bf16", "narrow", 256),
    ("fp16", "vector", 16),
    ("fp32", "even", 32),
)


def shipped(
    arch: str,
    kernel: str,
    dtype: str,
    rank: int,
    rows: str,
    members: int = 1,
    segments: bool = False,
) -> list[Config | None]:
    """Every config of ``kernel`` that could be selected for a call of this kind on ``arch``."""
    target, itemsize = limits.target(arch), DTYPES[dtype].itemsize
    aligned = rows != "narrow"
    match kernel:
        case "lora_gemm":
            return select_config.gemm_candidates(
                target, itemsize, rank, aligned=aligned, segments=segments
            )
        case "lora_add":
            return select_config.add_candidates(target, itemsize, rank, members=members)
        case "gated" | "gated_backward":
            return select_config.gated_candidates(target, itemsize, rank, aligned=aligned)
        case "single_pass":
            return select_config.single_pass_candidates(target, itemsize, rank, describable=aligned)
        case "shrink":
            return select_config.shrink_candidates(
                target, itemsize, rank, describable=aligned, segments=segments
            )
        case "rank_grad":
            return select_config.rank_grad_candidates(
                target, itemsize, rank, describable=aligned, segments=segments
            )
        case "thin_pair":
            return select_config.thin_pair_candidates(target, itemsize, rank) if aligned else []
    return [None]


def full(
    archs: Sequence[str] = ARCHS,
    dtypes: Sequence[str] = tuple(DTYPES),
    ranks: Sequence[int] = RANKS,
    kernels: Sequence[str] = tuple(PRODUCTS),
    dropout: Sequence[bool] = (False, True),
) -> Iterator[Case]:
    """Every shipped config in both directions, on rows of every alignment."""
    for arch, kernel, dtype, rank, rows in product(archs, kernels, dtypes, ranks, SIZES):
        if rank not in (FP16_RANKS if dtype == "fp16" else RANKS_OF[rows]):
            continue
        if kernel in THIN and (dtype, rows) != (dtypes[0], "even"):
            continue
        if kernel == "sum_pair" and rank > THIN_PAIR_MAX_RANK:
            continue
        call = arch, kernel, dtype, rank, rows
        found = [
            (config, made)
            for made in PRODUCTS[kernel]
            for config in shipped(
                *call, MEMBERS if (kernel, made) in OF_MEMBERS else 1, (kernel, made) in OF_SEGMENTS
            )
        ]
        for config, made in found:
            if (kernel, made) in RANKLESS and rank != RANKLESS_AT:
                continue
            if rank not in SAMPLE_RANKS.get(made, RANKS):
                continue
            for masked in dropout:
                if (kernel, made) in (MASKED if masked else NOT_ONLY_MASKED):
                    yield Case(arch, kernel, made, dtype, rank, rows, masked, config)
                    is_split = kernel in SPLIT and (kernel, made) not in OF_SEGMENTS
                    if is_split and rows == "even":
                        split = replace(config, splits=2)
                        yield Case(arch, kernel, made, dtype, rank, rows, masked, split)


def slice_of(
    archs: Sequence[str] = SLICE_ARCHS, parts: Sequence[str] = SLICE_PARTS
) -> Iterator[Case]:
    """Two configs for each call in SLICE, as the variant that needs most registers.

    The first candidate has the largest tile; the last one differs most from it.
    """
    for arch, kernel, (dtype, rows, rank) in product(archs, PRODUCTS, SLICE):
        if dtype == "fp16" and arch != "sm_90":  # it rarely has a fault where bf16 has none
            continue
        if kernel in (*THIN, *GATED) and (dtype, rows) != ("bf16", "even"):
            continue
        made = next((p for p in PRODUCTS[kernel] if (kernel, p) in MASKED), PRODUCTS[kernel][0])
        rank = min(rank, SINGLE_PASS_MAX_RANK) if kernel == "single_pass" else rank
        joint = OF_MEMBERS | (OF_SEGMENTS if arch in ("sm_90", "gfx942") else set())
        others = [p for p in PRODUCTS[kernel] if (kernel, p) in joint]
        for each in (made, *(others if rows == "even" else ())):
            members = MEMBERS if (kernel, each) in OF_MEMBERS else 1
            in_segments = (kernel, each) in OF_SEGMENTS
            found = shipped(arch, kernel, dtype, rank, rows, members, in_segments)
            ends = {"first": found[:1], "last": found[1:][-1:]}
            for config in (config for part in parts for config in ends[part]):
                is_split = kernel in SPLIT and (kernel, each) not in OF_SEGMENTS
                config = replace(config, splits=2) if is_split else config
                yield Case(arch, kernel, each, dtype, rank, rows, (kernel, each) in MASKED, config)
