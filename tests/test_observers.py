"""Observed calls: checkpoints, counters, transforms, exporters, tracers and captured graphs."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from models import trained_layer
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from fused_lora.ops import constants
from support import by_default, needs_triton

pytestmark = pytest.mark.usefixtures("nothing_compiled")

BF16 = torch.bfloat16


def save_products(context, operator, *args, **kwargs):
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    policy = CheckpointPolicy
    return policy.MUST_SAVE if operator in products else policy.PREFER_RECOMPUTE


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=needs_triton)])
def test_selective_checkpointing(impl):
    """It saves the products that it sees and returns them to the recomputed forward."""
    layer = trained_layer(dropout=0.5, impl=impl)
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
    """All but the two products accumulated in place, which PyTorch's counter does not support."""
    layer, x = trained_layer(), torch.randn(2, 5, 40, requires_grad=True)
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
    """``torch.func`` transforms and forward mode differentiate the formula exactly, in float64."""
    layer, x = trained_layer(dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    plain.merge()
    run = partial(transform, layer)
    if compiled and transform is not dual:  # Dynamo does not trace its level
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), transform(plain, x))
    layer.impl = "triton"
    with pytest.raises(ValueError, match=r"expected no torch\.func transform"):
        transform(layer, x)


@pytest.mark.parametrize(
    "case", by_default(["training"], ["eval", "training", "scaled", "merged", "dora"])
)
def test_export_leaves_plain_operators(case, tmp_path):
    """The artefact loads and runs where this package cannot be imported."""
    layer = trained_layer(dropout=0.0 if case == "eval" else 0.3, use_dora=case == "dora")
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
    if case in ("training", "eval", "scaled"):
        # A buffer of the program: the layer holds no second copy that could be inlined.
        scale = next(n for n in program.graph.nodes if n.name == "b__scaling_tensor")
        assert scale.users
        assert program.constants["_scaling_tensor"].item() == layer.scaling
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


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(grad, tmp_path):
    """The artefact has PyTorch's operators only: it draws a new mask per call, and it trains."""
    layer, x = trained_layer(dropout=0.5), torch.randn(5, 40)
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(layer.eval(), (torch.randn(3, 40),)), tmp_path / "eval.pt")
        evaluated = torch.jit.load(tmp_path / "eval.pt")
        torch.testing.assert_close(evaluated(x), layer(x))
        traced = torch.jit.trace(layer.train(), (torch.randn(3, 40),), check_trace=False)
        assert not torch.equal(traced(x), traced(x))
        if grad:
            evaluated(x).sum().backward()
            expected = torch.autograd.grad(layer.eval()(x).sum(), layer.lora_A)[0]
            torch.testing.assert_close(evaluated.lora_A.grad, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_cuda_graphs(impl):
    """Captured once and replayed: every replay draws a new mask and reads the current scale."""
    layer = trained_layer(1024, 512, dropout=0.5, impl=impl, device="cuda", dtype=BF16)
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
    """It has no value before the first replay, so it is not cached. The GPU is faked."""

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
