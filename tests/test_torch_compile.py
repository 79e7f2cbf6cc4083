"""torch.compile and torch.export: whole graphs, few of them, and the masks of eager mode."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from models import ALL, Tiny, gpt2, llama, tokens, train_like
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    FusedLoRALinear,
    apply_lora,
    constants,
    disable_lora,
    fused_lora_linear,
    patch_peft,
)

BF16, FP32 = torch.bfloat16, torch.float32
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(K=40, N=24, **kwargs) -> FusedLoRALinear:
    layer = FusedLoRALinear(K, N, rank=4, **kwargs)
    torch.nn.init.normal_(layer.lora_B)
    return layer


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
    """The same operator runs, so the bits are the same, the mask's included."""
    layer = trained(dropout=p, impl=impl, dtype=dtype)
    x = torch.randn(2, 17, 40, dtype=dtype, requires_grad=True)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for actual, expected in zip(outcome(compiled, x), outcome(layer, x), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_under_autocast():
    layer, x = trained(dropout=0.3), torch.randn(5, 40, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", BF16):
        actual, expected = outcome(compiled, x), outcome(layer, x)
    assert actual[0].dtype == BF16
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


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


@pytest.mark.parametrize("make", [every_kind, dora, peft_llama])
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


def test_one_graph_serves_any_number_of_tokens():
    layer = trained(dropout=0.2)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for M in (2, 3, 17, 1000):
        x = torch.randn(M, 40, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        for actual, expected in zip(outcome(compiled, x), outcome(layer, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert graphs.frame_count == 1


def scaled_layer():
    layer = trained()
    return layer, torch.randn(5, 40), layer


def scaled_dora():
    layer = trained(use_dora=True)
    return layer, torch.randn(5, 40), layer


def scaled_embedding():
    model, ids = every_kind()
    return model, ids, model.table


@pytest.mark.parametrize("make", [scaled_layer, scaled_dora, scaled_embedding])
def test_a_new_scale_is_no_new_graph(make):
    model, x, layer = make()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for scale in (1.0, 0.5, -3.0, 0.0):
        layer.scaling = scale
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs.frame_count == 1


def test_new_scales_of_a_patched_layer_are_one_more_graph():
    """PEFT keeps floats in a dict: the first change makes the number symbolic."""
    model, ids = peft_llama()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for scale in (1.0, 0.5, -3.0, 0.25):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = scale
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert graphs.frame_count == 2


def test_switched_off_adapters_are_another_graph():
    model, ids = every_kind()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    on = compiled(ids)
    with disable_lora(model):
        off = compiled(ids)
        torch.testing.assert_close(off, model(ids))
    assert not torch.allclose(on, off)
    torch.testing.assert_close(compiled(ids), on)


def plain(layer, *tensors):
    return layer(*tensors)


MODES = {
    "plain": plain,
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "reentrant checkpoint": partial(checkpoint, use_reentrant=True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_mask(backend, mode):
    """With identities for A and B and no weight the mask is visible in y, dx and dA."""
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


@pytest.mark.parametrize("case", ["eval", "training", "scaled", "merged", "dora"])
def test_export_leaves_plain_operators(case, tmp_path):
    """The artefact loads and runs where this package cannot be imported."""
    layer = trained(dropout=0.0 if case == "eval" else 0.3, use_dora=case == "dora")
    layer.train(case == "training")
    if case == "scaled":
        layer.scaling = 0.25
    if case == "merged":
        layer.merge()
    x = torch.randn(3, 5, 40)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    used = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [name for name in used if "fused_lora" in name]
    torch.export.save(program, tmp_path / "layer.pt2")
    wide = torch.randn(7, 5, 40)
    torch.save({"x": wide, "y": layer.eval()(wide)}, tmp_path / "data.pt")
    script = (
        "import sys\n"
        "sys.modules['fused_lora'] = None\n"
        "import torch\n"
        "data = torch.load('data.pt')\n"
        "y = torch.export.load('layer.pt2').module()(data['x'])\n"
        f"if {case != 'training'}: torch.testing.assert_close(y, data['y'])\n"
        "assert y.shape == data['y'].shape\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=dict(os.environ))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_cuda_graphs(impl):
    """Captured once and replayed: new inputs, new masks, and the scale that holds at the replay."""
    layer = trained(1024, 512, dropout=0.5, impl=impl, device="cuda", dtype=BF16)
    x = torch.randn(256, 1024, device="cuda", dtype=BF16)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    outputs = []
    for _ in range(2):
        graph.replay()
        outputs.append(y.clone())
    assert not torch.equal(*outputs)
    layer.scaling = 0.0
    graph.replay()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer.eval()(x), y)


def test_a_constant_of_a_captured_graph_is_not_kept(monkeypatch):
    """It has no value before the graph is replayed. The GPU is pretended."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    made = []

    def make(value):
        made.append(value)
        return torch.full((), value).as_subclass(OnGpu)

    for capturing, calls in ((True, 2), (False, 3)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        for _ in range(2):
            assert constants.constant(make, 7.0) == 7.0
        assert len(made) == calls
