"""torch.compile: no graph breaks, few recompilations, and the masks of eager mode."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from models import ALL, Tiny, gpt2, llama, tokens, train_like, trained_layer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    apply_lora,
    disable_lora,
    fused_lora_add,
    fused_lora_linear,
    merge_lora,
    patch_peft,
    unmerge_lora,
)
from support import by_default, make_inputs, needs_triton, swept

pytestmark = pytest.mark.usefixtures("nothing_compiled")

BF16, FP32 = torch.bfloat16, torch.float32


def outcome(module, x, seed=4):
    torch.manual_seed(seed)
    y = module(x)
    named = (p for p in module.parameters() if p.requires_grad)
    return y, *torch.autograd.grad(y.float().square().sum(), (x, *named))


# backend, dtype, dropout, implementation
LAYERS = [
    ("aot_eager", FP32, 0.0, "auto"),
    ("aot_eager", FP32, 0.3, "auto"),
    ("aot_eager", BF16, 0.3, "torch"),
    ("aot_eager", FP32, 0.3, "reference"),
    ("inductor", FP32, 0.0, "auto"),
    ("inductor", BF16, 0.0, "auto"),
    pytest.param("aot_eager", FP32, 0.3, "triton", marks=needs_triton),
    pytest.param("aot_eager", BF16, 0.0, "triton", marks=needs_triton),
]


@pytest.mark.parametrize(("backend", "dtype", "p", "impl"), LAYERS)
def test_a_layer_is_one_graph_with_eagers_numbers(backend, dtype, p, impl):
    """The same operator runs, so results are bit-identical and masks equal."""
    layer = trained_layer(dropout=p, impl=impl, dtype=dtype)
    x = torch.randn(2, 17, 40, dtype=dtype, requires_grad=True)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for actual, expected in zip(outcome(compiled, x), outcome(layer, x), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backward", [True, False], ids=["backward too", "forward only"])
@pytest.mark.parametrize("forward", [True, False], ids=["inside", "outside"])
def test_under_autocast(forward, backward):
    """A graph is traced in one autocast state; its backward may run in another."""
    layer, x = trained_layer(dropout=0.3), torch.randn(5, 40, requires_grad=True)
    trained_tensors = (x, layer.lora_A, layer.lora_B)
    outcomes = []
    for module in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        torch.manual_seed(4)
        with torch.autocast("cpu", BF16, enabled=forward):
            y = module(x)
        assert y.dtype == (BF16 if forward else FP32)
        with torch.autocast("cpu", BF16, enabled=backward):
            outcomes.append((y, *torch.autograd.grad(y.float().sum(), trained_tensors)))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize("backend", by_default(["aot_eager"], ["eager", "aot_eager"]))
@pytest.mark.parametrize(
    ("name", "p"), [("x", 0.0), ("weight", 0.0), ("weight", 0.3), ("base", 0.0), ("base", 0.3)]
)
def test_subclasses_have_eagers_gradients(name, backend, p, nothing_compiled):
    """A quantised weight is one; PyTorch 2.11 compiled their gradients to zero."""
    from torch.testing._internal.two_tensor import TwoTensor

    inputs = make_inputs(5, 8, 6, 2, torch.float32)
    inputs["base"] = torch.randn(5, 6)
    inputs[name] = TwoTensor(inputs[name], inputs[name].clone())
    x, weight, A, B, bias, base = (
        inputs[n] for n in ("x", "weight", "lora_A", "lora_B", "bias", "base")
    )
    leaves = [A.requires_grad_(), B.requires_grad_()]

    def call():
        if name == "base":
            return fused_lora_add(base, x, A, B, dropout_p=p)
        return fused_lora_linear(x, weight, A, B, bias, dropout_p=p)

    def gradients(function):
        torch.manual_seed(1)
        found = torch.autograd.grad(function().sum(), leaves)
        return [g.a if isinstance(g, TwoTensor) else g for g in found]

    compiled = gradients(torch.compile(call, backend=backend, fullgraph=True))
    for actual, expected in zip(compiled, gradients(call), strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(actual, expected)


def test_the_graph_has_the_registered_operator():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch.compile(trained_layer(dropout=0.3), backend=backend, fullgraph=True)(torch.randn(5, 40))
    assert [name for name in seen if "lora" in name] == ["fused_lora.lora_linear"]


def every_kind():
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    return train_like(model), tokens(4, 6, vocabulary=20)


def dora():
    model = gpt2()
    apply_lora(model, rank=2, use_dora=True)
    return train_like(model), tokens(2, 6)


def peft_llama():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear", r=2))
    patch_peft(model)
    return train_like_peft(model), tokens(2, 6)


def train_like_peft(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("make", by_default([every_kind], [every_kind, dora, peft_llama]))
def test_whole_models_are_one_graph(make):
    model, ids = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outcomes = []
    for run in (compiled, model):
        y = run(ids)
        y = y if isinstance(y, torch.Tensor) else y.logits
        trained = [p for p in model.parameters() if p.requires_grad]
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    torch.testing.assert_close(*outcomes)


def beside_a_base():
    layer = trained_layer(dropout=0.2)
    base = torch.nn.Linear(40, 24)

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

        def forward(self, x):
            y = torch.nn.functional.linear(x, base.weight.detach(), base.bias.detach())
            return fused_lora_add(y, x, self.lora_A, self.lora_B, dropout_p=0.2)

    return Beside()


@pytest.mark.parametrize("make", [lambda: trained_layer(dropout=0.2), beside_a_base])
@pytest.mark.parametrize("sizes", [[(2,), (3,), (17,), (999,)], [(2, 3), (5, 4), (3, 8), (9, 33)]])
def test_one_graph_serves_any_number_of_tokens(make, sizes):
    layer = make()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for size in sizes:
        x = torch.randn(*size, 40, requires_grad=True)
        for dim in range(len(size)):
            torch._dynamo.mark_dynamic(x, dim)
        for actual, expected in zip(outcome(compiled, x), outcome(layer, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert graphs.frame_count == 1


def scaled_layer():
    layer = trained_layer()
    return layer, torch.randn(5, 40), layer


def scaled_dora():
    layer = trained_layer(use_dora=True)
    return layer, torch.randn(5, 40), layer


def scaled_float64():
    layer = trained_layer(dtype=torch.float64)
    return layer, torch.randn(5, 40, dtype=torch.float64), layer


def scaled_embedding():
    model, ids = every_kind()
    return model, ids, model.table


def scaled_conv():
    model, ids = every_kind()
    return model, ids, model.conv


SCALED = [scaled_layer, scaled_dora, scaled_float64, scaled_embedding, scaled_conv]


@pytest.mark.parametrize("make", SCALED)
def test_a_new_scale_is_no_new_graph(make):
    model, x, layer = make()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    compiled(x)
    made = graphs.frame_count
    for scale in (1.0, 1 / 3, -3.0, 0.0):
        layer.scaling = scale
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs.frame_count == made


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backward_has_the_scale_of_its_forward(backend):
    """As in preference training: a reference pass with scale 0 comes between the two."""
    layer, x = trained_layer(), torch.randn(5, 40, requires_grad=True)

    def preference(module):
        y = module(x)
        layer.scaling = 0.0
        with torch.no_grad():
            plain = module(x)
        layer.scaling = 4.0
        return torch.autograd.grad((y - plain).square().sum(), (x, layer.lora_A, layer.lora_B))

    layer.scaling = 4.0
    compiled = preference(torch.compile(layer, backend=backend, fullgraph=True))
    torch.testing.assert_close(compiled, preference(layer))


@swept
def test_new_scales_of_a_patched_layer_are_one_more_graph():
    """PEFT keeps the scale as a float in a dict: its first change makes it symbolic."""
    model, ids = peft_llama()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for scale in (1.0, 0.5, -3.0, 0.25):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = scale
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert graphs.frame_count == 2


def test_every_state_of_the_adapters_has_its_graph():
    model, ids = every_kind()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    on = compiled(ids)
    with disable_lora(model):
        off = compiled(ids)
        torch.testing.assert_close(off, model(ids))
    assert not torch.allclose(on, off)
    merge_lora(model)
    torch.testing.assert_close(compiled(ids), on)
    unmerge_lora(model)
    torch.testing.assert_close(compiled(ids), on, rtol=0, atol=0)


def plain(layer, *tensors):
    return layer(*tensors)


MODES = {
    "plain": plain,
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "reentrant checkpoint": partial(checkpoint, use_reentrant=True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", by_default(["inductor"], ["aot_eager", "inductor"]))
def test_one_mask(backend, mode):
    """With A = B = I and a zero weight the mask is visible in y, dx and dA."""
    K, drop = 32, 0.5

    def layer(x, A, B):
        return fused_lora_linear(x, torch.zeros(K, K), A, B, dropout_p=drop)

    def run(x, A, B):
        return MODES[mode](layer, x, A, B)

    compiled = torch.compile(run, backend=backend, fullgraph=mode != "reentrant checkpoint")

    def call():
        x, A, B = (t.requires_grad_() for t in (torch.ones(64, K), torch.eye(K), torch.eye(K)))
        y = compiled(x, A, B)
        dx, dA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
        assert set(y.unique().tolist()) == {0.0, 1 / (1 - drop)}
        assert torch.equal(dx, y)
        assert torch.equal(dA, y.sum(0).expand(K, K))
        return y

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


@swept
def test_imported_anew():
    """As in a reloading shell: a second import replaces the operators of the first."""
    script = (
        "import sys, torch\n"
        "for _ in range(2):\n"
        "    import fused_lora\n"
        "    layer = torch.compile(fused_lora.FusedLoRALinear(8, 6, rank=2), backend='aot_eager')\n"
        "    layer(torch.randn(4, 8)).sum().backward()\n"
        "    for name in [n for n in sys.modules if n.startswith('fused_lora')]:\n"
        "        del sys.modules[name]\n"
        "    torch._dynamo.reset()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
