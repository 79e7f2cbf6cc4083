"""Calls that compile one kernel with one config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.kernels.config import BARRIER_BYTES, DIGITS, Config, ThinPairConfig
from fused_lora.kernels.dropout import dropout_mask
from fused_lora.kernels.gated import ACTIVATIONS, gated, gated_backward
from fused_lora.kernels.lora_add import lora_add
from fused_lora.kernels.lora_gemm import lora_gemm
from fused_lora.kernels.rank_grad import rank_grad
from fused_lora.kernels.segments import Segments
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.single_pass import single_pass
from fused_lora.kernels.thin_pair import thin_pair
from fused_lora.ops import dropout

from .report import Expected

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# PEFT keeps adapters in fp32 on a bf16 base; the fp16 cases cover adapters in the base's dtype.
ADAPTER_DTYPES = {"bf16": torch.float32, "fp16": torch.float16, "fp32": torch.float32}
# (M, K, N): whole blocks; rows aligned to 16 bytes that end within a block; neither.
SIZES = {"even": (512, 1024, 1024), "vector": (512, 1032, 1048), "narrow": (512, 1003, 1001)}
MEMBERS = 3  # projections that share their input: " of 3" in the name of a product
SEGMENTS = 8  # that rows are sorted into: " of segments"; enough rows for partial sums of rank_grad
SEGMENTED_ROWS = 4096
PRODUCTS = {
    "lora_gemm": ("y", "dx", "y of segments", "dx of segments"),
    "lora_add": ("y", "dx", "dx of 3", "dx of segments"),
    "single_pass": ("y", "dx"),
    "shrink": ("S", "G", "S of 3", "S of segments"),
    "rank_grad": ("dA", "dB", "dA of 3", "dA of segments", "dB of segments"),
    "thin_pair": ("G, dB",),
    "sum_pair": ("G, dB",),
    "gated": ACTIVATIONS,
    "gated_backward": (*ACTIVATIONS, "silu alone"),
    "dropout_mask": ("keep_bits",),
}
LOOPING = ("lora_gemm", "single_pass", "shrink", "rank_grad", "thin_pair")
MASKED = {("lora_gemm", "dx"), ("lora_add", "dx"), ("single_pass", "dx")} | {
    ("shrink", "S"),
    ("rank_grad", "dA"),
    *(("gated_backward", activation) for activation in ACTIVATIONS),
}
# For several members, which have a launch together only if each has a mask.
OF_MEMBERS = {("lora_add", "dx of 3"), ("shrink", "S of 3"), ("rank_grad", "dA of 3")}
OF_SEGMENTS = {
    ("lora_gemm", "y of segments"),
    ("lora_gemm", "dx of segments"),
    ("lora_add", "dx of segments"),
    ("shrink", "S of segments"),
    ("rank_grad", "dA of segments"),
    ("rank_grad", "dB of segments"),
}
# The code without masks is part of that with masks: compiled with masks only. But the adapter is
# read, and its gradient written, in PEFT's order where there is no mask.
UNMASKED = {("lora_gemm", "y of segments"), ("rank_grad", "dB of segments")}
ONLY_MASKED = OF_MEMBERS | OF_SEGMENTS - UNMASKED
MASKED |= ONLY_MASKED
# Without a matrix product; their code does not depend on a rank.
RANKLESS = {("gated", activation) for activation in ACTIVATIONS} | {
    ("gated_backward", "silu alone")
}


@dataclass(frozen=True)
class Case:
    """One kernel, its result (a value of :data:`PRODUCTS`), its operands and its config."""

    arch: str
    kernel: str
    product: str
    dtype: str
    rank: int
    rows: str  # a key of SIZES
    masked: bool
    config: Config | None

    @property
    def expected(self) -> Expected:
        """The properties that the compiled kernel must have."""
        config, itemsize = self.config, DTYPES[self.dtype].itemsize
        matrix = "any" if self.kernel in ("shrink", "rank_grad", "thin_pair") else "widest"
        if config is None or itemsize == 4 or (self.kernel, self.product) in RANKLESS:
            matrix = "none"
        return Expected(
            matrix=matrix,
            pipelined=self.kernel in LOOPING and (self.rows != "narrow" or itemsize == 4),
            shared=None
            if config is None
            else config.shared_bytes(itemsize, self.rank) + BARRIER_BYTES,
        )

    def call(self) -> Callable[[], None]:
        """The launch as a function; its tensors are allocated here, before it is called."""
        M, K, N = SIZES[self.rows]
        R, dtype = self.rank, DTYPES[self.dtype]
        x, dy, weight = _empty(M, K, dtype), _empty(M, N, dtype), _empty(N, K, dtype)
        A, B = (_empty(*shape, ADAPTER_DTYPES[self.dtype]) for shape in ((R, K), (N, R)))
        vector = 16 // dtype.itemsize  # aligned rows, as in strategies.py
        u = _empty(M, -(-R // vector) * vector, dtype)[:, :R]
        scale, config = torch.tensor(1.0), self.config
        keep_bits = dropout.empty_keep_bits(M, K, x.device) if self.masked else None
        mask = {"keep_bits": keep_bits, "inv_keep": 1.25 if self.masked else 1.0}
        bias = _empty(1, N, torch.float32)[0]
        match self.kernel, self.product:
            case "lora_gemm", "y":
                return lambda: lora_gemm(dy, x, weight.t(), u, B.t(), scale, config, bias=bias)
            case "lora_gemm", "dx":
                return lambda: lora_gemm(x, dy, weight, u, A, None, config, **mask)
            case "lora_gemm", "y of segments":
                x, A, u, _, segments = _of_segments(K, R, dtype, A.dtype)
                y, bias = _empty(len(x), N, dtype), _empty(SEGMENTS, N, torch.float32)
                weight = torch.empty((SEGMENTS, N, K), dtype=dtype)
                B = _in_pefts_order(N, R, A.dtype)
                table, scales = segments.blocks(config.block_m), torch.ones(SEGMENTS)
                operands = y, x, weight.mT, u, B.mT, scales, config
                return lambda: lora_gemm(*operands, bias=bias, segments=table)
            case "lora_gemm", "dx of segments":
                x, A, u, mask, segments = _of_segments(K, R, dtype, A.dtype)
                dy, weight = _empty(len(x), N, dtype), torch.empty((SEGMENTS, N, K), dtype=dtype)
                mask["segments"] = segments.blocks(config.block_m)
                return lambda: lora_gemm(x, dy, weight, u, A, None, config, **mask)
            case "lora_add", "y":
                return lambda: lora_add(dy, u, B.t(), scale, config, base=dy)
            case "lora_add", "dx":
                return lambda: lora_add(x, u, A, None, config, base=x, **mask)
            case "lora_add", "dx of 3":
                A, u, mask = _of_members(x, R, A.dtype)
                return lambda: lora_add(x, u, A, None, config, base=x, **mask)
            case "lora_add", "dx of segments":
                x, A, u, mask, segments = _of_segments(K, R, dtype, A.dtype)
                mask["segments"] = segments.blocks(config.block_m)
                scales = torch.ones(SEGMENTS)
                return lambda: lora_add(x, u, A, scales, config, base=x, **mask)
            case "single_pass", "y":
                z = A.to(dtype).t()
                return lambda: single_pass(dy, u, x, weight.t(), z, B.t(), scale, config, bias=bias)
            case "single_pass", "dx":
                z = B.to(dtype)
                mask["scale_u"] = True
                return lambda: single_pass(x, u, dy, weight, z, A, scale, config, **mask)
            case "shrink", "S":
                if self.masked:
                    mask |= {"seed": torch.tensor(1), "keep_count": 58_982}
                return lambda: shrink(u, x, A.to(dtype).t(), scale, config, scale_u=False, **mask)
            case "shrink", "S of 3":
                A, u, mask = _of_members(x, R, dtype)
                seeds = torch.ones(MEMBERS, dtype=torch.int64)
                mask |= {"seed": seeds, "keep_count": 58_982, "scale_u": False}
                return lambda: shrink(u, x, A.t(), scale, config, **mask)
            case "shrink", "S of segments":
                x, A, u, mask, segments = _of_segments(K, R, dtype, dtype)
                mask |= {"seed": torch.tensor(1), "keep_count": 58_982, "scale_u": False}
                mask["rows"] = torch.arange(SEGMENTED_ROWS)
                mask["segments"] = segments.blocks(config.block_m)
                return lambda: shrink(u, x, A.mT, torch.ones(SEGMENTS), config, **mask)
            case "shrink", "G":
                return lambda: shrink(u, dy, B.to(dtype), scale, config)
            case "rank_grad", "dA":
                return lambda: rank_grad(A, u, x, None, config, **mask)
            case "rank_grad", "dA of 3":
                A, u, mask = _of_members(x, R, A.dtype)
                return lambda: rank_grad(A, u, x, None, config, **mask)
            case "rank_grad", "dA of segments":
                x, A, u, mask, segments = _of_segments(K, R, dtype, A.dtype)
                mask["segments"] = segments.items()
                return lambda: rank_grad(A, u, x, torch.ones(SEGMENTS), config, **mask)
            case "rank_grad", "dB of segments":
                x, _, u, _, segments = _of_segments(K, R, dtype, A.dtype)
                dB, table = _in_pefts_order(K, R, A.dtype).mT, segments.items()
                scales = torch.ones(SEGMENTS)
                return lambda: rank_grad(dB, u, x, scales, config, segments=table)
            case "rank_grad", "dB":
                return lambda: rank_grad(B.t(), u, dy, scale, config)
            case "thin_pair" | "sum_pair", _:
                config = config or ThinPairConfig(4, 2)
                v = torch.empty_like(u)
                return lambda: thin_pair(v, B, dy, B.to(dtype), u, scale, config)
            case "gated", activation:
                gate, up = torch.empty_like(x), torch.empty_like(x)
                return lambda: gated(x, gate, up, config, activation=activation)
            case "gated_backward", _:
                gate, up = torch.empty_like(x), torch.empty_like(x)
                activation, _, alone = self.product.partition(" ")
                options = {} if alone else {"u": u, "v": A, **mask}
                options["activation"] = activation
                return lambda: gated_backward(gate, up, x, config, **options)
            case "dropout_mask", _:
                keep_bits = dropout.empty_keep_bits(M, K, x.device)
                return lambda: dropout_mask(keep_bits, torch.tensor(1), 58_982, DIGITS)
        raise ValueError(f"expected a kernel and a product of PRODUCTS, got {self}")


def _of_members(x: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
    """The stacked A, the U and the masks of MEMBERS projections of ``x``."""
    M, K = x.shape
    words = dropout.empty_keep_bits(M, K, x.device).shape[1]
    mask = {"keep_bits": torch.empty((MEMBERS, M, words), dtype=torch.int32), "inv_keep": 1.25}
    return _empty(MEMBERS * rank, K, dtype), _empty(M, MEMBERS * rank, x.dtype), mask


def _of_segments(
    K: int, rank: int, dtype: torch.dtype, adapter: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, dict, Segments]:
    """The sorted x, the stack of A, the U and the masks of SEGMENTS segments, and these."""
    M = SEGMENTED_ROWS
    x, A = _empty(M, K, dtype), torch.empty((SEGMENTS, rank, K), dtype=adapter)
    mask = {"keep_bits": dropout.empty_keep_bits(M, K, x.device), "inv_keep": 1.25}
    segments = Segments(torch.full((SEGMENTS,), M // SEGMENTS).cumsum(0), M)
    return x, A, _empty(M, rank, dtype), mask, segments


def _in_pefts_order(columns: int, rank: int, dtype: torch.dtype) -> Tensor:
    """A stack of B, or of its gradients, whose fastest dimension is the segment."""
    return torch.empty((columns, rank, SEGMENTS), dtype=dtype).permute(2, 0, 1)


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype)
