"""The mask: the same in forward and backward, right rate, unbiased, drawn from the generator."""

import importlib.util

import pytest
import torch

from fused_lora import FusedLoRALinear, explain, fused_lora_linear
from fused_lora.ops import dropout
from support import make_inputs, needs_triton, run

FP32 = torch.float32

needs_numpy = pytest.mark.skipif(not dropout._has_numpy(), reason="needs NumPy")

IMPLS = ["torch", "reference", *(["triton"] if importlib.util.find_spec("triton") else [])]
CPU = torch.device("cpu")


def identity_layer(n: int):
    """W = 0 and A = B = I, so that y and each gradient show the mask that they used."""
    return {
        "weight": torch.zeros(n, n),
        "lora_A": torch.eye(n, requires_grad=True),
        "lora_B": torch.eye(n, requires_grad=True),
    }


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_and_both_gradients_use_one_mask(impl):
    n = 70
    tensors = identity_layer(n)
    x = torch.ones(n, n, requires_grad=True)
    y = fused_lora_linear(x, **tensors, dropout_p=0.3, impl=impl)
    mask = y.detach()
    keep = dropout.KEEP_ALL / dropout.keep_count(0.3)
    assert mask.unique().tolist() == [0.0, pytest.approx(keep, rel=1e-6)]
    # With dY = I, dA is the mask itself and dx its diagonal.
    dx, dA = torch.autograd.grad(y, (x, tensors["lora_A"]), torch.eye(n))
    torch.testing.assert_close(dx, torch.diag(mask.diagonal()))
    torch.testing.assert_close(dA, mask)


def test_every_implementation_drops_the_same_entries():
    x = torch.ones(33, 70)
    outputs = []
    for impl in IMPLS:
        torch.manual_seed(9)
        outputs.append(fused_lora_linear(x, **identity_layer(70), dropout_p=0.4, impl=impl))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_changes_from_call_to_call_and_repeats_under_a_seed(impl):
    def draw():
        return fused_lora_linear(torch.ones(8, 70), **identity_layer(70), dropout_p=0.5, impl=impl)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    """Kept entries overall, per column and per row are within five deviations of a binomial."""
    rows, columns = 512, 2048
    keep = dropout.keep_count(p)
    assert keep / dropout.KEEP_ALL == pytest.approx(1 - p, abs=2.0**-17)
    keep_bits = dropout.make_keep_bits(dropout.draw_seed(CPU), rows, columns, keep)
    mask = dropout.keep_mask(keep_bits, columns, torch.float64)
    q = keep / dropout.KEEP_ALL
    for count, trials in (
        (mask.sum(), mask.numel()),
        (mask.sum(0), rows),
        (mask.sum(1), columns),
    ):
        deviation = (count - trials * q).abs() / (trials * q * (1 - q)) ** 0.5
        # Few expected drops are Poisson: skewed, so the bound is a little wider.
        assert deviation.max() < (5 if trials * (1 - q) > 20 else 8)


def test_bits_are_independent_of_their_neighbours_and_of_the_next_seed():
    keep = dropout.keep_count(0.5)
    first, second = (
        dropout.keep_mask(
            dropout.make_keep_bits(torch.tensor(s), 512, 1024, keep), 1024, torch.float
        )
        for s in (1, 2)
    )
    a = 2 * first - 1
    n = a.numel() ** 0.5
    for other in (
        2 * second - 1,
        a.roll(1, 0),
        a.roll(1, 1),
        a.roll(64, 1),
        a.roll((1, 32), (0, 1)),
    ):
        assert (a * other).sum().abs() / n < 4


@needs_numpy
@pytest.mark.parametrize("keep", [1, 2, 3, 1 << 15, dropout.keep_count(0.1), dropout.KEEP_ALL - 1])
def test_numpy_makes_the_same_bits(keep, monkeypatch):
    """For one block and several, whole and partial words, empty masks, seeds of either sign."""
    shapes = [(0, 8), (3, 0), (1, 1), (1, 768), (16, 64), (33, 65), (700, 1000)]
    for value in (0, 1, 2**63 - 2, -1):
        seed = torch.tensor(value)
        by_numpy = [dropout._make_keep_bits_by_numpy(seed, *shape, keep) for shape in shapes]
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "_has_numpy", lambda: False)
            by_torch = [dropout.make_keep_bits(seed, *shape, keep) for shape in shapes]
        for mine, theirs in zip(by_numpy, by_torch, strict=True):
            assert torch.equal(mine, theirs)


