"""Public reports of scales, weights and averages that part ways, each named at its test.

Three values must agree: the eager forward, the compiled forward and the merged weight.
"""

import copy
import pickle

import pytest
import torch
from models import train_like
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
)
from fused_lora.layers import linear, scale
from support import by_default

KINDS = {
    "linear": (lambda: nn.Linear(16, 12), lambda: torch.randn(5, 16)),
    "embedding": (lambda: nn.Embedding(16, 12), lambda: torch.randint(0, 16, (5,))),
    "conv": (lambda: nn.Conv2d(3, 4, 3), lambda: torch.randn(2, 3, 8, 8)),
}
SCALE = "0._scaling_tensor"
kinds = pytest.mark.parametrize("kind", by_default(["linear"], KINDS))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def adapted(kind: str = "linear", scaling: float = 2.0, **options) -> nn.Sequential:
    model = nn.Sequential(KINDS[kind][0]())
    apply_lora(model, target_modules=["0"], rank=4, **options)
    train_like(model)
    model[0].scaling = scaling
    return model


def with_scale(model: nn.Module, scaling: float) -> nn.Module:
    other = copy.deepcopy(model)
    other[0].scaling = scaling
    return other


def assert_one_scale(model: nn.Module, x: torch.Tensor, scaling: float) -> None:
    """The scale's readers agree: forward in eager mode and compiled, merging, the property."""
    layer = model.module[0] if isinstance(model, AveragedModel) else model[0]
    assert layer.scaling == pytest.approx(scaling, rel=1e-6)
    y = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-4)
    inner = copy.deepcopy(nn.Sequential(layer)).double()
    inner[0].scaling = scaling
    exact = inner(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)


