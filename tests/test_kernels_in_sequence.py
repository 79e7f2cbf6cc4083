"""Sequences of kernels (strategies, layers of one input) under the interpreter, against float64."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import (
    BF16,
    FP16,
    FP32,
    INV_KEEP,
    KEEP,
    SCALE,
    check,
    gated_in_float64,
    rand,
    random_keep_bits,
)

from fused_lora.kernels import shared_input, strategies
from fused_lora.kernels.operands import BackwardOperands, ForwardOperands
from fused_lora.ops import dropout
from support import UNIT_ROUNDOFF, assert_error, make_inputs, relative_rms

# M, K, dtype, members: rank, adapter's dtype, keep count (None: no dropout), has a gradient
SHARED = [
    (63, 136, BF16, [(16, FP32, KEEP, True), (16, FP32, KEEP, True), (16, FP32, KEEP, True)]),
    (300, 123, BF16, [(8, FP32, KEEP, True), (3, BF16, KEEP, True), (20, FP32, None, True)]),
    (17, 96, FP16, [(5, FP16, KEEP, True), (5, FP16, 60_000, True), (7, FP16, KEEP, True)]),
    (40, 65, FP32, [(1, FP32, None, True), (300, FP32, None, True)]),
    (520, 128, BF16, [(16, BF16, KEEP, True), (16, BF16, KEEP, False), (8, BF16, KEEP, True)]),
    (33, 64, BF16, [(4, FP32, None, False), (16, FP32, None, True), (8, BF16, None, True)]),
    (65, 128, BF16, [(24, FP32, KEEP, True)]),
    (70, 72, FP16, [(8, FP32, KEEP, False), (8, FP16, None, False)]),
]


def shared_case(M, K, dtype, members):
    """The members' operands: x, adapters, seeds, keep counts, float64 masks, G."""
    x = rand(M, K, dtype=dtype)
    adapters = [(rand(R, K) / K**0.5).to(adapter) for R, adapter, *_ in members]
    keeps = [keep for _, _, keep, _ in members]
    seeds = [None if keep is None else torch.tensor(77 + i) for i, keep in enumerate(keeps)]
    bits = [
        None if seed is None else dropout.make_keep_bits(seed, M, K, keep)
        for seed, keep in zip(seeds, keeps, strict=True)
    ]
    masks = [
        1.0 if bit is None else dropout.keep_mask(bit, K, torch.float64) * (dropout.KEEP_ALL / keep)
        for bit, keep in zip(bits, keeps, strict=True)
    ]
    G = [rand(M, R, dtype=dtype) if present else None for R, _, _, present in members]
    return x, adapters, seeds, keeps, bits, masks, G


