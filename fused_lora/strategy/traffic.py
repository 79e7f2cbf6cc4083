"""What each kernel of the layer moves and computes: bytes per operand, operations.

A kernel moves its compulsory bytes: each address once. Recorded under Triton's interpreter, the
kernels read and write exactly these (tests/test_traffic.py). Large products read more. The tiles
that run at the same time (a wave of one tile per SM) share their panels of the operands in the last
cache before DRAM, but the next wave reads its panels from DRAM again. This holds for operands that
do not fit in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..kernels import select_config
from ..kernels.config import (
    DIGITS,
    MIN_SPLIT_ROWS,
    SEGMENT_ROWS,
    TICKETS,
    cdiv,
    is_aligned,
    rank_grad_applies,
    split_evenly,
)
from .devices import Device

# Triton's GEMMs read more than a wave's panels. The factor is fitted to three hardware-counter
# readings of LoRAFusion's kernels on an H100; with it the model is within 3 % of six readings of
# two implementations (tests/test_traffic.py).
TRITON_TRAFFIC = 1.2
VENDOR_TILE = (128, 256, 8)  # rows, columns, row blocks per group; with it the six readings are met
# Integer instructions per mask word of 64 columns. For 8 words there are 200 in the loop, per
# digit, and 352 around it [compiled, sm_90, Triton 3.7.1].
_MASK_LOOP, _MASK_REST = 25, 44
_OWN = ("p", "q", "o")  # operands of the frozen product itself; those of the epilogue are thin


@dataclass(frozen=True)
class Kernel:
    """One launch and what it moves.

    Attributes:
        name: the kernel's name.
        reads: compulsory bytes read per operand, each address once.
        writes: compulsory bytes written per operand.
        flops: operations of the matrix products, with the rank padded to whole blocks.
        rereads: how often an operand is read from DRAM, if not once.
        loads: bytes that all programs together load per operand, most of them from the cache; of
            the operands that several programs load, and of the one that a thin kernel streams.
        gemm: factor on the traffic of the large product's own operands, ``p``, ``q`` and ``o``; 0
            for a kernel without a large product.
        speed: speed of its products relative to the vendor's.
        integers: number of integer instructions.
        is_torch: launched by a PyTorch operator; otherwise by Triton.
    """

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    flops: float = 0.0
    rereads: dict[str, float] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    gemm: float = 0.0
    speed: float = 1.0
    integers: float = 0.0
    is_torch: bool = False

    @property
    def gemm_bytes(self) -> float:
        """DRAM traffic of the frozen product's own operands."""
        return self._traffic(True) * self.gemm

    @property
    def thin_bytes(self) -> float:
        """All other DRAM traffic."""
        return self._traffic(False)

    def _traffic(self, of_gemm: bool) -> float:
        moved = [(name, size * self.rereads.get(name, 1.0)) for name, size in self.reads.items()]
        moved += self.writes.items()
        return sum(size for name, size in moved if of_gemm == (self.gemm > 0 and name in _OWN))


@dataclass(frozen=True)
class Product:
    """One direction of the layer: ``O = P Q + D(U V)`` with ``U = D(P) Z``.

    Attributes:
        M, L, N, R: ``P (M,L)``, ``Q (L,N)``, ``U (M,R)``.
        members: the projections of one input whose thin products are launched together, each with
            its own mask, Z, U and V; R is the rank of one.
        itemsize: bytes per element of P, Q and O.
        adapter_itemsize: bytes per element of Z and V.
        masked: what dropout applies to: "operand" (P, in forward), "output" (U V, in backward) or
            None.
        bias: whether a bias is added.
        backward: whether U carries the scale, as G does; in forward its product does.
        segments: into which the rows are sorted, each with its own Z, V, scale and bias; 0: none.
            Assumed to be equally long.
        weights: the matrices Q: one for all rows, or one per segment.
    """

    M: int
    L: int
    N: int
    R: int
    itemsize: int = 2
    adapter_itemsize: int = 2
    masked: str | None = None
    bias: bool = False
    backward: bool = False
    members: int = 1
    segments: int = 0
    weights: int = 1

    @property
    def adapters(self) -> int:
        """Number of adapters: of Z, V, and their gradients."""
        return max(1, self.segments)

    @property
    def ranks(self) -> int:
        """The rank of all members together."""
        return self.members * self.R

    @property
    def aligned(self) -> bool:
        """Whether every row of contiguous operands starts on a 16-byte boundary."""
        return is_aligned(self.L * self.itemsize, self.N * self.itemsize)

    @property
    def p_aligned(self) -> bool:
        """Whether every row of P starts on a 16-byte boundary."""
        return is_aligned(self.L * self.itemsize)


