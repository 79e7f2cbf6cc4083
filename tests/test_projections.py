"""Several projections of one input, and the gated MLP, against one call per layer and float64."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import (
    Projection,
    fused_lora_gated_mlp,
    fused_lora_linear,
    fused_lora_projections,
)
from fused_lora.ops import dispatch, dropout, reference, shared_torch
from support import assert_error, by_default, needs_triton, relative_rms

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def projection(
    K, N, R, dtype, *, adapter=None, bias=True, s=2.0, p=0.0, trains=("A", "B")
) -> Projection:
    """A layer with an adapter of rank ``R``; 0 for none. ``trains`` may contain "bias"."""
    weight = (torch.randn(N, K) / K**0.5).to(dtype)
    b = (torch.randn(N) * 0.1).to(dtype).requires_grad_("bias" in trains) if bias else None
    if not R:
        return Projection(weight, bias=b)
    A = (torch.randn(R, K) / K**0.5).to(adapter or dtype).requires_grad_("A" in trains)
    B = (torch.randn(N, R) / R**0.5).to(adapter or dtype).requires_grad_("B" in trains)
    return Projection(weight, A, B, b, s, p)


def mixture(K, dtype, p, adapter=None) -> list[Projection]:
    """Different ranks, scales, dropouts, biases; frozen halves; one without an adapter."""
    wide = {"adapter": adapter}
    return [
        projection(K, 64, 8, dtype, p=p, **wide),
        projection(K, 32, 12, dtype, s=torch.tensor(0.5), bias=False, **wide),
        projection(K, 32, 0, dtype, trains=("bias",)),
        projection(K, 40, 4, dtype, p=p, trains=("B", "bias"), **wide),
        projection(K, 40, 5, dtype, s=0.3, trains=("A",), **wide),
    ]


def mlp_layers(K, hidden, dtype, p, adapter=None) -> list[Projection]:
    wide = {"adapter": adapter}
    return [
        projection(K, hidden, 8, dtype, p=p, **wide),
        projection(K, hidden, 12, dtype, s=torch.tensor(0.5), trains=("A", "B", "bias"), **wide),
        projection(hidden, K, 4, dtype, p=p, trains=("A", "B", "bias"), **wide),
    ]


def leaves(x, layers) -> dict[str, torch.Tensor]:
    named = {"x": x} | {
        f"{name} {i}": getattr(layer, name)
        for i, layer in enumerate(layers)
        for name in ("lora_A", "lora_B", "bias")
    }
    return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def one_by_one(x, layers, impl="auto") -> tuple:
    def one(layer):
        if layer.lora_A is None:
            return torch.nn.functional.linear(x, layer.weight, layer.bias)
        weight, A, B, bias, s, p = layer
        return fused_lora_linear(x, weight, A, B, bias, scaling=s, dropout_p=p, impl=impl)

    return tuple(one(layer) for layer in layers)


def block(x, layers, activation="silu", impl="auto") -> tuple:
    return (fused_lora_gated_mlp(x, *layers, activation, impl=impl),)


def block_by_layers(x, layers, activation="silu", impl="auto") -> tuple:
    gate, up = one_by_one(x, layers[:2], impl)
    return one_by_one(ACTIVATIONS[activation](gate) * up, layers[2:], impl)


def results(function, x, layers, seed=5, **options) -> dict[str, torch.Tensor]:
    """Outputs and gradients, by name."""
    torch.manual_seed(seed)
    outputs = function(x, layers, **options)
    torch.manual_seed(6)
    pairs = [(y, torch.randn(y.shape).to(y.dtype)) for y in outputs if y.requires_grad]
    wanted = leaves(x, layers)
    for t in wanted.values():
        t.grad = None
    # Not autograd.grad, which reentrant checkpoints refuse.
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    grads = [t.grad for t in wanted.values()]
    named = {f"y {i}": y.detach() for i, y in enumerate(outputs)}
    return named | dict(zip((f"d {name}" for name in wanted), grads, strict=True))


def in_float64(x, layers) -> tuple:
    def wide(t):
        return t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t

    return wide(x), [Projection(*map(wide, layer)) for layer in layers]


FORMS = {
    "projections": (fused_lora_projections, one_by_one, mixture),
    "mlp": (block, block_by_layers, lambda K, *rest: mlp_layers(K, 104, *rest)),
}
IMPLEMENTATIONS = ["triton", "triton:split", "triton:seeded", "triton:addmm"]
DTYPES = [(FP32, None), (FP64, None), (BF16, FP32), (BF16, None), (FP16, FP32)]


def forms(argument="form"):
    return pytest.mark.parametrize(argument, FORMS.values(), ids=list(FORMS))


@forms()
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_equals_one_call_per_layer(dtypes, p, needs_x, form):
    """Outputs, gradients, dtypes and masks; the error of both is measured against float64."""
    (dtype, adapter), (fused, alone, make) = dtypes, form
    x = torch.randn(2, 24, 72).to(dtype).requires_grad_(needs_x)
    layers = make(72, dtype, p, adapter)
    got, separate = results(fused, x, layers), results(alone, x, layers)
    assert got.keys() == separate.keys()
    exact = results(alone, *in_float64(x, layers))  # the same seeds, so the same masks
    for name, value in got.items():
        assert value.dtype == separate[name].dtype, name
        assert value.shape == separate[name].shape, name
        if dtype in (FP32, FP64):
            bound = 1e-6 if dtype == FP32 else 1e-14
        else:
            bound = 2 * relative_rms(separate[name], exact[name])
        # FP64 is exact up to rounding; a wrong mask would be off by 0.3.
        assert relative_rms(value, exact[name]) <= bound, name


@forms()
@pytest.mark.parametrize("dtypes", [(BF16, FP32), (BF16, None), (FP16, None)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_error_is_at_most_twice_eagers(p, dtypes, form):
    (dtype, adapter), (fused, alone, make) = dtypes, form
    x = torch.randn(96, 72).to(dtype).requires_grad_()
    layers = make(72, dtype, p, adapter)
    exact = results(alone, *in_float64(x, layers))
    got = results(fused, x, layers)
    eager = results(alone, x, layers, impl="reference")
    for name, value in got.items():
        bound = 2 * relative_rms(eager[name], exact[name])
        assert relative_rms(value, exact[name]) <= bound, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_activations(dtype, activation):
    x = torch.randn(40, 72).to(dtype).requires_grad_()
    layers = mlp_layers(72, 104, dtype, 0.3)
    got = results(block, x, layers, activation=activation)
    exact = results(block_by_layers, *in_float64(x, layers), activation=activation)
    eager = results(block_by_layers, x, layers, activation=activation, impl="reference")
    for name, value in got.items():
        bound = 1e-6 if dtype == FP32 else 2 * relative_rms(eager[name], exact[name])
        assert relative_rms(value, exact[name]) <= bound, name


@needs_triton
@forms()
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", by_default(["triton:seeded"], IMPLEMENTATIONS))
def test_kernels(impl, dtype, form):
    """Interpreted; the masks are those of PyTorch's path."""
    fused, alone, make = form
    x = torch.randn(40, 72).to(dtype).requires_grad_()
    layers = make(72, dtype, 0.3)
    got = results(fused, x, layers, impl=impl)
    exact = results(alone, *in_float64(x, layers))
    eager = results(alone, x, layers, impl="reference")
    for name, value in got.items():
        bound = 1e-6 if dtype == FP32 else 2 * relative_rms(eager[name], exact[name])
        assert_error(name, relative_rms(value, exact[name]), bound, dtype)