@kinds
def test_an_average_of_buffers_averages_the_scale(kind):
    """pytorch#66686: averages of buffers; get_ema_multi_avg_fn weighs them differently."""
    model, x = adapted(kind, 3.0), KINDS[kind][1]()
    mean = AveragedModel(model, use_buffers=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    for scaling in (3.0, 1.0):
        model[0].scaling = scaling
        mean.update_parameters(model)
        ema.update_parameters(model)
    assert_one_scale(mean, x, 2.0)
    assert_one_scale(ema, x, 0.75 * 3.0 + 0.25 * 1.0)


@kinds
def test_an_average_of_parameters_copies_the_scale(kind):
    """pytorch#84053: with use_buffers=False the average gets the source's buffers."""
    model, x = adapted(kind, 0.1), KINDS[kind][1]()
    average = AveragedModel(model, use_buffers=False)
    model[0].scaling = 3.0
    average.update_parameters(model)
    assert_one_scale(average, x, 3.0)


@kinds
def test_a_functional_call_replaces_the_scale(kind):
    """pytorch.org's torch.func.functional_call: it replaces parameters and buffers of a module."""
    model, x = adapted(kind, 0.1), KINDS[kind][1]()
    expected = with_scale(model, 3.0)(x)
    state = {SCALE: torch.tensor(3.0)}

    def call(x):
        return functional_call(model, state, (x,))

    torch.testing.assert_close(call(x), expected, rtol=0, atol=0)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert model[0].scaling == 0.1
    traced = make_fx(lambda state, x: functional_call(model, state, (x,)))(state, x)
    torch.testing.assert_close(traced({SCALE: torch.tensor(0.5)}, x), with_scale(model, 0.5)(x))


@kinds
def test_stacked_models_keep_their_own_scales(kind):
    """pytorch.org's torch.func.stack_module_state: one vmap call runs an ensemble."""
    models, x = [adapted(kind, s) for s in (0.1, 1.0, 3.0)], KINDS[kind][1]()
    parameters, buffers = stack_module_state(models)
    assert list(buffers) == [SCALE]
    for base in (models[0], copy.deepcopy(models[0]).to("meta")):
        y = vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(y, torch.stack([model(x) for model in models]))
    gradients = vmap(grad(lambda p, b: functional_call(base, (p, b), (x,)).sum()))(
        parameters, buffers
    )
    for i, model in enumerate(models):
        model(x).sum().backward()
        torch.testing.assert_close(gradients["0.lora_B"][i], model[0].lora_B.grad)


@kinds
def test_a_gradient_in_the_scale_is_right_or_refused(kind):
    """pytorch.org's torch.func.grad: a tensor read as a number has no gradient."""
    model, x = adapted(kind), KINDS[kind][1]()

    def loss(scaling):
        return functional_call(model, {SCALE: scaling}, (x,)).sum()

    s = torch.tensor(2.0, requires_grad=True)
    expected = (loss(torch.tensor(3.0)) - loss(torch.tensor(2.0))).item()  # linear in s
    _, tangent = jvp(loss, (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert tangent.item() == pytest.approx(expected, rel=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        tangent = forward_ad.unpack_dual(loss(dual)).tangent
    assert tangent.item() == pytest.approx(expected, rel=1e-4)
    for differentiate in (lambda: torch.autograd.grad(loss(s), s)[0], lambda: grad(loss)(s)):
        if kind == "linear":
            with pytest.raises(ValueError, match="expected a constant scaling"):
                differentiate()
        else:
            assert differentiate().item() == pytest.approx(expected, rel=1e-4)


@kinds
def test_a_new_scale_does_not_recompile(kind):
    """diffusers#9279, pytorch#149405: each new float recompiles; here none, and none is stale."""
    model, x = adapted(kind), KINDS[kind][1]()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scaling in (1.0, 2.0, 0.1, 7.0):
        model[0].scaling = scaling
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


OPTIONS = [(kind, {}) for kind in KINDS] + [("linear", {"impl": "reference"})]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("mode", ["number", "tensor", "compiled"])
def test_backward_uses_the_scale_of_its_forward(kind, options, mode, monkeypatch):
    """Both directions of one slider in one loss. On a GPU the scale is a tensor, set in place."""
    model, x = adapted(kind, **options), KINDS[kind][1]()

    def gradients(forward):
        loss = 0.0
        for scaling in (1.0, -2.0):
            model[0].scaling = scaling
            loss = loss + scaling * forward(x).square().sum()
        return torch.autograd.grad(loss, [model[0].lora_A, model[0].lora_B])

    expected, forward = gradients(model), model
    if mode == "tensor":
        for module in (linear, scale):
            monkeypatch.setattr(module, "current_scale", lambda layer, _: layer._scaling_tensor)
    elif mode == "compiled":
        forward = torch.compile(model, backend="aot_eager")
        if kind != "linear" or options:  # PyTorch recomputes what the graph copies
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(forward)
            return
    torch.testing.assert_close(gradients(forward), expected)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "half": lambda model: model.half().float(),
    "bfloat16": lambda model: model.to(torch.bfloat16).float(),
    "meta": lambda model: model.to("meta").to_empty(device="cpu"),
    "assign": lambda model: model if model.load_state_dict(model.state_dict(), assign=True) else 0,
    "float8": lambda model: model.to(torch.float8_e4m3fn).float(),
}


@kinds
@pytest.mark.parametrize("copied", list(COPIES))
def test_the_scale_survives_exactly(kind, copied):
    """transformers#34234: ``to_empty`` fills buffers that are not persistent with anything."""
    model, x = adapted(kind, 0.3), KINDS[kind][1]()
    state = copy.deepcopy(model.state_dict())
    other = COPIES[copied](copy.deepcopy(model))
    other.load_state_dict(state)
    assert other[0].scaling == 0.3
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert not any("scal" in key for key in state)  # files of save_adapter hold it


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_carry_their_scale(use_dora, tmp_path):
    """diffusers#9279: set_adapter with another scale, in a compiled model; and the saved file."""
    model, x = adapted("linear", 0.7, use_dora=use_dora), torch.randn(5, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    first = model(x)
    add_adapter(model, "b", rank=4, alpha=1.0, use_dora=use_dora)
    set_adapter(model, "b")
    train_like(model)
    assert_one_scale(model, x, 0.25)
    torch.testing.assert_close(compiled(x), model(x))
    set_adapter(model, "default")
    torch.testing.assert_close(compiled(x), first)
    assert model[0].scaling == 0.7
    save_adapter(model, tmp_path)
    other = nn.Sequential(nn.Linear(16, 12))
    other.load_state_dict({name: model.state_dict()[name] for name in ("0.weight", "0.bias")})
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_number_is_the_one_that_was_given(dtype):
    """peft#2177: scales as tensors. A float32 tensor rounds 0.1; the property undoes that."""
    layer = FusedLoRALinear(16, 12, rank=6, alpha=16, dtype=dtype)
    assert layer.scaling == layer.adapter_config.scaling == 16 / 6
    for scaling in (0.1, 1e-7, 3.0, 0.0, -1.25, 12345.678):
        layer.scaling = scaling
        assert layer.scaling == scaling
    if dtype != torch.float64:
        with pytest.raises(ValueError, match="in float32's range, got 1e"):
            layer.scaling = 1e39
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer._scaling_tensor.dtype == expected


def test_observers_see_the_same_operators():
    """pytorch's FlopCounterMode only counts; a tracer of fake tensors records no number."""
    model, x = adapted("linear", 0.3), torch.randn(5, 16)
    y = model(x)
    with FlopCounterMode(display=False):
        assert torch.equal(model(x), y)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == y.shape
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(16, 12))
        apply_lora(fake, rank=4)
        assert fake(torch.randn(5, 16)).shape == y.shape
        assert fake[0].scaling == 4.0
