"""The traffic model against published hardware counters and against recorded memory accesses."""

from dataclasses import replace

import pytest
import torch

from fused_lora import (
    Projection,
    Segments,
    fused_lora_gated_mlp,
    fused_lora_linear,
    fused_lora_projections,
)
from fused_lora.kernels import select_config
from fused_lora.kernels.operands import BackwardOperands, ForwardOperands
from fused_lora.ops import dropout
from fused_lora.strategy import decoder, schedule, traffic
from fused_lora.strategy.devices import INTERPRETER, KNOWN
from fused_lora.strategy.traffic import Product
from modelled import experts, peer_traffic
from support import by_default, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = KNOWN["h100"]
TOKENS, RANK = 8192, 16
WIDTHS = (4096, 5120, 8192)

# DRAM GiB of one forward and backward on an H100, M=8192, r=16, dropout 0.1, K=N: hardware
# counters, published with LoRAFusion. traffic.TRITON_TRAFFIC was fitted to the readings of its own
# kernels, so only the three eager readings test the model.
READINGS = [
    ("eager", 4096, 2.008),
    ("eager", 5120, 2.771),
    ("eager", 8192, 5.289),
    ("lorafusion", 4096, 1.258),
    ("lorafusion", 5120, 1.836),
    ("lorafusion", 8192, 4.044),
]


def thin(kernels) -> float:
    return sum(kernel.thin_bytes for kernel in kernels)


def total(kernels) -> float:
    return thin(kernels) + sum(kernel.gemm_bytes for kernel in kernels)


def square(width: int, **changes) -> Product:
    return replace(Product(TOKENS, width, width, RANK, masked="operand"), **changes)


@pytest.mark.parametrize("case", READINGS, ids=lambda case: f"{case[0]} {case[1]}")
def test_published_readings(case):
    name, width, reading = case
    modelled = total(peer_traffic.PEERS[name](H100, square(width))) / 2**30
    assert modelled == pytest.approx(reading, rel=0.03)


# Name, passes with dropout, without: counted by hand in the comments of peer_traffic.
PASSES = [("eager", 21, 16), ("chained", 15, 8), ("lorafusion", 6, 4)]