@needs_numpy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int16])
def test_numpy_expands_to_the_same_matrix(dtype, monkeypatch):
    for shape in [(0, 8), (3, 0), (1, 1), (16, 64), (33, 129)]:
        keep_bits = dropout.make_keep_bits(torch.tensor(5), *shape, 40_000)
        by_numpy = dropout._keep_mask_by_numpy(keep_bits, shape[1], dtype)
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "_has_numpy", lambda: False)
            by_torch = dropout.keep_mask(keep_bits, shape[1], dtype)
        assert by_numpy.dtype == by_torch.dtype == dtype
        assert torch.equal(by_numpy, by_torch)


@needs_numpy
def test_numpy_makes_small_masks_and_those_of_few_threads(monkeypatch):
    """NumPy computes small masks, and large ones if there are at most two threads."""
    made = []
    real = dropout._make_keep_bits_by_numpy
    monkeypatch.setattr(
        dropout, "_make_keep_bits_by_numpy", lambda *a: made.append(a[1:3]) or real(*a)
    )
    seed, keep = dropout.draw_seed(CPU), dropout.keep_count(0.1)
    for threads, rows, expected in ((2, 2000, 1), (4, 64, 1), (4, 2000, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.clear()
        dropout.make_keep_bits(seed, rows, 768, keep)
        assert len(made) == expected
    made.clear()
    with torch.autocast("cpu"):  # observed: PyTorch's operators are used
        dropout.make_keep_bits(seed, 1, 768, keep)
    assert not made


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_output_is_unbiased(impl):
    """The mean over many draws is the output without dropout, within four standard errors."""
    tensors = {
        "weight": torch.randn(6, 40),
        "lora_A": torch.randn(4, 40),
        "lora_B": torch.randn(6, 4),
    }
    x = torch.randn(1, 40)
    draws = fused_lora_linear(x.expand(20_000, 40), **tensors, dropout_p=0.3, impl=impl)
    expected = fused_lora_linear(x, **tensors, impl=impl)
    error = (draws.mean(0) - expected) / (draws.std(0) / 20_000**0.5)
    assert error.abs().max() < 4


def test_no_dropout_in_eval_mode_and_at_zero():
    layer = FusedLoRALinear(40, 24, rank=4, dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 40)
    state = torch.get_rng_state()
    evaluated = layer.eval()(x)
    layer.train().dropout = 0.0
    assert torch.equal(layer(x), evaluated)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probability_below_the_grid_keeps_everything():
    assert dropout.keep_count(1e-9) == dropout.KEEP_ALL
    assert dropout.keep_count(1 - 1e-9) == 1
    tensors = identity_layer(8)
    y = fused_lora_linear(torch.ones(8, 8), **tensors, dropout_p=1e-9)
    assert torch.equal(y, torch.ones(8, 8))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 129)])
def test_mask_shapes(shape):
    rows, columns = shape
    keep_bits = dropout.make_keep_bits(dropout.draw_seed(CPU), rows, columns, 40_000)
    assert keep_bits.shape == (rows, -(-columns // 128) * 4)
    assert dropout.keep_mask(keep_bits, columns, torch.bfloat16).shape == shape


@needs_triton
@pytest.mark.parametrize("M", [17, 70])  # backward in a single pass, or split
def test_triton_with_dropout_is_the_reference(M):
    """With few rows forward is split and backward a single pass, with the same mask and factor."""
    inputs, dy = make_inputs(M, 80, 72, 8, FP32), torch.randn(M, 72)
    decision = explain(
        inputs["x"], inputs["weight"], inputs["lora_A"], dropout_p=0.3, impl="triton"
    )
    assert (decision.forward, decision.backward) == ("split", "single_pass" if M < 65 else "split")
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(7)
        results.append(
            run(
                lambda impl=impl, **kw: fused_lora_linear(**kw, dropout_p=0.3, impl=impl),
                inputs,
                dy,
            )
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
