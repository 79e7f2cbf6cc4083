"""Public reports about gradients: of computed weights, of partial passes, under checkpoints.

Each test names the report or the page that it comes from.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from models import trained_layer
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import FusedLoRAConv1D, LoRAConv2d, LoRAEmbedding, fused_lora_add
from fused_lora.ops import dropout
from support import by_default

WIDE = torch.float64
X = torch.linspace(-1, 1, 1000, dtype=WIDE).view(25, 40).sin()


def textbook(layer, x, weight, lora_A=None, lora_B=None, bias=None):
    A, B = (
        (layer.lora_A if lora_A is None else lora_A),
        (layer.lora_B if lora_B is None else lora_B),
    )
    low_rank = F.linear(F.linear(x, A), B)
    return F.linear(x, weight, layer.bias if bias is None else bias) + layer.scaling * low_rank


def loss(layer, x, parameters):
    return functional_call(layer, parameters, (x,)).square().sum()


# Computed weights. The API page of torch.func differentiates functional_call with respect to
# a module's parameters: docs.pytorch.org/docs/stable/func.api.html. minLoRA#8 and
# Stability-AI/stable-audio-3#69 are about LoRA with torch.nn.utils.parametrize.


def plain(layer):
    return lambda weight: textbook(layer, X, weight)


def merged(layer):
    layer.merge()
    return lambda weight: F.linear(X, weight, layer.bias)


def disabled(layer):
    layer.enabled = False
    return lambda weight: F.linear(X, weight, layer.bias)


@pytest.mark.parametrize("state", [plain, merged, disabled])
def test_weight_of_functional_call(state):
    layer = trained_layer(dtype=WIDE)
    formula = state(layer)
    weight = layer.weight.detach().mul(2).requires_grad_()
    actual = torch.autograd.grad(loss(layer, X, {"weight": weight}), weight)
    expected = torch.autograd.grad(formula(weight).square().sum(), weight)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        grad(lambda w: loss(layer, X, {"weight": w}))(weight.detach()), expected[0]
    )
    with torch.no_grad():  # nothing to differentiate: the fused product
        y = functional_call(layer, {"weight": weight}, (X,))
    torch.testing.assert_close(y, formula(weight).detach())


def test_weight_of_functional_call_with_dropout():
    """The mask is that of the fused product, and the gradient is the formula's."""
    layer = trained_layer(dtype=WIDE, dropout=0.5)

    def run(weight):
        torch.manual_seed(1)
        return functional_call(layer, {"weight": weight}, (X,))

    torch.manual_seed(1)
    fused = layer(X)
    torch.testing.assert_close(run(layer.weight.detach().requires_grad_()), fused)
    leaf = layer.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (leaf,), fast_mode=True)


def test_weight_of_functional_call_in_dora():
    """``y = g·(x Wᵀ + s·x Aᵀ Bᵀ) + bias`` with a constant ``g``, as DoRA defines its gradient."""
    layer = trained_layer(dtype=WIDE, use_dora=True)
    weight = layer.weight.detach().mul(2).requires_grad_()
    adapted = weight + layer.scaling * layer.lora_B @ layer.lora_A
    gain = (layer.lora_magnitude_vector / adapted.norm(dim=1)).detach()
    y = textbook(layer, X, weight, bias=torch.zeros_like(layer.bias)) * gain + layer.bias
    actual = torch.autograd.grad(loss(layer, X, {"weight": weight}), weight)
    torch.testing.assert_close(actual, torch.autograd.grad(y.square().sum(), weight))


def test_conv1d_conv2d_and_embedding():
    conv1d_class = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = LoRAConv2d.from_conv2d(nn.Conv2d(2, 3, 2, dtype=WIDE), rank=2)
    table = LoRAEmbedding.from_embedding(nn.Embedding(7, 4, dtype=WIDE), rank=2)
    conv1d = FusedLoRAConv1D.from_conv1d(conv1d_class(3, 40).to(WIDE), rank=2)
    inputs = X[:, :32].reshape(25, 2, 4, 4), torch.tensor([1, 2, 2, 6]), X
    for layer, x in zip((conv, table, conv1d), inputs, strict=True):
        for parameter in (layer.lora_A, layer.lora_B):
            nn.init.normal_(parameter)
        names = dict(layer.named_parameters())
        parameters = {name: p.detach() for name, p in names.items()}
        leaves = tuple(p.clone().requires_grad_() for p in parameters.values())
        run = partial(run_with, layer, list(names), x)
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        actual = grad(partial(loss, layer, x))(parameters)
        expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
        torch.testing.assert_close(tuple(actual.values()), expected)


def run_with(layer, names, x, *tensors):
    return functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))


