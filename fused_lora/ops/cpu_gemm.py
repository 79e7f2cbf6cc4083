"""Thin products on a CPU, and products in a half precision that the CPU only emulates."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# A weight is widened in blocks of columns that stay in the cache. Widening a 4096×4096 weight whole
# costs page faults: a tenth of the time for 960 rows, and ten times the time for one row.
_WIDE_WEIGHTS = 1 << 20  # most weights per block
_WIDE_OUTPUTS = 1 << 22  # most outputs per block
_WIDE_COLUMNS = 64  # fewest columns per block, whatever the limits above
_SUMMED_ROWS, _SUMMED_COLUMNS = 4, 16  # see ``sums_apart``
_WIDE_OPERANDS = 1 << 18  # most elements of the larger operand that ``wide_sum`` widens at a time


def wide_product(
    wide: Tensor,
    matrix: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    scaling: float | Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``wide matrix + bias + scaling · mask · U V``, in wide's dtype; rounded once to ``dtype``.

    Without ``U`` the last term is left out.
    """
    if U is not None and (
        isinstance(scaling, Tensor) or scaling == 0
    ):  # alpha=0 would not propagate NaN and infinity
        U, scaling = U * scaling, 1.0
    rows, (inner, columns) = wide.shape[0], matrix.shape
    most = min(_WIDE_WEIGHTS // max(1, inner), _WIDE_OUTPUTS // max(1, rows))
    step = max(_WIDE_COLUMNS, most)
    product = wide.new_empty((rows, columns), dtype=dtype)
    for first in range(0, columns, step):
        some = slice(first, first + step)
        block = torch.mm(wide, matrix[:, some].to(wide.dtype))
        if bias is not None:
            block.add_(bias[some])
        if U is not None and mask is None:
            block.addmm_(U, V[:, some], alpha=scaling)
        elif U is not None:
            block.addcmul_(torch.mm(U, V[:, some]), mask[:, some], value=scaling)
        product[:, some] = block
    return product


def wide_sum(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float32 from operands in half precision, summed over blocks of the inner size.

    For a product with a long inner size. On a CPU, GEMMs in half precision return half precision.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    step = max(1, _WIDE_OPERANDS // max(1, rows, columns))
    if inner <= step:
        return torch.mm(a.float(), b.float())
    product = None
    # ``narrow`` and no result in place: batched gradients (``vmap``) pass here too.
    for first in range(0, inner, step):
        size = min(step, inner - first)
        left, right = a.narrow(1, first, size).float(), b.narrow(0, first, size).float()
        product = torch.mm(left, right) if first == 0 else torch.addmm(product, left, right)
    return product


def sums_apart(U: Tensor, columns: int) -> bool:
    """Whether ``y.addmm_(U, V)`` sums ``U V`` before it adds the sum to ``y``.

    With few rows or columns MKL instead adds one product after the other to ``y``: a ``y`` that is
    larger than ``U V`` is then rounded as often as there are ranks. Not so if ``U`` is row-major
    and ``V`` column-major.
    """
    return columns >= _SUMMED_COLUMNS and U.shape[0] >= _SUMMED_ROWS


def is_widened(tall: Tensor, weight: Tensor, summed: int) -> bool:
    """Whether to compute a half-precision product in float32, on a CPU that only emulates it.

    Args:
        summed: the dimension of ``weight`` that the product sums over.

    With up to 8 rows PyTorch's loop over contiguous dot products is fast enough, since reading the
    weight dominates. Only there can a float16 base product overflow before the adapter is added.
    Subclasses, such as quantised weights, may support no product other than their own.
    """
    return (
        tall.dtype in EMULATED
        and type(weight) in (Tensor, torch.nn.Parameter)
        and (tall.shape[0] > 8 or weight.stride(summed) != 1)
    )


def _emulated() -> frozenset[torch.dtype]:
    """The dtypes that this CPU has no instructions for: PyTorch's GEMM is then a plain loop."""
    if platform.machine().lower() not in ("x86_64", "amd64"):  # others have loops of their own
        return frozenset()
    if not torch.backends.mkldnn.is_available():
        return frozenset()

    def is_lacking(name: str) -> bool:
        is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        return is_supported is not None and not is_supported()

    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return frozenset(dtype for dtype, name in names.items() if is_lacking(name))


EMULATED = _emulated()  # at import, where no compiler or dispatch mode intercepts the check
# With AMX, bfloat16 products run at about ten times float32's rate (measured on a Xeon).
HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def thin_products(
    tall: Tensor, rank: int, adapter: torch.dtype, varies: bool = False
) -> tuple[torch.dtype, bool]:
    """The dtype of thin products with ``tall``, and whether to compute their transposes instead.

    ``rank`` and ``adapter`` are the adapter's rank and dtype; ``varies`` says that the number of
    rows is another one in every call. In half precision oneDNN then prepares each product anew.

    Both adapt to the GEMMs of CPUs. A half-precision GEMM has 20 µs of overhead, a float32 one 3.
    With few rows the operands are therefore widened, as long as products and casts are small. A
    step then takes 0.6 to 1.04 of the time with a float32 adapter, which needs no cast, and 0.7 to
    1.03 with others.

    GEMMs in float32 and float64 process columns in blocks of 16: for a product with ``R`` columns
    the transpose takes 0.3 to 0.95 of the time. With few rows the extra views dominate, and rank 1
    is not a GEMM. In half precision bfloat16 gains nothing and float16 loses.
    """
    dtype, rows = tall.dtype, tall.shape[0]
    if not tall.is_cpu or type(rows) is not int:  # a graph must be valid for any number of rows
        return dtype, False
    if dtype in EMULATED or (varies and dtype in HALF):
        dtype = torch.float32
    if dtype not in HALF:
        return dtype, rows >= 128 and 1 < rank <= 16
    if adapter == torch.float32:
        small = rows * rank <= 512
    else:
        small = rows * rank <= 64 and rank <= 16
    return torch.float32 if rows <= 16 and small else dtype, False