@pytest.mark.parametrize("case", SHARED, ids=lambda case: str(case).replace("torch.", ""))
def test_thin_products_of_a_shared_input(case):
    """Mixtures of ranks, dtypes, masks and missing gradients, against float64 and bit by bit."""
    dtype, members = case[2:]
    x, adapters, seeds, keeps, bits, masks, G = shared_case(*case)
    counts = [keep or dropout.KEEP_ALL for keep in keeps]
    S, keep_bits = shared_input.shrink_shared(x, adapters, seeds, counts)
    again, _ = shared_input.shrink_shared(x, adapters, seeds, counts, SCALE)
    for i, (A, mask) in enumerate(zip(adapters, masks, strict=True)):
        assert (keep_bits[i] is None) == (bits[i] is None)
        assert bits[i] is None or torch.equal(keep_bits[i], bits[i])
        assert S[i].shape == (x.shape[0], A.shape[0])
        assert S[i].dtype == dtype
        check(S[i], (x.double() * mask) @ A.to(dtype).double().t(), dtype)
        assert torch.equal(S[i], again[i])
    inv_keeps = [dropout.KEEP_ALL / count for count in counts]
    needs = [i != 1 or len(members) != 3 for i in range(len(members))]
    base = rand(*x.shape, dtype=dtype)
    dx, expected = base.clone(), base.double()
    operands = adapters, G, keep_bits, inv_keeps, needs
    dA = shared_input.input_gradients(x, dx, *operands)
    for A, g, mask, needed, gradient in zip(adapters, G, masks, needs, dA, strict=True):
        assert (gradient is not None) == (needed and g is not None)
        if g is not None:
            expected += (g.double() @ A.to(dtype).double()) * mask
        if gradient is not None:
            assert (gradient.shape, gradient.dtype) == (A.shape, A.dtype)
            check(gradient, g.double().t() @ (x.double() * mask), A.dtype)
    # One rounding of dx for each kind of member.
    bound = 2 * len(set(keeps)) * UNIT_ROUNDOFF[dtype] + 4 * UNIT_ROUNDOFF[FP32]
    assert_error("dx", relative_rms(dx, expected), bound, dtype)
    copied = [None if bit is None else bit.clone() for bit in keep_bits]
    repeated = base.clone()
    shared_input.input_gradients(
        None, repeated, adapters, G, copied, inv_keeps, [False] * len(members)
    )
    assert torch.equal(repeated, dx)
    only = shared_input.input_gradients(x, None, *operands)
    for one, two in zip(only, dA, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("case", [(300, 520, 16, BF16), (33, 65, 5, FP32), (17, 96, 100, FP16)])
def test_thin_gradients(case, needs):
    M, N, R, dtype = case
    dy, B, S = rand(M, N, dtype=dtype), rand(N, R), rand(M, 2 * R, dtype=dtype)[:, R:]
    G, dB = shared_input.thin_gradients(dy, B, S if needs[1] else None, SCALE, needs)
    assert (G is not None, dB is not None) == needs
    if G is not None:
        assert G.dtype == dtype
        check(G, 0.7 * dy.double() @ B.to(dtype).double(), dtype)
    if dB is not None:
        check(dB, 0.7 * dy.double().t() @ S.double(), FP32)


@pytest.mark.parametrize("strategy", ["split", "seeded", "addmm", "single_pass"])
def test_expand_is_the_rest_of_the_forward(strategy):
    """With the S of a group; *single_pass* as *split*."""
    inputs = make_inputs(40, 72, 48, 8, BF16, FP32, scaling=SCALE)
    operands = ForwardOperands(*inputs.values())
    S, _ = shared_input.shrink_shared(operands.x, [operands.lora_A], [None], [0])
    y, own = strategies.forward(operands, "split" if strategy == "single_pass" else strategy)
    assert torch.equal(S[0], own)
    assert torch.equal(shared_input.expand(operands, strategy, S[0]), y)
    based = operands._replace(weight=None, bias=None, base=rand(40, 48))
    expected, _ = strategies.forward(based, strategy)
    assert torch.equal(shared_input.expand(based, strategy, S[0]), expected)


# M, I, R, dtype, adapter dtype, masked
GATED_MLP = [
    (63, 136, 16, BF16, FP32, True),
    (40, 65, 5, FP32, FP32, False),
    (33, 80, 0, FP16, None, 0),
]


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("case", GATED_MLP, ids=str)
def test_the_activation_of_a_gated_mlp(case, reuse):
    M, N, R, dtype, adapter, masked = case
    gate, up = rand(M, 2 * N, dtype=dtype).split(N, dim=1)
    dh = rand(N, M, dtype=dtype).t()  # not by rows
    keep_bits, mask = random_keep_bits(M, N) if masked else (None, 1.0)
    G, A = (rand(M, R, dtype=dtype), rand(R, N, dtype=adapter)) if R else (None, None)
    whole = dh.double() + (G.double() @ A.to(dtype).double() * mask if R else 0)
    h, *gradients = gated_in_float64(gate, up, whole, "silu")
    check(shared_input.gated(gate, up, "silu"), h, dtype)
    before = gate.clone()
    inv_keep = INV_KEEP if masked else 1.0
    results = shared_input.gated_backward(gate, up, dh, "silu", G, A, keep_bits, inv_keep, reuse)
    for result, expected in zip(results, (*gradients, h), strict=True):
        check(result, expected, dtype)
    assert torch.equal(gate, before) != reuse
    assert (results[0].data_ptr() == gate.data_ptr()) == reuse


def test_what_a_descriptor_can_address():
    flat = torch.zeros(16 * 64 + 16, dtype=BF16)  # PyTorch aligns storages to 64 bytes
    aligned = flat[: 16 * 64].view(16, 64)
    assert strategies.is_describable(aligned)
    assert strategies.is_describable(aligned.t())
    assert strategies.is_describable(aligned[:, :60])  # rows are still 16-byte aligned
    assert not strategies.is_describable(flat[1 : 1 + 16 * 64].view(16, 64))  # starts at 2 bytes
    assert not strategies.is_describable(flat[: 16 * 60].view(16, 60))  # a pitch of 120 bytes
    assert not strategies.is_describable(aligned[:1].expand(16, 64))  # all rows overlap
    assert not strategies.is_describable(aligned[:, ::2])


@pytest.mark.parametrize("how", ["split", "single_pass", "seeded", "addmm"])
def test_the_thin_product_has_the_dtype_of_x(how):
    inputs = make_inputs(17, 40, 24, 5, BF16)
    inputs["scaling"] = torch.tensor(inputs["scaling"])
    y, S = strategies.forward(ForwardOperands(**inputs), how)
    assert (y.dtype, S.dtype, S.shape) == (BF16, BF16, (17, 5))
    assert S.stride(0) * 2 % 16 == 0  # rows start on 16-byte vectors


def test_gradients_of_the_adapter_beside_dx(monkeypatch):
    """With a stream of their own they start after G, and the current stream waits for them."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    def named(name):
        run = getattr(strategies, name)
        return lambda *args, **options: (events.append(name), run(*args, **options))[1]

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("run_shrink", "run_thin_pair", "_input_gradient", "_adapter_gradients"):
        monkeypatch.setattr(strategies, name, named(name))
    for R in (4, 16):  # with these, one pass over dY and two
        x, dy, S = rand(40, 32, dtype=BF16), rand(40, 64, dtype=BF16), rand(40, R, dtype=BF16)
        weight, A, B = rand(64, 32, dtype=BF16), rand(R, 32, dtype=BF16), rand(64, R, dtype=BF16)
        operands = BackwardOperands(dy, x, weight, A, B, S, SCALE)
        expected = strategies.backward(operands, "seeded")
        events.clear()
        got = strategies.backward(operands, "seeded", side)
        assert all(map(torch.equal, got, expected))
        assert ("run_shrink" in events) == (R == 16)
        assert events[-4:] == [
            "side waits for main",
            "_adapter_gradients",
            "_input_gradient",
            "main waits for side",
        ]