def test_every_parameter_under_transforms():
    """``grad`` over all parameters, ``grad`` around ``vmap``, ``jvp``, and an ensemble."""
    layers = [trained_layer(dtype=WIDE) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.lora_B)
    one = {name: p.detach() for name, p in layers[0].named_parameters()}

    def formula(p):
        y = textbook(layers[0], X, p["weight"], p["lora_A"], p["lora_B"], p["bias"])
        return y.square().sum()

    torch.testing.assert_close(grad(partial(loss, layers[0], X))(one), grad(formula)(one))
    parameters, buffers = stack_module_state(layers)
    stacked = {name: p.detach() for name, p in parameters.items()}
    base = copy.deepcopy(layers[0])

    def ensemble(p):
        run = lambda p, b: functional_call(base, (p, b), (X,)).square().sum()  # noqa: E731
        return vmap(run)(p, buffers).sum()

    expected = grad(lambda p: vmap(formula)(p).sum())(stacked)
    torch.testing.assert_close(grad(ensemble)(stacked), expected)
    weight = one["weight"]
    tangent = jvp(lambda w: functional_call(layers[0], {"weight": w}, (X,)), (weight,), (weight,))
    torch.testing.assert_close(tangent[1], F.linear(X, weight))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0, dtype=WIDE))

    def forward(self, weight):
        return weight * self.factor


PARAMETRIZATIONS = {
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "hook": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parameters_of_a_parametrization(kind):
    layer = trained_layer(dtype=WIDE).eval()
    PARAMETRIZATIONS[kind](layer)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    if kind == "own":  # frozen, as the layer left it
        layer.parametrizations.weight.original.requires_grad_(False)
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert len(named) >= 4
    actual = torch.autograd.grad(layer(X).square().sum(), list(named.values()))
    layer(X)  # a hook computes the weight anew
    y = textbook(layer, X, layer.weight)
    expected = torch.autograd.grad(y.square().sum(), list(named.values()))
    torch.testing.assert_close(actual, expected)


def test_a_trained_weight_parameter_is_still_refused():
    layer = trained_layer()
    layer.weight.requires_grad_()
    for layer.enabled in (True, False):
        with pytest.raises(ValueError, match=r"frozen weight.*weight\.requires_grad_\(False\)"):
            layer(torch.randn(2, 40))


# Partial passes. pytorch#174017: custom autograd Functions are not aware of partial backward pass
# execution; pytorch#56500 asks for the same.


def inputs_of(leaf: bool, layer):
    x = X.clone().requires_grad_()
    return {"x": x if leaf else x * 1, "A": layer.lora_A, "B": layer.lora_B, "b": layer.bias}


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("root", [False, True])
def test_only_wanted_gradients_are_computed(leaf, p, root):
    """No more operations than eager autograd counts, for every subset of the gradients.

    ``root``: the pass starts at the layer's output, as in a pipeline's stages.
    """
    layer = trained_layer(dtype=WIDE, dropout=p)
    layer.bias.requires_grad_()

    def eager(x):
        if p == 0:
            return textbook(layer, x, layer.weight)
        torch.manual_seed(1)
        bits = dropout.make_keep_bits(dropout.draw_seed(x.device), *x.shape, dropout.keep_count(p))
        mask = dropout.keep_mask(bits, 40, WIDE) / (1 - p)
        low_rank = F.linear(F.linear(x * mask, layer.lora_A), layer.lora_B)
        return F.linear(x, layer.weight, layer.bias) + layer.scaling * low_rank

    def fused(x):
        torch.manual_seed(1)
        return layer(x)

    names = ("x", "A", "B", "b")
    for wanted in (set_ for n in range(1, 5) for set_ in combinations(names, n)):
        results, flops = [], []
        for function in (fused, eager):
            tensors = inputs_of(leaf, layer)
            y = function(tensors["x"])
            start = y if root else y.square().sum()
            with FlopCounterMode(display=False) as counter:
                inputs, dy = [tensors[name] for name in wanted], torch.ones_like(start)
                results.append(torch.autograd.grad(start, inputs, dy))
            flops.append(counter.get_total_flops())
        torch.testing.assert_close(*results)
        assert flops[0] <= flops[1], wanted


def test_passes_with_other_inputs_share_a_graph():
    layer = trained_layer(dtype=WIDE)
    tensors = inputs_of(False, layer)
    x, y = tensors["x"], layer(tensors["x"]).square().sum()
    whole = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], retain_graph=True)
    parts = [
        torch.autograd.grad(y, t, retain_graph=True)[0] for t in (x, layer.lora_A, layer.lora_B)
    ]
    torch.testing.assert_close(list(whole), parts, rtol=0, atol=0)
    y.backward(inputs=[layer.lora_B], retain_graph=True)
    assert layer.lora_A.grad is None
    y.backward()
    torch.testing.assert_close(layer.lora_A.grad, whole[1])
    torch.testing.assert_close(layer.lora_B.grad, 2 * whole[2])