def panel_reads(M: int, N: int, tile: tuple[int, int, int], sms: int) -> tuple[float, float]:
    """How often each row panel and each column panel of an (M, N) product is read from DRAM.

    A wave of one tile per SM covers at least ``tile[2]`` row blocks by as many column blocks as
    fit, and reads each of its panels once.
    """
    block_m, block_n, group = tile
    num_m, num_n = cdiv(M, block_m), cdiv(N, block_n)
    waves = max(1.0, num_m * num_n / sms)
    rows = min(num_m, max(group, sms / num_n))
    columns = min(num_n, sms / rows)
    return waves * rows / num_m, waves * columns / num_n


def vendor_gemm(
    name: str,
    sms: int,
    M: int,
    L: int,
    N: int,
    itemsize: int = 2,
    *,
    bias: bool = False,
    seeded: bool = False,
    weights: int = 1,
) -> Kernel:
    """The large product ``P Q`` in the vendor's library.

    Args:
        seeded: whether it is accumulated onto ``O``.
        weights: the matrices Q, each for a part of the rows.
    """
    row, column = panel_reads(cdiv(M, weights), N, VENDOR_TILE, sms)
    reads = {"p": M * L * itemsize, "q": weights * L * N * itemsize}
    if bias:
        reads["bias"] = N * itemsize
    if seeded:
        reads["seed"] = M * N * itemsize
    written = {"o": M * N * itemsize}
    again = {"p": row, "q": column}
    flops, speed = 2.0 * M * L * N, _inside(M, weights, VENDOR_TILE[0])
    return Kernel(name, reads, written, flops, again, gemm=1.0, speed=speed, is_torch=True)


def dropout_mask(M: int, L: int) -> Kernel:
    """The keep bits of an ``(M, L)`` input, computed once per forward."""
    written = M * _pitch(L) * 4
    integers = written / 8 * (_MASK_LOOP * DIGITS + _MASK_REST)
    return Kernel("dropout_mask", {"seed": 8}, {"keep_bits": written}, integers=integers)


def shrink(device: Device, c: Product) -> list[Kernel]:
    """``U = D(P) Z``, or ``s · P Z``: one read of P, and partial sums if it is split."""
    target = device.target
    config = select_config.shrink_config(
        target, c.itemsize, c.M, c.L, c.R, describable=c.p_aligned, members=c.members,
        segments=c.segments,
    )  # fmt: skip
    _, splits = split_evenly(c.L, config.splits, config.block_l)
    elements = c.adapters * c.L * c.ranks
    reads = {"p": c.M * c.L * c.itemsize, "q": elements * c.itemsize}
    kernels, written, integers = cast(elements, c), {"u": c.M * c.ranks * c.itemsize}, 0.0
    rank_blocks = c.members * cdiv(c.R, config.block_r(c.R))
    if c.masked == "operand":
        mask = dropout_mask(c.M, c.L)
        if config.makes_mask:
            reads["seed"] = c.members * mask.reads["seed"]
            written["keep_bits"] = c.members * mask.writes["keep_bits"]
            integers = mask.integers * rank_blocks
        else:
            kernels += c.members * [mask]
            reads["keep_bits"] = c.members * _mask_bytes(c.M, c.L, config.block_l)
    flops = 2.0 * c.M * c.L * c.members * _padded(c.R, config.block_r(c.R))
    loads = {
        "p": reads["p"] * rank_blocks,
        "q": c.L * c.ranks * c.itemsize * _row_blocks(c, config.block_m),
    }
    reads |= _scale(True, c)
    if splits > 1:
        tickets = c.members * config.blocks(c.M, c.R, c.R)
        parts = _parts(splits, c.M * c.ranks, tickets)
        reads["parts"] = parts["parts"]
        written |= parts
        if not c.backward or c.M <= MIN_SPLIT_ROWS:  # else backward has tickets for all its kernels
            kernels.append(torch_kernel("zeros", {}, {"tickets": 4 * tickets}))
    kernel = Kernel("shrink", reads, written, flops, loads=loads, integers=integers)
    return [*kernels, kernel]