@forms()
@pytest.mark.parametrize("p", by_default([0.3], [0.0, 0.3]))
def test_second_derivatives(p, form):
    fused, _, make = form
    x = torch.randn(4, 5, dtype=FP64, requires_grad=True)
    if make is mixture:
        layers = [
            projection(5, 4, 2, FP64, p=p, trains=("A", "B", "bias")),
            projection(5, 3, 3, FP64, p=p, trains=("B",)),
            projection(5, 3, 0, FP64),
        ]
    else:
        layers = [
            projection(5, 6, 2, FP64, p=p, trains=("A", "B", "bias")),
            projection(5, 6, 3, FP64, p=p),
            projection(6, 5, 2, FP64, p=p),
        ]
    names = leaves(x, layers)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        replaced = [
            layer._replace(
                **{
                    name: given[f"{name} {i}"]
                    for name in ("lora_A", "lora_B", "bias")
                    if f"{name} {i}" in given
                }
            )
            for i, layer in enumerate(layers)
        ]
        torch.manual_seed(1)
        return fused(given["x"], replaced)

    assert torch.autograd.gradcheck(function, list(names.values()))
    assert torch.autograd.gradgradcheck(function, list(names.values()))


def test_second_derivatives_of_a_shared_layer():
    """``x`` depends on the same parameters: they are not counted twice."""
    layers = mlp_layers(12, 16, FP64, 0.0)
    x = torch.randn(40, 12, dtype=FP64, requires_grad=True)
    A = layers[0].lora_A
    grads = []
    for function in (block, block_by_layers):
        (y,) = function(function(x, layers)[0], layers)
        once = torch.autograd.grad(y.square().sum(), A, retain_graph=True)[0]
        twice = torch.autograd.grad(y.square().sum(), A, create_graph=True)[0]
        torch.testing.assert_close(twice, once)
        grads.append(torch.autograd.grad(twice.square().sum(), A)[0])
    torch.testing.assert_close(*grads)


