"""Differentiation: gradcheck, what is saved, autocast, checkpointing, accumulation, grad modes."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fused_lora import FusedLoRALinear, fused_lora_linear
from fused_lora.ops import modes
from support import (
    assert_as_good_as_eager,
    by_default,
    in_eager,
    in_float64,
    make_inputs,
    needs_triton,
    relative_rms,
    run,
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
IMPLS = ["torch", "reference"]
ALL_IMPLS = [*IMPLS, *(["triton"] if importlib.util.find_spec("triton") else [])]
NEEDS = ["x", "lora_A", "lora_B", "bias", "x lora_A lora_B bias", "lora_A lora_B"]


def float64_function(impl: str, p: float, needs: str):
    """A function of the tensors that need gradients, with the same mask on every call."""
    inputs = make_inputs(5, 7, 6, 3, FP64)
    names = needs.split()

    def function(*leaves):
        torch.manual_seed(3)
        return fused_lora_linear(
            **inputs | dict(zip(names, leaves, strict=True)), dropout_p=p, impl=impl
        )

    return function, tuple(inputs[name].requires_grad_() for name in names)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", by_default(NEEDS[2:5], NEEDS))
def test_gradcheck(impl, p, needs):
    function, leaves = float64_function(impl, p, needs)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", by_default(NEEDS[2:5], NEEDS))
def test_gradgradcheck(impl, p, needs):
    function, leaves = float64_function(impl, p, needs)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_with_a_frozen_adapter():
    """A gradient penalty on x works; through dB, which needs x, an error names the remedy."""
    inputs = make_inputs(5, 7, 6, 3, FP64)
    x, lora_B = inputs["x"].requires_grad_(), inputs["lora_B"].requires_grad_()
    results = []
    for impl in IMPLS:
        y = fused_lora_linear(**inputs, impl=impl)
        dx = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        results.append(torch.autograd.grad(dx.square().sum(), (x, lora_B)))
    torch.testing.assert_close(*results)
    y = fused_lora_linear(**inputs, impl="torch")
    dB = torch.autograd.grad(y.square().sum(), lora_B, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="lora_A to require grad"):
        torch.autograd.grad(dB.sum(), x)


def test_output_may_be_changed_in_place():
    """The next layer may be ReLU(inplace=True), as after nn.Linear."""
    for impl in ALL_IMPLS:
        layer = FusedLoRALinear(8, 6, rank=2, impl=impl)
        for shape in ((8,), (5, 8), (2, 5, 8)):
            x = torch.randn(shape, requires_grad=True)
            expected = torch.relu(layer(x))
            y = torch.nn.functional.relu_(layer(x))
            assert torch.equal(y, expected)
            y.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("dtype", "rows"), [(FP64, 5), (BF16, 5), (BF16, 40)])
def test_batched_gradients(dtype, rows, p):
    """``is_grads_batched`` uses PyTorch's older vmap, with fewer rules than ``torch.func``'s."""
    inputs = make_inputs(rows, 7, 6, 3, dtype, adapter_dtype=torch.promote_types(dtype, FP32))
    leaves = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    y = fused_lora_linear(**inputs, dropout_p=p, impl="torch")
    dys = torch.randn(4, *y.shape).to(dtype)
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for gradient, parts in zip(batched, zip(*alone, strict=True), strict=True):
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, torch.stack(parts), rtol=4 * unit, atol=4 * unit)


def test_export_leaves_later_calls_right():
    """Tensors created during tracing are not cached for later calls."""
    from fused_lora.ops import constants

    layer = FusedLoRALinear(64, 6, rank=4, dropout=0.5, impl="torch")
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    expected = layer(x)
    constants._made.clear()
    torch.export.export(layer, (x,))
    torch.manual_seed(3)
    assert torch.equal(layer(x), expected)


def vmap(function, x):
    return torch.func.vmap(function)(x)


def jvp(function, x):
    return torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize(("transform", "p"), [(vmap, 0.0), (jvp, 0.0), (jvp, 0.5)])
def test_transforms_leave_later_calls_right(transform, p):
    """Tensors wrapped by ``torch.func`` are not cached for later calls."""
    from fused_lora.ops import constants

    inputs = make_inputs(5, 8, 6, 2, FP32)
    x = inputs.pop("x")

    def layer(x):
        torch.manual_seed(3)
        return fused_lora_linear(x, **inputs, dropout_p=p, impl="torch")

    expected = layer(x)
    constants._made.clear()
    transform(layer, x)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, constants._made.values()))
    assert torch.equal(layer(x), expected)


def saved_bytes(function) -> tuple[int, list[torch.Tensor]]:
    """Bytes that ``function`` saves for backward, counting each storage once, and the tensors."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(storages.values()), saved


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_the_input_the_thin_product_and_the_mask_as_bits(impl, p):
    """In bf16 at most x + S + the packed mask, which is less than x + S + M·K bytes."""
    if impl == "triton":
        pytest.importorskip("triton")
    M, K, N, R = (1024, 768, 3072, 16) if impl == "torch" else (128, 96, 384, 16)
    inputs = make_inputs(M, K, N, R, BF16)
    for name in ("x", "lora_A", "lora_B"):
        inputs[name].requires_grad_()
    parameters = sum(inputs[n].nbytes for n in ("weight", "lora_A", "lora_B"))
    total, _ = saved_bytes(lambda: fused_lora_linear(**inputs, dropout_p=p, impl=impl))
    x, S, keep_bits = 2 * M * K, 4 * M * R, M * -(-K // 128) * 16
    assert total - parameters <= x + S + (keep_bits if p else 0)
    assert total - parameters <= x + S + M * K  # one byte per element: PEFT's mask alone


def test_saves_no_input_for_a_frozen_adapter_and_nothing_without_grad():
    inputs = make_inputs(64, 96, 80, 4, FP32)
    _, saved = saved_bytes(lambda: fused_lora_linear(**inputs, impl="torch"))
    assert not saved
    inputs["lora_B"].requires_grad_()
    _, saved = saved_bytes(lambda: fused_lora_linear(**inputs, impl="torch", dropout_p=0.1))
    assert {tuple(t.shape) for t in saved} == {(4, 96), (80, 4), (64, 4)}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            _, saved = saved_bytes(lambda: fused_lora_linear(**inputs, impl="torch"))
        assert not saved


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_inputs_and_saved_tensors_are_never_mutated(impl):
    inputs = make_inputs(17, 40, 24, 4, FP32)
    leaves = [inputs[n].requires_grad_() for n in ("x", "lora_A", "lora_B", "bias")]
    before = {n: t.detach().clone() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
    kept = {}

    def pack(tensor):
        kept[len(kept)] = (tensor, tensor.detach().clone())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fused_lora_linear(**inputs, dropout_p=0.2, impl=impl)
    dy = torch.randn_like(y)
    dy_before = dy.clone()
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(dy, dy_before)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name
    for tensor, copy in kept.values():
        assert torch.equal(tensor, copy)


def test_changing_x_in_place_before_backward_is_an_error():
    inputs = make_inputs(5, 7, 6, 3, FP32)
    inputs["lora_A"].requires_grad_()
    y = fused_lora_linear(**inputs, impl="torch")
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_gradients_accumulate(impl):
    inputs = make_inputs(17, 40, 24, 4, FP32)
    A, B = inputs["lora_A"].requires_grad_(), inputs["lora_B"].requires_grad_()
    fused_lora_linear(**inputs, impl=impl).sum().backward()
    once = A.grad.clone(), B.grad.clone()
    fused_lora_linear(**inputs, impl=impl).sum().backward()
    torch.testing.assert_close((A.grad, B.grad), (2 * once[0], 2 * once[1]))


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_repeats_the_mask(impl, reentrant):
    layer = FusedLoRALinear(40, 24, rank=4, dropout=0.3, impl=impl)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(17, 40, requires_grad=True)
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        y = wrap(layer, x)
        leaves = (x, layer.lora_A, layer.lora_B)
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# weight and adapter dtype, dtype of x, autocast's dtype
AUTOCAST = [
    (FP32, FP32, FP32, BF16),
    (FP32, FP32, FP32, torch.float16),
    (BF16, FP32, FP32, BF16),
    (BF16, FP32, BF16, BF16),
    (BF16, BF16, FP32, BF16),
]


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("case", AUTOCAST, ids=str)
def test_autocast(impl, case):
    base, adapter, x_dtype, cast = case
    inputs = make_inputs(63, 40, 24, 4, base, adapter)
    inputs["x"] = inputs["x"].to(x_dtype)
    dy = torch.randn(63, 24).to(cast)

    def under_autocast(**kw):
        with torch.autocast("cpu", dtype=cast):
            y = fused_lora_linear(**kw, impl=impl)
        assert y.dtype == cast
        return y

    got = run(under_autocast, inputs, dy)
    names = {"dx": "x", "dA": "lora_A", "dB": "lora_B", "dbias": "bias"}
    for key, name in names.items():
        assert got[key].dtype == inputs[name].dtype, key
    lowered = {k: v.to(cast) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    expected = run(lambda **kw: fused_lora_linear(**kw, impl="reference"), lowered, dy)
    for key, value in got.items():
        assert relative_rms(value, expected[key]) <= 2.0**-7, key


def test_backward_inside_autocast_keeps_the_dtypes():
    inputs = make_inputs(17, 40, 24, 4, FP32)
    x, A = inputs["x"].requires_grad_(), inputs["lora_A"].requires_grad_()
    y = fused_lora_linear(**inputs, impl="torch")
    with torch.autocast("cpu", dtype=BF16):
        got = torch.autograd.grad(y.sum(), (x, A), retain_graph=True)
    expected = torch.autograd.grad(y.sum(), (x, A))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_autocast_of_every_device_is_seen(device):
    """``_is_any_autocast_enabled`` does not cover every device."""
    if not torch.amp.is_autocast_available(device):
        pytest.skip(f"no autocast on {device} in this build")
    tensor = SimpleNamespace(
        device=torch.device(device), is_cpu=device == "cpu", is_cuda=device == "cuda"
    )
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        assert modes.autocasts(tensor)
    finally:
        torch.set_autocast_enabled(device, before)
    assert modes.autocasts(tensor) == before


def test_autocast_leaves_float64_alone():
    inputs = make_inputs(5, 7, 6, 3, FP64)
    with torch.autocast("cpu", dtype=BF16):
        assert fused_lora_linear(**inputs, impl="torch").dtype == FP64


def test_autocast_saves_x_in_the_low_dtype():
    inputs = make_inputs(256, 128, 64, 4, FP32)
    inputs["lora_A"].requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        _, saved = saved_bytes(lambda: fused_lora_linear(**inputs, impl="torch"))
    assert BF16 in {t.dtype for t in saved if t.shape == (256, 128)}
    assert FP32 not in {t.dtype for t in saved if t.shape == (256, 128)}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 16, 17])
@pytest.mark.parametrize("scaling", [0.7, 0.0, torch.tensor(0.7)], ids=["float", "zero", "tensor"])
def test_thin_products_of_many_rows(dtype, rank, scaling):
    """From 128 rows on, a CPU may compute them as transposes."""
    inputs = make_inputs(130, 40, 24, rank, dtype, scaling=scaling)
    dy = torch.randn(130, 24).to(dtype)
    got = run(lambda **kw: fused_lora_linear(**kw, impl="torch"), inputs, dy)
    assert all(t.is_contiguous() for t in got.values())
    assert_as_good_as_eager(got, in_float64(inputs, dy), in_eager(inputs, dy))


def test_a_tensor_scaling_is_a_float_scaling():
    inputs = make_inputs(17, 40, 24, 4, FP32, scaling=0.7)
    dy = torch.randn(17, 24)
    for impl in ALL_IMPLS:
        number = run(lambda impl=impl, **kw: fused_lora_linear(**kw, impl=impl), inputs, dy)
        as_tensor = inputs | {"scaling": torch.tensor(0.7)}
        tensor = run(lambda impl=impl, **kw: fused_lora_linear(**kw, impl=impl), as_tensor, dy)
        for name, value in number.items():
            torch.testing.assert_close(tensor[name], value)


@pytest.mark.parametrize(
    ("needs", "extra"),
    [
        ("x", ["weight", "keep_bits"]),
        ("lora_A", ["x", "keep_bits"]),
        ("lora_B", ["S"]),
        ("bias", []),
        ("x lora_B", ["weight", "keep_bits", "S"]),
    ],
)
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_saves_exactly_what_its_gradients_need(needs, extra, impl):
    """Apart from the adapter. All shapes differ, so the list of shapes identifies the tensors."""
    inputs = make_inputs(64, 96, 80, 8, FP32)
    for name in needs.split():
        inputs[name].requires_grad_()
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        fused_lora_linear(**inputs, dropout_p=0.1, impl=impl)
    shapes = {"x": (64, 96), "weight": (80, 96), "keep_bits": (64, 4), "S": (64, 8)}
    assert sorted(saved) == sorted([(8, 96), (80, 8), *(shapes[name] for name in extra)])


def test_a_float32_bias_gets_a_float32_sum_under_autocast():
    """The gradient of a float32 bias is summed in float32, although dY is in bfloat16."""
    inputs = make_inputs(300, 40, 24, 4, FP32)
    bias, dy = inputs["bias"].requires_grad_(), torch.randn(300, 24).to(BF16)
    with torch.autocast("cpu", dtype=BF16):
        y = fused_lora_linear(**inputs, impl="torch")
    (got,) = torch.autograd.grad(y, bias, dy)
    torch.testing.assert_close(got, dy.float().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", ["x lora_A lora_B bias", "lora_A lora_B", "x", "x lora_B"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_are_the_same_with_a_graph_of_their_own(needs, p):
    """``create_graph`` uses other formulas, the only ones that gradgradcheck covers."""
    inputs = make_inputs(5, 7, 6, 3, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in needs.split()]
    y = fused_lora_linear(**inputs, dropout_p=p, impl="torch")
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy, create_graph=True), plain)
