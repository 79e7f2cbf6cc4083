"""Public reports about ways to call a layer: vmap, nested tensors, keywords, TorchScript, FX.

Each test names the report or the page that it comes from.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import Tiny, gpt2, trained_layer
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    FusedLoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    apply_lora,
    fused_lora_add,
    fused_lora_linear,
    lora_parameters,
    unload_lora,
)
from fused_lora.ops import dropout
from support import by_default

WIDE = torch.float64

# Per-sample gradients with dropout. pytorch#96655 and pytorch#122432 ask for dropout under vmap;
# functorch#409 defines randomness.


def identity_layer(p=0.5):
    """``y`` is the mask, times 1/(1 - p)."""
    layer = FusedLoRALinear(6, 5, bias=False, rank=6, alpha=6.0, dropout=p, dtype=WIDE)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(6))
        layer.lora_B.copy_(torch.eye(5, 6))
    return layer


def equal_samples(y) -> list[bool]:
    return [torch.equal(y[0], other) for other in y[1:]]


def test_randomness_of_vmap():
    layer, ones = identity_layer(0.25), torch.ones(7, 400, 6, dtype=WIDE)
    y = vmap(layer, randomness="different")(ones)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3], dtype=WIDE))
    assert abs(y.mean() - 1) < 5 * (1 / 3 / y.numel()) ** 0.5
    assert not any(equal_samples(y))
    assert all(equal_samples(vmap(layer, randomness="same")(ones)))
    for module in (layer, nn.Dropout(0.25)):
        with pytest.raises(RuntimeError, match="randomness error mode"):
            vmap(module)(ones)
    parameters = {name: t.detach().expand(7, *t.shape) for name, t in layer.named_parameters()}
    over = partial(vmap, lambda p: functional_call(layer, p, (ones[0],)))
    assert not any(equal_samples(over(randomness="different")(parameters)))
    assert all(equal_samples(over(randomness="same")(parameters)))
    assert vmap(layer, randomness="different")(ones[:0]).shape == (0, 400, 5)


@pytest.mark.parametrize("outer", ["different", "same"])
@pytest.mark.parametrize("inner", ["different", "same"])
def test_randomness_of_nested_vmap(outer, inner):
    layer, ones = identity_layer(), torch.ones(2, 2, 40, 6, dtype=WIDE)
    y = vmap(vmap(layer, randomness=inner), randomness=outer)(ones)
    assert torch.equal(y[0, 0], y[1, 0]) == (outer == "same")
    assert torch.equal(y[0, 0], y[0, 1]) == (inner == "same")


@pytest.mark.parametrize("compiled", by_default([False], [False, True]))
def test_per_sample_gradients(compiled):
    """Against one pass per sample that is given the same seed."""
    layer = trained_layer(dtype=WIDE, dropout=0.5)
    xs = torch.randn(6, 3, 40, dtype=WIDE)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    samples = vmap(
        grad_and_value(lambda p, x: functional_call(layer, p, (x,)).square().sum()),
        in_dims=(None, 0),
        randomness="different",
    )
    if compiled:
        samples = torch.compile(samples, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    gradients, losses = samples(parameters, xs)
    torch.manual_seed(3)
    seeds = torch.randint(0, 2**63 - 1, (6,))
    for i, seed in enumerate(seeds):
        mask = dropout.keep_mask(dropout.make_keep_bits(seed, 3, 40, 1 << 15), 40, WIDE) * 2

        def formula(p, x=xs[i], mask=mask):
            low_rank = F.linear(F.linear(x * mask, p["lora_A"]), p["lora_B"])
            y = F.linear(x, p["weight"], p["bias"]) + layer.scaling * low_rank
            return y.square().sum()

        expected, value = grad_and_value(formula)(parameters)
        torch.testing.assert_close(losses[i], value)
        torch.testing.assert_close({n: g[i] for n, g in gradients.items()}, expected)


def test_batched_cotangents_with_dropout():
    """``is_grads_batched`` maps over backward alone: every row of the Jacobian has one mask."""
    layer, ones = identity_layer(), torch.ones(4, 6, dtype=WIDE, requires_grad=True)
    y = layer(ones)
    rows = torch.eye(20, dtype=WIDE).view(20, 4, 5)
    jacobian = torch.autograd.grad(y, ones, rows, is_grads_batched=True)[0]
    torch.testing.assert_close(jacobian.sum(0)[:, :5], y)


# Jagged nested tensors. pytorch#125214 calls nn.Linear on them.


def jagged(*tail: int, lengths=(3, 0, 1, 4), layout=torch.jagged):
    torch.manual_seed(2)
    parts = [torch.randn(n, *tail, dtype=WIDE) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)


def merged(layer):
    layer.merge()


def disabled(layer):
    layer.enabled = False


NESTED = {
    "plain": {},
    "dropout": {"dropout": 0.5},
    "dora": {"use_dora": True, "dropout": 0.5},
    "reference": {"impl": "reference", "dropout": 0.5},
    "merged": {"then": merged},
    "disabled": {"then": disabled},
}


@pytest.mark.parametrize(
    ("case", "shape"),
    [(case, shape) for case in NESTED for shape in ("(B, j, K)", "(B, j, 2, K)")]
    # The others use PyTorch's own product or dropout, which refuse this shape.
    + [(case, "(B, 2, j, K)") for case in ("plain", "dropout", "reference")],
)
def test_jagged(case, shape):
    """Rows and gradients are those of the concatenated sequences; the offsets stay."""
    arguments = dict(NESTED[case])
    then = arguments.pop("then", lambda layer: None)
    layer = trained_layer(dtype=WIDE, **arguments)
    then(layer)
    leaf = jagged(*((40,) if shape == "(B, j, K)" else (2, 40)))
    x = leaf.transpose(1, 2) if shape == "(B, 2, j, K)" else leaf
    dense = x.detach().values().requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for given, source in ((x, leaf), (dense, dense)):
        torch.manual_seed(7)
        y = layer(given)
        rows = y.values() if y.is_nested else y
        wanted = [source, *parameters]
        gradients = torch.autograd.grad(rows.square().sum(), wanted, allow_unused=True)
        dx = gradients[0].values() if source is leaf else gradients[0]
        if x is not leaf and source is dense:
            dx = dx.transpose(0, 1)
        results.append((rows, dx, *(g for g in gradients[1:] if g is not None)))
        if given is x:
            assert y.shape == (*x.shape[:-1], 24)
            assert y.offsets() is x.offsets()
            if x is leaf:  # a sum needs the same offsets
                (y + F.relu(x)[..., :24]).values()
    torch.testing.assert_close(*results)


def test_jagged_equals_linear_and_sequences():
    layer, x = trained_layer(dtype=WIDE), jagged(40)
    plain = unload_lora(nn.Sequential(copy.deepcopy(layer)))[0]
    y = layer(x)
    torch.testing.assert_close(y.values(), plain(x).values())
    for part, sequence in zip(y.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(part, layer(sequence))
    base = nn.Linear(40, 24, dtype=WIDE)(x)
    added = fused_lora_add(base, x, layer.lora_A, layer.lora_B)
    dense = fused_lora_add(base.values(), x.values(), layer.lora_A, layer.lora_B)
    torch.testing.assert_close(added.values(), dense)
    again = checkpoint(layer, x, use_reentrant=False)
    expected = torch.autograd.grad(y.values().sum(), layer.lora_A)
    torch.testing.assert_close(torch.autograd.grad(again.values().sum(), layer.lora_A), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", by_default(["eager"], ["eager", "aot_eager"]))
def test_jagged_compiled(backend):
    layer, x = trained_layer(dtype=WIDE), jagged(40)
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y.values(), layer(x).values())
    wanted = layer.lora_A, layer.lora_B
    actual = torch.autograd.grad(y.values().square().sum(), wanted)
    expected = torch.autograd.grad(layer(x).values().square().sum(), wanted)
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_other_nested_tensors_are_refused():
    layer = trained_layer(dtype=WIDE)
    adapter = layer.lora_A, layer.lora_B
    strided, x = jagged(40, layout=torch.strided), jagged(40)
    lengths = torch.tensor([1, 2])
    holes = torch.nested.narrow(
        torch.randn(2, 7, 40, dtype=WIDE), 1, lengths - 1, lengths, layout=torch.jagged
    )
    for call in (layer, lambda t: fused_lora_linear(t, layer.weight, *adapter)):
        with pytest.raises(TypeError, match=r"expected x to be dense or a jagged .*as_nested_tens"):
            call(strided)
        with pytest.raises(ValueError, match=r"expected a contiguous jagged x.*contiguous\(\)"):
            call(holes)
    with pytest.raises(TypeError, match="expected base to be dense or a jagged"):
        fused_lora_add(strided, x, *adapter)
    with pytest.raises(ValueError, match="expected base of shape"):  # other offsets
        fused_lora_add(jagged(24), x, *adapter)
    with pytest.raises(ValueError, match=r"expected x of shape \(\.\.\., 40\)"):
        layer(x.transpose(1, 2))
    cured = torch.nested.as_nested_tensor(list(strided.unbind()), layout=torch.jagged)
    torch.testing.assert_close(layer(cured).values(), layer(x).values())
    torch.testing.assert_close(
        layer(holes.contiguous()).values(), layer(holes.contiguous().values())
    )


# ``layer(input=x)``: docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html documents
# ``forward(input)``; transformers' pytorch_utils.py names Conv1D's argument ``x``.


def adapted_tiny():
    torch.manual_seed(0)
    model = Tiny()
    apply_lora(model, rank=2, target_modules=["table", "conv", "hidden", "out"])
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter)
    return model


def test_keyword_of_the_plain_layer():
    pytest.importorskip("transformers")
    language = gpt2()
    apply_lora(language, rank=2)
    conv1d = language.transformer.h[0].attn.c_attn
    model = adapted_tiny()
    inputs = {
        model.table: torch.tensor([1, 2]),
        model.conv: torch.randn(1, 4, 4),
        model.hidden: torch.randn(2, 36),
        conv1d: torch.randn(2, 32),
    }
    for layer, x in inputs.items():
        name = list(inspect.signature(layer.plain_class().forward).parameters)[1]
        assert list(inspect.signature(layer.forward).parameters) == [name]
        torch.testing.assert_close(layer(**{name: x}), layer(x))
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            layer(other=x)
    y = torch.compile(conv1d, backend="eager", fullgraph=True)(x=inputs[conv1d])
    torch.testing.assert_close(y, conv1d(inputs[conv1d]))
    assert {type(layer) for layer in inputs} >= {FusedLoRALinear, LoRAConv2d, LoRAEmbedding}


# peft#259 and peft#1419 ask how to convert a LoRA model to TorchScript.


def test_script_is_refused_with_the_cure():
    model, tokens = adapted_tiny(), torch.tensor([[1, 2, 3]])
    cure = r"torch\.jit\.trace or torch\.export, or unload_lora\(model\)"
    for module in (model, model.table, model.conv, model.hidden):
        with pytest.raises(RuntimeError, match=cure):
            torch.jit.script(module)
    y = model(tokens)
    torch.testing.assert_close(torch.jit.trace(model, (tokens,))(tokens), y)
    torch.testing.assert_close(
        torch.jit.script(nn.Sequential(unload_lora(model).out))(y := torch.ones(2, 16)),
        model.out(y),
    )


# pytorch#149062: a tracer that steps into custom modules loses them; nn.Linear is a leaf of
# torch.fx.symbolic_trace.


@pytest.mark.parametrize("state", ["plain", "dora", "merged", "disabled", "computed"])
def test_layers_are_leaves_of_fx(state):
    """The traced model calls the adapted layers: it trains them, and follows their switches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    apply_lora(model, rank=2, use_dora=state == "dora")
    if state == "merged":
        model[0].merge()
    if state == "disabled":
        model[0].enabled = False
    if state == "computed":
        nn.utils.parametrizations.weight_norm(model[0])
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 8)
    assert [node.op for node in traced.graph.nodes] == [
        "placeholder", *["call_module"] * 3, "output",
    ]  # fmt: skip
    assert list(lora_parameters(traced)) == list(lora_parameters(model))
    model[0].enabled, model[2].scaling = True, 0.25
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    traced(x).sum().backward()
    assert model[2].lora_A.grad is not None


def test_leaves_of_other_kinds():
    model, tokens = adapted_tiny(), torch.tensor([[1, 2, 3]])
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["table", "conv", "hidden", "out"]
    torch.testing.assert_close(traced(tokens), model(tokens), rtol=0, atol=0)


def test_what_fx_cannot_trace_is_refused():
    model = adapted_tiny()
    for layer in (model.table, model.conv, model.hidden):
        with pytest.raises(TypeError, match=r"got the layer itself as the root of torch\.fx"):
            torch.fx.symbolic_trace(layer)
    layer = model.hidden
    A, B = layer.lora_A, layer.lora_B
    for function in (
        lambda x: fused_lora_linear(x, layer.weight, A, B),
        lambda base: fused_lora_add(base, torch.ones(2, 36), A, B),
    ):
        with pytest.raises(TypeError, match=r"got Proxy: torch\.fx\.wrap"):
            torch.fx.symbolic_trace(function)