def test_one_backward_after_the_other():
    """Of an input that needs no gradient, as layers alone allow it: heads with their own losses."""
    x = torch.randn(40, 72)
    layers = [projection(72, 16, 4, FP32, p=p) for p in (0.0, 0.3, 0.0)]
    for order in ((0, 1, 2), (2, 0, 1)):
        outputs = fused_lora_projections(x, layers)
        for i in order:
            outputs[i].sum().backward()
    assert all(layer.lora_A.grad is not None for layer in layers)


@forms()
def test_kept_graph_runs_twice(form):
    """Nothing that a second backward reads is overwritten in the first."""
    fused, _, make = form
    x = torch.randn(40, 72, requires_grad=True)
    layers = make(72, FP32, 0.3)
    outputs = fused(x, layers)
    wanted = list(leaves(x, layers).values())
    loss = sum(y.square().sum() for y in outputs)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), first, rtol=0, atol=0)


@forms()
def test_batched_gradients(form):
    fused, _, make = form
    x = torch.randn(40, 72, requires_grad=True)
    layers = make(72, FP32, 0.3)
    y = fused(x, layers)[0]
    dys = torch.randn(3, *y.shape)
    wanted = [x, layers[0].lora_A, layers[0].lora_B]
    batched = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        alone = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for several, one in zip(batched, alone, strict=True):
            assert relative_rms(several[i], one) < 1e-6


@forms()
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(p, form):
    """x is cast once; the results are those of one call per layer under autocast."""
    fused, alone, make = form
    x = torch.randn(2, 24, 72, requires_grad=True)
    layers = make(72, FP32, p)
    with torch.autocast("cpu", BF16):
        got, separate = results(fused, x, layers), results(alone, x, layers)
        exact = results(alone, *in_float64(x, layers))
    for name, value in got.items():
        assert value.dtype == separate[name].dtype, name
        error = relative_rms(separate[name], exact[name])
        assert relative_rms(value, exact[name]) <= 2 * error, name


def kept(function) -> int:
    """Bytes that autograd keeps for backward of a call, each storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(storages.values())


def test_autocast_keeps_one_cast_of_x():
    x = torch.randn(256, 72, requires_grad=True)
    layers = [projection(72, 8, 2, FP32) for _ in range(3)]
    with torch.autocast("cpu", BF16):
        fused, alone = (
            kept(lambda f=f: f(x, layers)) for f in (fused_lora_projections, one_by_one)
        )
    cast = 256 * 72 * 2
    assert alone >= 3 * cast
    assert fused < 2 * cast


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_mlp_keeps_two_matrices_of_the_hidden_size(p):
    rows, hidden = 256, 512
    x = torch.randn(rows, 16, requires_grad=True)
    layers = mlp_layers(16, hidden, FP32, p)
    parameters = sum(
        t.untyped_storage().nbytes() for layer in layers for t in layer[:4] if t is not None
    )
    one = rows * hidden * 4
    fused, alone = (kept(lambda f=f: f(x, layers)) - parameters for f in (block, block_by_layers))
    assert 2 * one <= fused < 2.4 * one
    assert alone >= 4 * one


def test_no_product_for_an_input_that_needs_no_gradient():
    """Neither does the chain's alias of ``x``."""
    layers = [projection(72, 64, 4, FP32) for _ in range(3)]
    outputs = fused_lora_projections(torch.randn(40, 72), layers)
    with torch.profiler.profile() as profile:
        torch.autograd.grad([y.sum() for y in outputs], [p.lora_A for p in layers])
    products = [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm")]
    assert len(products) == 9  # G, dA and dB of each layer, none with a weight


@forms()
def test_outputs_can_be_changed_in_place(form):
    fused, alone, make = form
    for shape in ((40, 72), (2, 20, 72)):
        x = torch.randn(shape, requires_grad=True)
        layers = make(72, FP32, 0.0)
        expected = results(lambda x, ls: tuple(2 * y for y in alone(x, ls)), x, layers)
        got = results(lambda x, ls: tuple(y.mul_(2) for y in fused(x, ls)), x, layers)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_gradients_of_one_output_only():
    """Others get none, as if their layers had not run."""
    x = torch.randn(40, 72, requires_grad=True)
    layers = [projection(72, 16, 4, FP32, p=p) for p in (0.0, 0.3, 0.0)]
    torch.manual_seed(0)
    outputs = fused_lora_projections(x, layers)
    torch.manual_seed(0)
    expected = one_by_one(x, layers)
    for i in range(3):
        wanted = [x, *(t for layer in layers for t in (layer.lora_A, layer.lora_B))]
        keep = {"retain_graph": True, "allow_unused": True}
        got = torch.autograd.grad(outputs[i].sum(), wanted, **keep)
        alone = torch.autograd.grad(expected[i].sum(), wanted, **keep)
        for a, b in zip(got, alone, strict=True):
            assert (a is None) == (b is None)
            assert a is None or relative_rms(a, b) < 1e-6


@forms()
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, form):
    fused, _, make = form
    x = torch.randn(40, 72, requires_grad=True)
    layers = make(72, FP32, 0.3)
    got = results(
        lambda x, ls: checkpoint(lambda x: fused(x, ls), x, use_reentrant=reentrant), x, layers
    )
    expected = results(fused, x, layers)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@forms()