def lora_gemm(device: Device, c: Product) -> Kernel:
    """``O = P Q + D(U V) + bias`` in one launch."""
    target = device.target
    config = select_config.gemm_config(
        target, c.itemsize, c.M, c.N, c.R, aligned=c.aligned, segments=c.segments
    )
    row, column = panel_reads(
        cdiv(c.M, c.weights), c.N, (config.block_m, config.block_n, config.group_m), target.sms
    )
    inner = c.L + _padded(c.R, config.rank_blocks(c.R)[0])
    return Kernel(
        "lora_gemm",
        _operands(c) | _low_rank(c, config.block_n),
        {"o": c.M * c.N * c.itemsize},
        2.0 * c.M * c.N * inner,
        {"p": row, "u": row, "q": column, "v": column},
        _low_rank_loads(c, config),
        gemm=TRITON_TRAFFIC,
        # The ratio is of large products; ``fill`` is for the SMs that a smaller one leaves idle.
        speed=device.gemm_ratio
        * select_config.fill(config, target, c.M, c.N)
        * _inside(c.M, c.segments, config.block_m),
    )


def lora_add(device: Device, c: Product, *, seeds: bool = False) -> Kernel:
    """``O += D(U V)`` after the vendor's product, which adds the bias.

    Args:
        seeds: whether ``O = D(U V) + bias`` is written for the vendor's product to accumulate on.
    """
    config = select_config.add_config(
        device.target, c.itemsize, c.M, c.N, c.R, members=c.members, segments=c.segments
    )
    out = c.M * c.N * c.itemsize
    reads = _low_rank(c, config.block_n)
    if not seeds:
        reads.pop("bias", None)
        reads["o"] = out
    # Programs walk down one block of columns after another, so U is read again for each block
    # unless it stays in the cache meanwhile.
    passes = 1 if seeds else 2
    between = reads["u"] + passes * c.M * config.block_n * c.itemsize
    again = cdiv(c.N, config.block_n) if between > device.cache > 0 else 1
    flops = 2.0 * c.M * c.N * c.members * _padded(c.R, config.rank_blocks(c.R)[0])
    return Kernel("lora_add", reads, {"o": out}, flops, {"u": again}, _low_rank_loads(c, config))


def gated(M: int, columns: int, itemsize: int) -> Kernel:
    """``h = act(gate) · up`` of a gated MLP, all ``(M, columns)``."""
    size = M * columns * itemsize
    return Kernel("gated", {"gate": size, "up": size}, {"h": size})


def gated_backward(device: Device, c: Product, *, in_place: bool = True) -> Kernel:
    """The gradients of gate and up, and ``h`` again, from ``dh + D(U V)``; all ``(c.M, c.N)``.

    Args:
        c: the down projection's backward, of which ``dh`` is the product; a rank of 0: without
            ``D(U V)``, which its own kernel has added.
        in_place: whether the results are written over gate, up and dh.
    """
    aligned = is_aligned(c.N * c.itemsize)
    config = select_config.gated_config(device.target, c.itemsize, c.M, c.N, c.R, aligned=aligned)
    size = c.M * c.N * c.itemsize
    reads = dict.fromkeys(("gate", "up", "dh"), size)
    written = dict.fromkeys(("gate", "up", "dh") if in_place else ("dgate", "dup", "h"), size)
    if not c.R:
        return Kernel("gated_backward", reads, written)
    reads |= _low_rank(c, config.block_n)
    between = reads["u"] + 6 * c.M * config.block_n * c.itemsize  # as in lora_add
    again = cdiv(c.N, config.block_n) if between > device.cache > 0 else 1
    flops = 2.0 * c.M * c.N * _padded(c.R, config.rank_blocks(c.R)[0])
    loads = _low_rank_loads(c, config)
    return Kernel("gated_backward", reads, written, flops, {"u": again}, loads)


