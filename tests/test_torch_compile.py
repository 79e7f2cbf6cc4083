"""torch.compile and torch.export: whole graphs, few of them, and the masks of eager mode."""

import copy
import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from models import ALL, Tiny, gpt2, llama, tokens, train_like
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import (
    FusedLoRALinear,
    apply_lora,
    constants,
    disable_lora,
    fused_lora_add,
    fused_lora_linear,
    merge_lora,
    patch_peft,
    unmerge_lora,
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


@pytest.mark.parametrize("backward", [True, False], ids=["backward too", "forward only"])
@pytest.mark.parametrize("forward", [True, False], ids=["inside", "outside"])
def test_under_autocast(forward, backward):
    """A graph is made of one state of autocast; its backward may run in another."""
    layer, x = trained(dropout=0.3), torch.randn(5, 40, requires_grad=True)
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


def test_the_graph_has_the_registered_operator():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch.compile(trained(dropout=0.3), backend=backend, fullgraph=True)(torch.randn(5, 40))
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


def beside_a_base():
    layer = trained(dropout=0.2)
    base = torch.nn.Linear(40, 24)

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

        def forward(self, x):
            y = torch.nn.functional.linear(x, base.weight.detach(), base.bias.detach())
            return fused_lora_add(y, x, self.lora_A, self.lora_B, dropout_p=0.2)

    return Beside()


@pytest.mark.parametrize("make", [lambda: trained(dropout=0.2), beside_a_base])
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
    layer = trained()
    return layer, torch.randn(5, 40), layer


def scaled_dora():
    layer = trained(use_dora=True)
    return layer, torch.randn(5, 40), layer


def scaled_float64():
    layer = trained(dtype=torch.float64)
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
    """As where a reference pass with the adapter off comes between the two."""
    layer, x = trained(), torch.randn(5, 40, requires_grad=True)

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


def save_products(context, operator, *args, **kwargs):
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    policy = CheckpointPolicy
    return policy.MUST_SAVE if operator in products else policy.PREFER_RECOMPUTE


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=needs_triton)])
def test_selective_checkpointing(impl):
    """It keeps products that it sees, and gives them back to the forward that is repeated."""
    layer = trained(dropout=0.5, impl=impl)
    x = torch.randn(5, 40, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, save_products)
    saving = partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    outcomes = []
    for call in (saving, layer):
        torch.manual_seed(4)
        y = call(x)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A))))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


def test_flops_are_counted():
    """All but the two products that are added in place, which PyTorch's counter does not know."""
    layer, x = trained(), torch.randn(2, 5, 40, requires_grad=True)
    products = 2 * 40 * 24 + 2 * 4 * (40 + 24)  # y and dx; S and dA, G and dB
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 10 * products


def tangent(layer, x):
    return torch.func.jvp(layer, (x,), (x,))[1]


def dual(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent


def gradient(layer, x):
    return torch.func.grad(lambda t: layer(t).square().sum())(x)


def jacobian(layer, x):
    return torch.func.jacrev(layer)(x)


@pytest.mark.parametrize("transform", [tangent, dual, gradient, jacobian])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transforms(transform, compiled):
    """Of ``torch.func`` and forward mode: the formula's own derivatives, in float64."""
    layer, x = trained(dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    plain.merge()
    run = partial(transform, layer)
    if compiled and transform is not dual:  # whose level Dynamo does not enter
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), transform(plain, x))
    layer.impl = "triton"
    with pytest.raises(ValueError, match=r"expected no torch\.func transform"):
        transform(layer, x)


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
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    used = {str(n.target) for n in calls}
    assert not [name for name in used if "fused_lora" in name]
    assert ("aten.dropout.default" in used) == (case == "training")
    scale = [n for n in program.graph.nodes if "scaling" in n.name]
    assert not [n for n in scale if n.users], "the scale is a constant"
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
    side.wait_stream(torch.cuda.current_stream())
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


def test_imported_anew():
    """As by a reloading shell: the operators of the second import replace the first's."""
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