def test_compiled(form):
    fused, _, make = form
    x = torch.randn(40, 72, requires_grad=True)
    layers = make(72, FP32, 0.0)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    got, expected = results(compiled, x, layers), results(fused, x, layers)
    for name, value in got.items():
        assert relative_rms(value, expected[name]) < 1e-6, name


@forms()
def test_vmap_and_forward_mode(form):
    fused, alone, make = form
    layers = make(72, FP32, 0.0)
    x = torch.randn(3, 40, 72)
    batched = torch.func.vmap(lambda x: fused(x, layers)[0])(x)
    torch.testing.assert_close(batched, fused(x, layers)[0], rtol=1e-4, atol=1e-5)
    t = torch.randn(40, 72)
    got, expected = (
        torch.func.jvp(lambda x, f=f: f(x, layers)[0], (x[0],), (t,))[1] for f in (fused, alone)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@forms()
def test_flops_are_those_of_single_layers(form):
    fused, alone, make = form
    layers = make(72, FP32, 0.0)
    x = torch.randn(40, 72, requires_grad=True)
    counts = []
    for function in (fused, alone):
        with FlopCounterMode(display=False) as counter:
            sum(y.sum() for y in function(x, layers)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@forms()
@pytest.mark.parametrize("shape", [(0, 72), (72,), (1, 72), (1, 1, 72), (3, 0, 72)], ids=str)
def test_any_shape(shape, form):
    fused, alone, make = form
    x = torch.randn(shape, requires_grad=True)
    layers = make(72, FP32, 0.3)
    got, expected = results(fused, x, layers), results(alone, x, layers)
    for name, value in got.items():
        assert value.shape == expected[name].shape
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("sizes", [(0, 8, 4), (4, 0, 4), (4, 8, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_mlp_of_empty_layers(p, sizes, impl):
    inputs, hidden, outputs = sizes
    sides = ((hidden, inputs), (hidden, inputs), (outputs, hidden))
    layers = [
        Projection(
            torch.ones(N, K),
            torch.ones(2, K, requires_grad=True),
            torch.ones(N, 2, requires_grad=True),
            dropout_p=p,
        )
        for N, K in sides
    ]
    x = torch.randn(40, inputs, requires_grad=True)
    got = results(block, x, layers, impl=impl)
    expected = results(block_by_layers, x, layers, impl="torch")
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name])


@forms()
def test_every_layer_runs_its_own_strategy(form, monkeypatch):
    ran = []

    class Runner:
        def __init__(self, weight):
            self.rows = len(weight)

        def __getattr__(self, name):
            return getattr(shared_torch, name)

        def expand(self, x, weight, *rest):
            ran.append((self.rows, len(weight)))
            return shared_torch.expand(x, weight, *rest)

        def thin_gradients(self, dy, lora_B, *rest):
            ran.append((self.rows, len(lora_B)))
            return shared_torch.thin_gradients(dy, lora_B, *rest)

    monkeypatch.setattr(dispatch, "choose", lambda x, weight, *rest: Runner(weight))
    fused, *_ = form
    layers = [projection(72, 96, 4, FP32), projection(72, 96, 4, FP32), projection(96, 72, 4, FP32)]
    if fused is fused_lora_projections:
        layers[2] = projection(72, 40, 4, FP32)
    results(fused, torch.randn(40, 72), layers)
    assert len(ran) == 6
    assert all(runner == layer for runner, layer in ran)


@forms()
def test_strided_inputs(form):
    fused, alone, make = form
    layers = make(72, FP32, 0.3)
    for x in (
        torch.randn(72, 40).t(),
        torch.randn(40, 80)[:, :72],
        torch.randn(1, 72).expand(40, 72),
    ):
        x = x.requires_grad_()
        got, expected = results(fused, x, layers), results(alone, x, layers)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@forms()
def test_evaluation_drops_nothing(form):
    fused, _, make = form
    x = torch.randn(40, 72)
    layers = make(72, FP32, 0.3)
    plain = [layer._replace(dropout_p=0.0) for layer in layers]
    function = fused_lora_projections if fused is fused_lora_projections else fused_lora_gated_mlp
    args = (layers,) if fused is fused_lora_projections else layers
    got = function(x, *args, training=False)
    got = got if isinstance(got, tuple) else (got,)
    torch.testing.assert_close(got, fused(x, plain), rtol=0, atol=0)


def test_masks_are_drawn_in_order():
    """Those of the reference for the seeds that one call per layer draws."""
    x = torch.randn(40, 72)
    layers = [projection(72, 16, 4, FP32, p=0.3) for _ in range(3)]
    torch.manual_seed(3)
    seeds = [dropout.draw_seed(x.device) for _ in layers]
    torch.manual_seed(3)
    outputs = fused_lora_projections(x, layers)
    count = dropout.keep_count(0.3)
    for y, layer, seed in zip(outputs, layers, seeds, strict=True):
        bits = dropout.make_keep_bits(seed, 40, 72, count)
        mask = dropout.keep_mask(bits, 72, FP32) * (dropout.KEEP_ALL / count)
        expected = reference.projection(x, layer, mask)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def bad_projections():
    x, good = torch.randn(40, 72), projection(72, 16, 4, FP32)
    trainable = good._replace(weight=good.weight.clone().requires_grad_())
    yield x, [], "at least one projection"
    yield x, good, "expected a sequence of Projection, got Projection"
    yield x, [good, (1, 2)], "projection 1: expected a Projection, got tuple"
    yield x, [good, good._replace(lora_B=None)], "projection 1: .*got no lora_B"
    yield x, [projection(70, 16, 4, FP32)], "projection 0: expected x of shape (..., 70)"
    yield x, [projection(70, 16, 0, FP32)], "projection 0: expected x of shape (..., 70)"
    yield x, [good, trainable], "projection 1: expected a frozen weight"
    yield x, [good._replace(dropout_p=1.0)], "projection 0: expected dropout in [0, 1)"
    yield x, [good._replace(bias=torch.zeros(3))], "projection 0: expected bias of shape (16,)"
    yield x.to(BF16), [good], "expected x in the weight's dtype"
    yield "x", [good], "projection 0: expected x to be a Tensor, got str"


@pytest.mark.parametrize("case", list(bad_projections()), ids=lambda case: case[2])
def test_wrong_projections(case):
    x, layers, message = case
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises((TypeError, ValueError), match=pattern):
        fused_lora_projections(x, layers)


def bad_mlps():
    x = torch.randn(40, 72)
    gate, up, down = (projection(*s, 4, FP32) for s in ((72, 104), (72, 104), (104, 72)))
    yield (x, gate, up, down, "tanh"), "expected activation to be one of silu, gelu"
    yield (x, gate, projection(72, 96, 4, FP32), down), "expected up's weight of shape (104, in)"
    yield (x, gate, up, projection(96, 72, 4, FP32)), "down: expected x of shape (..., 96)"
    yield (x, gate, up, None), "down: expected a Projection, got NoneType"
    yield (x, gate, up, down._replace(lora_A=None)), "down: expected lora_A and lora_B, or neither"


@pytest.mark.parametrize("case", list(bad_mlps()), ids=lambda case: case[1])
def test_wrong_mlps(case):
    args, message = case
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fused_lora_gated_mlp(*args)


@pytest.mark.parametrize("impl", ["triton:single_pass", "tritn"])
def test_an_implementation_that_cannot_run(impl):
    x = torch.randn(40, 72, dtype=FP64)
    with pytest.raises(ValueError, match="impl"):
        fused_lora_projections(x, [projection(72, 16, 4, FP64)], impl=impl)