@pytest.mark.parametrize("compiled", by_default([False], [False, True]))
def test_an_ordinary_pass(compiled):
    """Compiled autograd runs backward without the engine, in one graph."""
    layer, x = trained_layer(dtype=WIDE), X.clone().requires_grad_()
    wanted = [layer.lora_A, layer.lora_B, x]
    expected = torch.autograd.grad(textbook(layer, x * 1, layer.weight).square().sum(), wanted)
    y = layer(x * 1).square().sum()
    context = nullcontext()
    if compiled:
        from torch._dynamo import compiled_autograd

        context = compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True))
    with context:
        y.backward()
    torch.testing.assert_close([t.grad for t in wanted], list(expected))


def test_second_derivative_after_a_partial_first():
    """``d(dB)/dx`` where the first pass did not want dx; a frozen A still raises."""
    layer = trained_layer(dtype=WIDE)
    x = X.clone().requires_grad_()
    results = []
    for y in (layer(x), textbook(layer, x, layer.weight)):
        dB = torch.autograd.grad(y.square().sum(), layer.lora_B, create_graph=True)[0]
        results.append(torch.autograd.grad(dB.square().sum(), (x, layer.lora_A)))
    torch.testing.assert_close(*results)
    layer.lora_A.requires_grad_(False)
    dB = torch.autograd.grad(layer(x).square().sum(), layer.lora_B, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="expected lora_A to require grad"):
        torch.autograd.grad(dB.sum(), x)


class Inner(torch.autograd.Function):
    """Runs a backward within a backward, and the layer's own by hand."""

    @staticmethod
    def forward(ctx, x, layer):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = layer(ctx.x * 1)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, dy):
        by_hand = ctx.y.grad_fn.apply(dy)[0]
        dx = torch.autograd.grad(ctx.y, ctx.x, dy)[0]
        torch.testing.assert_close(by_hand, dx)
        return dx, None


@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_within_passes(reentrant):
    layer = trained_layer(dtype=WIDE)
    expected = torch.autograd.grad(layer(x := X.clone().requires_grad_()).square().sum(), x)
    for run in (
        lambda x: Inner.apply(x * 1, layer),
        lambda x: checkpoint(layer, x * 1, use_reentrant=reentrant),
    ):
        x.grad = None
        run(x).square().sum().backward()
        torch.testing.assert_close(x.grad, expected[0])


# Checkpoints. pytorch#148023: a dispatch mode that is active only in the forward, or only in
# backward, is not restored while a checkpoint is recomputed.


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Seeing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def comm_debug():
    return pytest.importorskip("torch.distributed.tensor.debug").CommDebugMode()


MODES = {
    "none": nullcontext,
    "dispatch": Passing,
    "function": Seeing,
    "comm": comm_debug,
    "flops": partial(FlopCounterMode, display=False),
}
ONE_SIDE = [(a, b) for a in MODES for b in MODES if a != b]


@pytest.mark.parametrize(
    "modes", by_default([("none", "dispatch"), ("comm", "none"), ("flops", "comm")], ONE_SIDE)
)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B"])
def test_a_mode_on_one_side_of_a_checkpoint(modes, p, frozen):
    """The same tensors are saved: number, shapes, dtypes. So are the gradients."""
    for dtype, adapter, rows in (
        (torch.float32, None, (2, 3)),
        (torch.bfloat16, None, (3,)),
        (torch.bfloat16, torch.bfloat16, (2, 40)),
    ):
        layer = trained_layer(dtype=dtype, adapter_dtype=adapter, dropout=p)
        if frozen:
            getattr(layer, frozen).requires_grad_(False)
        x = torch.randn(*rows, 40, dtype=dtype, requires_grad=True)
        leaves = [x, *(q for q in layer.parameters() if q.requires_grad)]
        add = partial(fused_lora_add, lora_A=layer.lora_A, lora_B=layer.lora_B, dropout_p=p)
        for function in (layer, lambda x, add=add: add(x[..., :24] * 2, x)):
            gradients = []
            for forward, backward in ((nullcontext, nullcontext), [MODES[name] for name in modes]):
                for leaf in leaves:
                    leaf.grad = None
                torch.manual_seed(5)
                with forward():
                    y = checkpoint(function, x, use_reentrant=False)
                with backward():
                    y.float().square().sum().backward()
                gradients.append([leaf.grad for leaf in leaves])
            torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_operations_are_counted_beside_another_mode():
    """As without it; the counter sees the registered operators then."""
    layer, x = trained_layer(), torch.randn(2, 5, 40, requires_grad=True)
    counts = []
    for forward, backward in ((nullcontext, nullcontext), (Passing, Passing), (Passing, Seeing)):
        with FlopCounterMode(display=False) as counter:
            with forward():
                y = (
                    layer(x).sum()
                    + fused_lora_add(x[..., :24], x, layer.lora_A, layer.lora_B).sum()
                )
            with backward():
                y.backward()
        counts.append(counter.get_total_flops())
    assert counts == counts[:1] * 3, counts
    assert counts[0] > 0
