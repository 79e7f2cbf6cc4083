"""How a CPU computes thin products and those of a half precision that it only emulates."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
# A widened weight is made in blocks of columns that stay in the cache: whole, at 4096², page faults
# take 0.1 of 960 rows' time and ten times one row's.
_WIDE_WEIGHTS = 1 << 20  # of a block, and so many outputs
_WIDE_OUTPUTS = 1 << 22
_WIDE_COLUMNS = 64  # at least


def wide_product(
    wide: Tensor,
    matrix: Tensor,
    U: Tensor,
    V: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``wide matrix + bias + D(U V)``, in wide's dtype throughout and rounded once to ``dtype``."""
    rows, (inner, columns) = wide.shape[0], matrix.shape
    most = min(_WIDE_WEIGHTS // max(1, inner), _WIDE_OUTPUTS // max(1, rows))
    step = max(_WIDE_COLUMNS, most)
    product = wide.new_empty((rows, columns), dtype=dtype)
    for first in range(0, columns, step):
        some = slice(first, first + step)
        block = torch.mm(wide, matrix[:, some].to(wide.dtype))
        if bias is not None:
            block.add_(bias[some])
        if mask is None:
            block.addmm_(U, V[:, some])
        else:
            block.addcmul_(torch.mm(U, V[:, some]), mask[:, some])
        product[:, some] = block
    return product


def is_widened(tall: Tensor, weight: Tensor, summed: int) -> bool:
    """Whether a product of half precision is to be taken in float32, on a CPU.

    Args:
        summed: the dimension of ``weight`` that the product sums over.

    PyTorch's loop over dot products of contiguous vectors is good enough for few rows, where most
    of the work is to read the weight; only there float16's base can overflow before the adapter is
    added. A subclass, as a quantised weight is, may know no product but its own.
    """
    return (
        tall.dtype in EMULATED
        and type(weight) in (Tensor, torch.nn.Parameter)
        and (tall.shape[0] > 8 or weight.stride(summed) != 1)
    )


def _emulated() -> frozenset[torch.dtype]:
    """The dtypes that this CPU has no instructions for, so that PyTorch's GEMM is a plain loop."""
    if platform.machine().lower() not in ("x86_64", "amd64"):  # others have loops of their own
        return frozenset()
    if not torch.backends.mkldnn.is_available():
        return frozenset()

    def is_lacking(name: str) -> bool:
        is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        return is_supported is not None and not is_supported()

    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return frozenset(dtype for dtype, name in names.items() if is_lacking(name))


EMULATED = _emulated()  # asked once, outside of what compilers and dispatch modes see


def thin_products(tall: Tensor, lora_A: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype of products with ``tall``, and whether they are better taken as the transpose.

    Two things that a CPU's GEMMs ask for. In half precision one takes 20 µs to start, in float32 3:
    few rows are widened, as long as products and casts are small. A step takes 0.6 to 1.04 of the
    time where the adapter is float32, and is not cast then; 0.7 to 1.03 where it is not.

    GEMMs of float32 and float64 block columns by 16: with ``R`` columns the transpose takes 0.3 to
    0.95 of the time. Of few rows the views are what costs; one column is no GEMM; those of half
    precision gain nothing, and float16's lose.
    """
    dtype, rows = tall.dtype, tall.shape[0]
    if not tall.is_cpu or type(rows) is not int:  # a graph must hold for any number of rows
        return dtype, False
    rank = lora_A.shape[0]
    if dtype in EMULATED:
        dtype = torch.float32
    if dtype not in _HALF:
        return dtype, rows >= 128 and 1 < rank <= 16
    if lora_A.dtype == torch.float32:
        small = rows * rank <= 512
    else:
        small = rows * rank <= 64 and rank <= 16
    return torch.float32 if rows <= 16 and small else dtype, False