@pytest.mark.parametrize("case", PASSES, ids=lambda case: case[0])
def test_passes_of_the_peers(case):
    """With a rank far below the width, thin traffic is a whole number of passes over x."""
    name, dropped, undropped = case
    one_pass = TOKENS * 2**16 * 2
    for masked, passes in (("operand", dropped), (None, undropped)):
        peer = peer_traffic.PEERS[name](H100, square(2**16, R=1, masked=masked))
        assert thin(peer) / one_pass == pytest.approx(passes, rel=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200", "rtx4090", "mi300x"])
def test_thin_traffic_is_under_its_target(gpu, width):
    """Including masks, partial sums, float32 S and G, and adapters in half precision or float32."""
    device, case = KNOWN[gpu], square(width)
    eager = thin(peer_traffic.eager(device, case))
    lorafusion = thin(peer_traffic.lorafusion(device, case))
    assert lorafusion / eager == pytest.approx(0.29, abs=0.005)
    for adapter_itemsize in (2, 4):
        ours = replace(case, adapter_itemsize=adapter_itemsize)
        assert thin(schedule.layer(device, ours, "split", "split")) / eager <= 0.22


@pytest.mark.parametrize("case", [(1, 1), (100, 9000), (9000, 100), (8192, 1024), (40_000, 777)])
def test_a_panel_is_read_at_least_once(case):
    """Also for narrow, short and tiny products; exactly once if all tiles run concurrently."""
    for sms in (4, 108, 304):
        for reads in traffic.panel_reads(*case, traffic.VENDOR_TILE, sms):
            assert reads >= 1 - 1e-12
        assert traffic.panel_reads(*case, traffic.VENDOR_TILE, 10**9) == (1.0, 1.0)


def test_epilogue_operands_are_not_the_products_own():
    """GEMM bytes are the bare product's times a constant; epilogue reads count as thin bytes."""
    case = Product(8192, 4096, 14_336, 16, masked="output", bias=True)
    fused = traffic.lora_gemm(H100, case)
    bare = traffic.vendor_gemm("mm", H100.target.sms, case.M, case.L, case.N)
    assert fused.gemm_bytes == pytest.approx(bare.gemm_bytes * traffic.TRITON_TRAFFIC)
    assert bare.thin_bytes == 0
    assert fused.thin_bytes >= sum(fused.reads[name] for name in ("u", "v", "keep_bits", "bias"))


def test_a_large_u_falls_out_of_the_cache_between_columns():
    """``lora_add`` walks rows first: U is read for every block of columns unless L2 holds it."""
    few, many = (traffic.lora_add(H100, Product(M, 4096, 4096, 256)) for M in (1024, 65_536))
    assert few.rereads["u"] == 1
    tile = select_config.add_config(H100.target, 2, 65_536, 4096, 256)
    assert many.rereads["u"] == 4096 / tile.block_n > 1


# M, K, N, R, dtype, adapters' dtype, strategy, dropout: ragged, split in both reductions, chunked
# ranks, partial sums, vendor products for the adapters' gradients.
RECORDED = [
    (63, 600, 80, 8, BF16, BF16, "split", True),
    (600, 100, 300, 8, BF16, FP32, "split", True),
    (600, 520, 90, 3, FP16, FP16, "addmm", True),
    (130, 65, 129, 100, FP16, FP32, "split", True),
    (65, 64, 63, 200, FP32, FP32, "addmm", True),
    (300, 17, 33, 1, FP32, FP32, "split", False),
    (17, 1040, 24, 8, BF16, BF16, "split", True),
    (64, 128, 192, 16, BF16, BF16, "addmm", False),
    (63, 600, 80, 8, BF16, FP32, "seeded", True),
    (600, 100, 304, 8, BF16, FP32, "seeded", True),
    (64, 128, 192, 16, FP16, FP16, "seeded", False),
    (1, 1, 1, 1, FP32, FP32, "addmm", False),
    (17, 300, 123, 24, BF16, FP32, "single_pass", False),
    (64, 128, 64, 16, FP16, FP16, "single_pass", False),
]


def recorded(case) -> list[tuple[str, dict, dict, dict]]:
    """Each kernel of both directions: name, bytes read, written; all reads, repeated ones too."""
    from access_recorder import record

    from fused_lora.kernels import strategies

    M, K, N, R, dtype, adapter_dtype, strategy, dropped = case
    inputs = make_inputs(M, K, N, R, dtype, adapter_dtype)
    x, weight, A, B, bias = (inputs[n] for n in ("x", "weight", "lora_A", "lora_B", "bias"))
    dy, scale = torch.randn(M, N).to(dtype), torch.tensor(2.0)
    seed, keep_bits = None, None
    with record() as launches:
        if dropped:
            seed, keep_bits = torch.tensor(7), dropout.empty_keep_bits(M, K, x.device)
        forward = ForwardOperands(x, weight, A, B, bias, scale, seed, 50_000)
        _, S = strategies.forward(forward, strategy, keep_bits)
        backward = BackwardOperands(dy, x, weight, A, B, S, scale, keep_bits, 1.3)
        strategies.backward(backward, strategy)

    def operands(sizes):
        return {name.removesuffix("_ptr"): size for name, size in sizes.items()}

    return [
        (
            launch.kernel.removeprefix("_"),
            *map(operands, (launch.read_unique, launch.written, launch.read_total)),
        )
        for launch in launches
    ]


@pytest.mark.parametrize(
    "case", by_default([case for case in RECORDED if case[0] != 600], RECORDED), ids=str
)
def test_compulsory_bytes_are_the_recorded_ones(case):
    """Kernel by kernel and operand by operand, masks and partial sums included."""
    pytest.importorskip("triton")
    M, K, N, R, dtype, adapter_dtype, strategy, dropped = case
    product = Product(
        M, K, N, R, dtype.itemsize, adapter_dtype.itemsize, "operand" if dropped else None, True
    )
    modelled = [
        kernel
        for kernel in schedule.layer(INTERPRETER, product, strategy, strategy)
        if not kernel.is_torch  # PyTorch's kernels are not recorded
    ]
    found = recorded(case)
    assert [one[:3] for one in found] == [(k.name, k.reads, k.writes) for k in modelled]
    for (name, *_, total), kernel in zip(found, modelled, strict=True):
        assert {o: total[o] for o in kernel.loads} == kernel.loads, name


def operands_of(launch) -> tuple[str, dict, dict]:
    """A recorded launch as a kernel of the model: its name, bytes read and bytes written."""
    sizes = ({n.removesuffix("_ptr"): s for n, s in d.items()} for d in (
        launch.read_unique, launch.written,
    ))  # fmt: skip
    return launch.kernel.removeprefix("_"), *sizes


def check_launches(launches, modelled, but=()) -> None:
    """Every Triton kernel in order, operand by operand; PyTorch's are not recorded.

    Args:
        but: the operands of which only the compulsory bytes are compared.
    """
    modelled = [kernel for kernel in modelled if not kernel.is_torch]
    assert list(map(operands_of, launches)) == [(k.name, k.reads, k.writes) for k in modelled]
    for launch, kernel in zip(launches, modelled, strict=True):
        loads = {f"{n}_ptr": size for n, size in kernel.loads.items() if n not in but}
        assert {name: launch.read_total[name] for name in loads} == loads, kernel.name


# M, I, R, dtype, adapters' dtype, dropout, in place
GATED = [
    (63, 520, 8, BF16, FP32, True, True),
    (130, 123, 40, FP16, FP16, True, False),
    (17, 65, 1, FP32, FP32, False, True),
    (65, 96, 0, BF16, BF16, False, False),
    (1, 1, 0, FP32, FP32, False, True),
]


@pytest.mark.parametrize("case", GATED, ids=str)
def test_bytes_of_the_gated_mlp_are_the_recorded_ones(case):
    pytest.importorskip("triton")
    from access_recorder import record

    from fused_lora.kernels.gated import gated, gated_backward

    M, columns, R, dtype, adapter_dtype, dropped, in_place = case
    gate, up, dh, *others = (torch.randn(M, columns).to(dtype) for _ in range(6))
    results = {} if in_place else dict(zip(("dgate", "dup", "h"), others, strict=True))
    low_rank, mask = {}, {}
    if R:
        low_rank = {
            "u": torch.randn(M, R).to(dtype),
            "v": torch.randn(R, columns).to(adapter_dtype),
        }
    if dropped:
        mask = {"keep_bits": dropout.make_keep_bits(torch.tensor(7), M, columns, 50_000)}
    aligned = columns * dtype.itemsize % 16 == 0
    config = select_config.gated_config(
        INTERPRETER.target, dtype.itemsize, M, columns, R, aligned=aligned
    )
    with record() as launches:
        gated(others[0], gate, up, config, activation="silu")
        gated_backward(gate, up, dh, config, activation="silu", **results, **low_rank, **mask)
    product = Product(
        M, 1, columns, R, dtype.itemsize, adapter_dtype.itemsize, "output" if dropped else None,
        backward=True,
    )  # fmt: skip
    modelled = [
        traffic.gated(M, columns, dtype.itemsize),
        traffic.gated_backward(INTERPRETER, product, in_place=in_place),
    ]
    check_launches(launches, modelled)


# n, M, K, R, dtype, adapters' dtype: split in both reductions, masks in and beside shrink
MEMBERS = [
    (2, 63, 600, 8, BF16, BF16),
    (3, 600, 520, 5, FP16, FP16),
    (3, 130, 65, 100, BF16, BF16),
    (2, 65, 64, 200, FP32, FP32),
    (3, 17, 1040, 24, BF16, FP32),
]


@pytest.mark.parametrize("case", by_default(MEMBERS[::2][1:] + MEMBERS[:1], MEMBERS), ids=str)
def test_bytes_of_members_are_the_recorded_ones(case):
    """Thin products of projections that share their input: it is read once for all."""
    pytest.importorskip("triton")
    from access_recorder import record

    from fused_lora.kernels.lora_add import lora_add
    from fused_lora.kernels.rank_grad import rank_grad
    from fused_lora.kernels.shrink import shrink

    n, M, K, R, dtype, adapter_dtype = case
    size, aligned = (INTERPRETER.target, dtype.itemsize, M, K, R), K * dtype.itemsize % 16 == 0
    thin = {"describable": aligned, "members": n}
    x, dx, u = (torch.randn(M, width).to(dtype) for width in (K, K, n * R))
    A, dA = torch.randn(n * R, K).to(adapter_dtype), torch.empty(n * R, K, dtype=adapter_dtype)
    keep_bits = torch.stack([dropout.empty_keep_bits(M, K, x.device)] * n)
    seeds, scale = torch.arange(n), torch.ones(())
    with record() as launches:
        shrink(
            u, x, A.to(dtype).t(), scale, select_config.shrink_config(*size, **thin),
            scale_u=False, keep_bits=keep_bits, seed=seeds, keep_count=50_000,
        )  # fmt: skip
        config = select_config.add_config(*size, members=n)
        lora_add(dx, u, A, None, config, base=dx, keep_bits=keep_bits)
        config = select_config.rank_grad_config(*size, **thin)
        rank_grad(dA, u, x, None, config, keep_bits=keep_bits)
    forward = Product(
        M, K, K, R, dtype.itemsize, adapter_dtype.itemsize, masked="operand", members=n
    )
    backward = replace(forward, masked="output", backward=True)
    modelled = [
        *traffic.shrink(INTERPRETER, forward),
        traffic.lora_add(INTERPRETER, backward),
        *traffic.rank_grad(INTERPRETER, forward, scaled=False),
    ]
    check_launches(launches, modelled)


# M, K, strategy, dtype, adapters' dtype, and each projection's N, R and dropout
CHAINS = [
    (63, 600, "split", BF16, BF16, [(80, 8, 0.2), (40, 8, 0.2), (24, 8, 0.2)]),
    (300, 96, "seeded", BF16, FP32, [(64, 8, 0.0), (32, 8, 0.0), (33, 8, 0.0)]),
    (65, 64, "addmm", FP16, FP16, [(48, 5, 0.2), (32, 12, 0.0), (16, 3, 0.2), (24, 9, 0.0)]),
    (17, 130, "split", FP32, FP32, [(129, 16, 0.2), (64, 16, 0.0)]),
    (130, 65, "addmm", BF16, FP32, [(32, 40, 0.2), (16, 24, 0.2)]),
    (600, 520, "split", BF16, BF16, [(80, 16, 0.2)]),
]
# M, in, hidden, out, strategy, dtype, adapters' dtype, ranks and dropouts of gate, up and down
BLOCKS = [
    (63, 96, 128, 80, "split", BF16, BF16, (8, 8, 8), (0.2, 0.2, 0.2)),
    (300, 64, 80, 48, "seeded", BF16, FP32, (8, 8, 16), (0.0, 0.0, 0.0)),
    (65, 65, 123, 33, "addmm", FP16, FP16, (5, 12, 4), (0.2, 0.0, 0.2)),
    (17, 130, 64, 24, "split", FP32, FP32, (3, 8, 40), (0.2, 0.2, 0.0)),
]


def adapted(M, K, N, R, p, dtype, adapter_dtype) -> tuple[Projection, Product]:
    """A projection and its forward product."""
    inputs = make_inputs(M, K, N, R, dtype, adapter_dtype)
    weight, A, B, bias = (inputs[name] for name in ("weight", "lora_A", "lora_B", "bias"))
    layer = Projection(weight, A.requires_grad_(), B.requires_grad_(), bias, 1.3, p)
    masked = "operand" if p else None
    return layer, Product(M, K, N, R, dtype.itemsize, adapter_dtype.itemsize, masked, bias=True)


@pytest.mark.parametrize("case", by_default(CHAINS[:-1], CHAINS), ids=str)
def test_bytes_of_a_chain_are_the_recorded_ones(case):
    """A call of the public function, forward and backward, masks and stacked ranks included."""
    pytest.importorskip("triton")
    from access_recorder import record

    M, K, strategy, dtype, adapter_dtype, sizes = case
    layers, products = zip(*(adapted(M, K, *s, dtype, adapter_dtype) for s in sizes), strict=True)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    with record() as launches:
        outputs = fused_lora_projections(x, layers, impl=f"triton:{strategy}")
        torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    check_launches(launches, decoder.chain(INTERPRETER, products, [strategy] * len(products)))


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_bytes_of_a_gated_block_are_the_recorded_ones(case):
    pytest.importorskip("triton")
    from access_recorder import record

    M, K, hidden, N, strategy, dtype, adapter_dtype, ranks, dropouts = case
    widths = (K, hidden), (K, hidden), (hidden, N)
    layers, products = zip(
        *(
            adapted(M, *width, R, p, dtype, adapter_dtype)
            for width, R, p in zip(widths, ranks, dropouts, strict=True)
        ),
        strict=True,
    )
    x = torch.randn(M, K).to(dtype).requires_grad_()
    with record() as launches:
        y = fused_lora_gated_mlp(x, *layers, impl=f"triton:{strategy}")
        y.backward(torch.randn_like(y))
    modelled = decoder.gated_mlp(INTERPRETER, products, [strategy] * 3)
    check_launches(launches, [kernel for _, kernel in modelled])


# segments, rows of each, K, N, R, dtype, adapters' dtype, dropout: partial sums in the last
SEGMENTED = [
    (4, 17, 96, 80, 8, BF16, FP32, False),
    (3, 40, 256, 64, 16, BF16, BF16, True),
    (2, 33, 72, 136, 5, FP32, FP32, True),
    (2, 1100, 24, 40, 4, FP16, FP32, False),
]


def segmented(case, strategy: str):
    """The recorded launches of both directions, without tables and masks' rows, and the product."""
    from access_recorder import record

    G, rows, K, N, R, dtype, adapter_dtype, dropped = case
    M = G * rows
    x = torch.randn(M, K).to(dtype).requires_grad_()
    weight = torch.randn(G, N, K).to(dtype)
    A = torch.randn(G, R, K).to(adapter_dtype).requires_grad_()
    B = torch.randn(N, R, G).to(adapter_dtype).permute(2, 0, 1).requires_grad_()  # PEFT's order
    segments = Segments(torch.arange(1, G + 1) * rows)
    with record(partly=("parts_ptr",)) as launches:
        y = fused_lora_linear(
            x, weight, A, B, scaling=2.0, dropout_p=0.2 if dropped else 0.0, segments=segments,
            impl=f"triton:{strategy}",
        )  # fmt: skip
        y.backward(torch.randn_like(y))
    for launch in launches:
        launch.read_unique.pop("segments_ptr", None)
    product = Product(
        M, K, N, R, dtype.itemsize, adapter_dtype.itemsize, "operand" if dropped else None,
        segments=G, weights=G,
    )  # fmt: skip
    return launches, product


@pytest.mark.parametrize("strategy", ["split", "addmm"])
@pytest.mark.parametrize("case", by_default(SEGMENTED[:2], SEGMENTED), ids=str)
def test_bytes_of_segments_are_the_recorded_ones(case, strategy):
    """A call of the public function, forward and backward, each expert with its own weight."""
    pytest.importorskip("triton")
    launches, product = segmented(case, strategy)
    modelled = schedule.layer(INTERPRETER, product, strategy, strategy)
    # The interpreter's descriptors load whole blocks of P, with rows of the next segment.
    check_launches(launches, modelled, but=("p",))


@pytest.mark.parametrize("strategy", ["split", "addmm"])
def test_the_table_of_experts_counts_the_recorded_bytes(strategy):
    """Of the kernels' launches: all bytes but the frozen product's own."""
    pytest.importorskip("triton")
    G, rows, K, N, R, *_ = case = SEGMENTED[0]
    launches, _ = segmented(case, strategy)
    found = {}
    for at, launch in enumerate(launches):
        name, reads, writes = operands_of(launch)
        own = ("p", "q", "o") if name == "lora_gemm" else ()
        moved = sum(n for operand, n in (*reads.items(), *writes.items()) if operand not in own)
        name = f"{name} for {'y' if at < 2 else 'dx'}"
        found[name] = found.get(name, 0) + moved
    table = experts.Matrices(G, K, N, R, G * rows).segments(strategy)
    torchs = ("cast", "grouped_mm")
    assert found == {name: n for name, n in table.items() if not name.startswith(torchs)}


def test_members_read_their_input_once():
    """Three launches in one: two passes over x less in shrink, and in rank_grad."""
    together = replace(square(4096), members=3)
    for kernel in (traffic.shrink, lambda *args: traffic.rank_grad(*args, scaled=False)):
        saved = 3 * thin(kernel(H100, replace(together, members=1))) - thin(kernel(H100, together))
        assert saved == pytest.approx(2 * TOKENS * 4096 * 2, rel=0.1)


def test_the_activation_spares_the_adapter_its_own_pass():
    """With the low-rank product in it, two passes over dh less than with ``lora_add`` before."""
    case = Product(4096, 4096, 14_336, 16, masked="output", backward=True)
    together = traffic.gated_backward(H100, case)
    apart = traffic.gated_backward(H100, replace(case, R=0, masked=None))
    added = traffic.lora_add(H100, case)
    one_pass = case.M * case.N * 2
    assert apart.thin_bytes == 6 * one_pass
    assert added.thin_bytes + apart.thin_bytes - together.thin_bytes == 2 * one_pass


@pytest.mark.parametrize(("rank", "most"), [(16, 80e6), (64, 110e6)])
def test_a_gradient_of_the_adapter_loads_little_more_than_its_operand(rank, most):
    """All bytes that the SMs of an H100 load and store for dA; P alone is 67 MB."""
    case = Product(8192, 4096, 4096, rank, masked="operand")
    (kernel,) = traffic.rank_grad(H100, case, scaled=False)
    assert sum(kernel.loads.values()) + sum(kernel.writes.values()) + kernel.reads["parts"] <= most


def test_the_recorded_cases_cover_every_kernel():
    """Splits and their sums, the vendor's products for gradients, casts of adapters."""
    names = set()
    for M, K, N, R, dtype, adapter_dtype, strategy, dropped in RECORDED:
        case = Product(M, K, N, R, dtype.itemsize, adapter_dtype.itemsize)
        case = replace(case, masked="operand" if dropped else None)
        names |= {k.name for k in schedule.layer(INTERPRETER, case, strategy, strategy)}
    assert names == {
        "dropout_mask", "shrink", "lora_gemm", "lora_add", "rank_grad",
        "single_pass", "thin_pair", "sum_pair", "zeros", "zero_",
        "mm", "addmm_", "mul", "cast", "copy",
    }  # fmt: skip
