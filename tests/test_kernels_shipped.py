"""Every shipped tile, in float16, on shapes with ragged edges, under the interpreter."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import (
    FP16,
    FP32,
    INV_KEEP,
    SCALE,
    check,
    gated_in_float64,
    rand,
    random_keep_bits,
)

from fused_lora.kernels import select_config
from fused_lora.kernels.config import Target
from fused_lora.kernels.gated import gated_backward
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.single_pass import single_pass

ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"]


def shipped(candidates, ranks):
    """One config for each tile shape in the tables of all GPUs, with a rank that it serves."""
    found = {}
    for arch, (itemsize, aligned), rank in itertools.product(
        ARCHS, [(2, True), (2, False), (4, True), (4, False)], ranks
    ):
        shared = select_config.SHARED_BYTES.get(arch, select_config.DEFAULT_SHARED_BYTES)
        target = Target(arch, sms=3, shared_bytes=shared)
        for config in candidates(target, itemsize, rank, aligned):
            shape = *config.tile(rank), getattr(config, "block_l", 0), getattr(config, "block_m", 0)
            found.setdefault((shape, config.descriptors), (config, rank))
    return list(found.values())


def tile_id(case):
    config, rank = case
    return f"{type(config).__name__}-{config.tile(rank)}-{rank}"


@pytest.mark.parametrize(
    "case",
    shipped(lambda t, i, r, a: select_config.gemm_candidates(t, i, r, aligned=a), [16, 64]),
    ids=tile_id,
)
def test_shipped_tiles_of_lora_gemm(case):
    config, R = case
    M, N, L = config.block_m + 5, config.block_n + 8, config.block_l + 8
    p, q, u, v = rand(M, L, dtype=FP16), rand(L, N, dtype=FP16), rand(M, R), rand(R, N, dtype=FP16)
    keep_bits, mask = random_keep_bits(M, N)
    o = torch.empty(M, N, dtype=FP16)
    lora_gemm(o, p, q, u, v, None, config, keep_bits=keep_bits, inv_keep=INV_KEEP)
    low_rank = u.to(FP16).double() @ v.double() * mask
    check(o, p.double() @ q.double() + low_rank, FP16)


@pytest.mark.parametrize(
    "case", shipped(lambda t, i, r, a: select_config.add_candidates(t, i, r), [16, 64]), ids=tile_id
)
def test_shipped_tiles_of_lora_add(case):
    config, R = case
    M, N = config.block_m + 5, config.block_n + 8
    o, u, v = rand(M, N, dtype=FP16), rand(M, R), rand(R, N, dtype=FP16)
    keep_bits, mask = random_keep_bits(M, N)
    before = o.double()
    lora_add(o, u, v, None, config, base=o, keep_bits=keep_bits, inv_keep=INV_KEEP)
    check(o, before + u.to(FP16).double() @ v.double() * mask, FP16)


@pytest.mark.parametrize(
    "case",
    shipped(lambda t, i, r, a: select_config.gated_candidates(t, i, r, aligned=a), [16, 64]),
    ids=tile_id,
)
def test_shipped_tiles_of_gated(case):
    config, R = case
    M, N = config.block_m + 5, config.block_n + 8
    gate, up, dh = (rand(M, N, dtype=FP16) for _ in range(3))
    u, v = rand(M, R), rand(R, N, dtype=FP16)
    keep_bits, mask = random_keep_bits(M, N)
    wide = dh.double() + u.to(FP16).double() @ v.double() * mask
    h, dgate, dup = gated_in_float64(gate, up, wide, "silu")
    masking = {"keep_bits": keep_bits, "inv_keep": INV_KEEP}
    gated_backward(gate, up, dh, config, activation="silu", u=u, v=v, **masking)
    check(gate, dgate, FP16)
    check(up, dup, FP16)
    check(dh, h, FP16)


@pytest.mark.parametrize(
    "case",
    shipped(
        lambda t, i, r, a: select_config.shrink_candidates(t, i, r, describable=a), [16, 64, 256]
    ),
    ids=tile_id,
)
def test_shipped_tiles_of_shrink(case):
    config, R = case
    M, L = config.block_m + 5, config.block_l + 9
    p, q = rand(M, L, dtype=FP16), rand(L, R, dtype=FP16)
    keep_bits, mask = random_keep_bits(M, L)
    u = torch.empty(M, R)
    shrink(u, p, q, SCALE, config, scale_u=False, keep_bits=keep_bits, inv_keep=INV_KEEP)
    check(u, (p.double() * mask) @ q.double(), FP32)


@pytest.mark.parametrize(
    "case",
    shipped(
        lambda t, i, r, a: select_config.rank_grad_candidates(t, i, r, describable=a), [16, 64, 256]
    ),
    ids=tile_id,
)
def test_shipped_tiles_of_rank_grad(case):
    config, R = case
    M, L = config.block_m + 5, config.block_l + 9
    u, p = rand(M, R), rand(M, L, dtype=FP16)
    keep_bits, mask = random_keep_bits(M, L)
    o = torch.empty(R, L)
    rank_grad(o, u, p, None, config, keep_bits=keep_bits, inv_keep=INV_KEEP)
    check(o, u.to(FP16).double().t() @ (p.double() * mask), FP32)


@pytest.mark.parametrize(
    "case",
    shipped(
        lambda t, i, r, a: select_config.single_pass_candidates(t, i, r, describable=a), [16, 64]
    ),
    ids=tile_id,
)
def test_shipped_tiles_of_single_pass(case):
    config, R = case
    M, N, L = config.block_m + 5, config.block_n + 8, config.block_l + 9
    p, q, z = rand(M, L, dtype=FP16), rand(L, N, dtype=FP16), rand(L, R, dtype=FP16)
    v = rand(R, N, dtype=FP16)
    o, u = torch.empty(M, N, dtype=FP16), torch.empty(M, R)
    single_pass(o, u, p, q, z, v, torch.tensor(0.1), config)
    low = p.double() @ z.double()
    check(u, low, FP32)
    check(o, p.double() @ q.double() + 0.1 * u.to(FP16).double() @ v.double(), FP16)