def single_pass(device: Device, c: Product) -> list[Kernel]:
    """``U`` and ``O`` in one launch, for small M."""
    config = select_config.single_pass_config(
        device.target, c.itemsize, c.M, c.N, c.R, describable=c.aligned
    )
    block_r = config.block_r(c.R)
    columns = cdiv(c.N, config.block_n)
    flops = 2.0 * c.M * c.N * (c.L + block_r) + 2.0 * columns * c.M * c.L * block_r
    reads = _operands(c) | {"z": c.L * c.R * c.itemsize} | _low_rank(c, config.block_n)
    del reads["u"]
    reads |= _scale(True, c)
    written = {"o": c.M * c.N * c.itemsize, "u": c.M * c.R * c.itemsize}
    # With few rows each panel of Q is read once: no later wave reads it again.
    kernel = Kernel("single_pass", reads, written, flops, gemm=1.0, speed=device.gemm_ratio)
    return [*cast(c.L * c.R, c), kernel]


def rank_grad(device: Device, c: Product, scaled: bool) -> list[Kernel]:
    """``Uᵀ D(P)``, the adapter's gradient: one read of P, plus partial sums if rows are split.

    Args:
        scaled: whether the scale multiplies it, as in ``dB``.
    """
    p, u = c.M * c.L * c.itemsize, c.M * c.ranks * c.itemsize
    out = c.adapters * c.ranks * c.L * c.adapter_itemsize
    masked = c.masked == "operand"
    if not c.segments and not rank_grad_applies(c.M, c.R, masked=masked):
        result = c.R * c.L * 4
        return [
            torch_kernel("mm", {"u": u, "p": p}, {"o": result}, 2.0 * c.M * c.L * c.R),
            torch_kernel(
                "mul" if scaled else "copy", {"o": result} | _scale(scaled, c), {"o": out}
            ),
        ]
    config = select_config.rank_grad_config(
        device.target, c.itemsize, c.M, c.L, c.R, describable=c.p_aligned, members=c.members,
        segments=c.segments,
    )  # fmt: skip
    _, splits = split_evenly(c.M, config.splits, config.block_m)
    if c.segments:  # partial sums only of segments with several items
        splits = cdiv(cdiv(c.M, c.segments), SEGMENT_ROWS)
    reads = {"p": p, "u": u}
    if masked:
        reads["keep_bits"] = c.members * _mask_bytes(c.M, c.L, config.block_l)
    flops = 2.0 * c.M * c.L * c.members * _padded(c.R, config.block_r(c.R))
    rank_blocks = c.members * cdiv(c.R, config.block_r(c.R))
    loads = {"p": p * rank_blocks, "u": u * cdiv(c.L, config.block_l)}
    reads |= _scale(scaled, c)
    written = {"o": out}
    if splits > 1:
        blocks = c.members * config.blocks(c.R, c.L, c.R)
        parts = _parts(c.adapters * splits, c.ranks * c.L, c.adapters * blocks)
        reads["parts"] = parts["parts"]
        written |= parts
    return [Kernel("rank_grad", reads, written, flops, loads=loads)]


def thin_pair(device: Device, c: Product, *, tickets: bool = True) -> list[Kernel] | None:
    """``G`` and ``dB`` in one pass over dY, if ``kernels/strategies.py`` launches it.

    Args:
        tickets: whether it also sets the tickets of later kernels to 0.
    """
    config = select_config.thin_pair_config(
        device.target, c.itemsize, c.M, c.L, c.R, describable=c.p_aligned
    )
    if config is None:
        return None
    _, splits = split_evenly(c.M, config.splits, config.block_m)
    u, q = c.M * c.R * c.itemsize, c.L * c.R * c.itemsize
    parts = {
        "v_parts": cdiv(c.L, config.block_l) * c.M * c.R * 4,
        "o_parts": splits * c.L * c.R * 4,
    }
    flops = 4.0 * c.M * c.L * _padded(c.R, config.block_r(c.R))
    written = {"v": u, "o": c.L * c.R * c.adapter_itemsize}
    if tickets and c.M > MIN_SPLIT_ROWS:  # else no later kernel is split
        written["tickets"] = 4 * TICKETS
    reads = {"p": c.M * c.L * c.itemsize, "q": q, "u": u}
    loads = reads | {"q": q * splits, "u": u * cdiv(c.L, config.block_l)}
    return [
        *cast(c.L * c.R, c),
        Kernel("thin_pair", reads, parts, flops, loads=loads),
        Kernel("sum_pair", parts | _scale(True, c), written),
    ]


def _operands(c: Product) -> dict[str, int]:
    return {"p": c.M * c.L * c.itemsize, "q": c.weights * c.L * c.N * c.itemsize}


def _low_rank(c: Product, block_n: int) -> dict[str, int]:
    """Bytes that the low-rank product and the rest of the epilogue read."""
    v = c.adapters * c.ranks * c.N * c.adapter_itemsize
    reads = {"u": c.M * c.ranks * c.itemsize, "v": v}
    if c.masked == "output":
        reads["keep_bits"] = c.members * _mask_bytes(c.M, c.N, block_n)
    if c.bias:
        reads["bias"] = c.adapters * c.N * c.itemsize
    return reads | _scale(not c.backward, c)


def _low_rank_loads(c: Product, config) -> dict[str, int]:
    """Bytes of U and V that all tiles together load."""
    u, v = c.M * c.ranks * c.itemsize, c.ranks * c.N * c.adapter_itemsize
    return {"u": u * cdiv(c.N, config.block_n), "v": v * _row_blocks(c, config.block_m)}


def _inside(M: int, segments: int, block: int) -> float:
    """The share of the rows of all blocks that are not beyond the end of a segment."""
    if segments <= 1:  # of one product ``fill`` counts them
        return 1.0
    rows = cdiv(M, segments)
    return rows / (cdiv(rows, block) * block)


def _row_blocks(c: Product, size: int) -> int:
    """Blocks of rows, none of which spans two segments."""
    return c.adapters * cdiv(cdiv(c.M, c.adapters), size)


def _scale(is_read: bool, c: Product) -> dict[str, int]:
    return {"scale": 4 * c.adapters} if is_read else {}


def cast(elements: int, c: Product) -> list[Kernel]:
    """The cast of a part of the adapter to the product's dtype, if they differ."""
    if c.adapter_itemsize == c.itemsize:
        return []
    written = {"cast": elements * c.itemsize}
    return [torch_kernel("cast", {"adapter": elements * c.adapter_itemsize}, written)]


def torch_kernel(
    name: str, reads: dict[str, int], writes: dict[str, int], flops: float = 0.0
) -> Kernel:
    """A kernel that one of PyTorch's operators launches."""
    return Kernel(name, reads, writes, flops, is_torch=True)


def _parts(splits: int, size: int, blocks: int) -> dict[str, int]:
    """Bytes written for partial sums: them, and a ticket for each block of the result."""
    return {"parts": splits * size * 4, "tickets": 4 * blocks}


def _padded(rank: int, block: int) -> int:
    return cdiv(rank, block) * block


def _pitch(columns: int) -> int:
    """32-bit words per row of keep bits: a whole number of 16-byte vectors."""
    return 4 * cdiv(columns, 128)


def _mask_bytes(M: int, columns: int, block: int) -> int:
    """Bytes of keep bits read in whole tiles of ``block`` columns, up to the end of a row."""
    return 4 * M * min(_pitch(columns), _padded(columns, block) // 32)
