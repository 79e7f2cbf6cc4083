"""Registered operators: PyTorch's checks of schema, autograd, fake tensors and dynamic shapes."""

import importlib.util
import itertools
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fused_lora import fused_lora_linear
from fused_lora.ops import cpu_gemm, custom_ops, dropout
from fused_lora.ops.operands import Operands
from support import UNIT_ROUNDOFF, by_default, make_inputs, relative_rms

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
has_triton = importlib.util.find_spec("triton") is not None

PLAIN = {
    "shape": (5, 40, 24, 4),
    "dtype": FP32,
    "adapter_dtype": None,
    "grads": ("x", "lora_A", "lora_B"),
    "layout": "contiguous",
    "bias": True,
    "p": 0.0,
    "impl": "auto",
    "base": False,
}
CASES = {
    "plain": {},
    "one row": {"shape": (1, 40, 24, 4)},
    "rank 3": {"shape": (5, 7, 6, 3), "p": 0.3},
    "bf16": {"dtype": BF16, "adapter_dtype": FP32, "p": 0.3},
    "fp16": {"dtype": FP16},
    "fp64": {"dtype": FP64, "p": 0.3},
    "no bias": {"bias": False},
    "dropout": {"p": 0.3},
    "three dimensions": {"layout": "three dimensions", "p": 0.3},
    "one dimension": {"layout": "one dimension"},
    "rows apart": {"layout": "rows apart", "p": 0.3},
    "transposed": {"layout": "transposed"},
    "expanded": {"layout": "expanded"},
    "no rows": {"shape": (0, 40, 24, 4), "p": 0.3},
    "no columns": {"shape": (5, 40, 0, 4), "p": 0.3},
    "no inputs": {"shape": (5, 0, 24, 4)},
    "no gradient": {"grads": (), "p": 0.3},
    "only x": {"grads": ("x",), "p": 0.3},
    "only A": {"grads": ("lora_A",), "p": 0.3},
    "only B": {"grads": ("lora_B",)},
    "bias trains": {"grads": ("x", "lora_A", "lora_B", "bias")},
    "beside a base": {"base": True, "bias": False, "p": 0.3},
    "beside a wider base": {"base": True, "bias": False, "dtype": BF16},
    "triton": {"impl": "triton", "p": 0.3},
    "triton, bf16, rank 3": {"impl": "triton", "shape": (5, 7, 6, 3), "dtype": BF16},
    "triton, few rows": {"impl": "triton", "shape": (3, 64, 48, 4)},
}


def laid_out(x, layout):
    match layout:
        case "three dimensions":
            return torch.stack((x, x))
        case "one dimension":
            return x[0]
        case "rows apart":
            return torch.cat((x, x), 1)[:, : x.shape[1]]
        case "transposed":
            return x.t().contiguous().t()
        case "expanded":
            return x[:1].expand_as(x)
    return x


def arguments(shape, dtype, adapter_dtype, grads, layout, bias, p, impl, base):
    inputs = make_inputs(*shape, dtype, adapter_dtype, bias=bias)
    x = laid_out(inputs["x"], layout)
    M, N = x.shape[:-1].numel(), shape[2]
    keep = dropout.keep_count(p)
    seed = torch.tensor(7) if p else None
    beside = torch.randn(*x.shape[:-1], N) if base else None  # float32 for every dtype of x
    weight = None if base else inputs["weight"]
    tensors = {"x": x, **{name: inputs[name] for name in ("lora_A", "lora_B", "bias")}}
    for name in grads:
        tensors[name] = tensors[name].detach().requires_grad_()
    forward = (
        tensors["x"], weight, tensors["lora_A"], tensors["lora_B"], tensors["bias"],
        torch.tensor(1.3), seed, keep, impl, beside,
    )  # fmt: skip
    return forward, M


BY_DEFAULT = ["plain", "rank 3", "bf16", "fp64", "rows apart", "no rows", "only A", "beside a base"]
BY_DEFAULT += ["triton", "triton, bf16, rank 3"]


@pytest.mark.parametrize("name", by_default(BY_DEFAULT, CASES))
def test_opcheck(name):
    case = PLAIN | CASES[name]
    if case["impl"] == "triton" and not has_triton:
        pytest.skip("needs Triton")
    check_both_ways(case)


# Every dtype, and every layout in one dtype.
COMBINED = [
    ("contiguous", BF16),
    ("three dimensions", BF16),
    ("transposed", BF16),
    ("contiguous", FP16),
    ("three dimensions", FP32),
    ("transposed", FP64),
]


@pytest.mark.parametrize("case", by_default(COMBINED[:1], COMBINED), ids=str)
def test_opcheck_of_every_combination(case):
    layout, dtype = case
    for grads, bias, p, rows in itertools.product(
        ((), PLAIN["grads"]), (True, False), (0.0, 0.3), (0, 3)
    ):
        varied = {"grads": grads, "bias": bias, "p": p, "shape": (rows, 8, 6, 2)}
        check_both_ways(PLAIN | varied | {"dtype": dtype, "layout": layout})


def check_both_ways(case):
    """Run ``opcheck`` on the operator and on its backward operator."""
    forward, M = arguments(**case)
    torch.library.opcheck(torch.ops.fused_lora.lora_linear.default, forward)

    with torch.no_grad():
        y, S, keep_bits, scaling = torch.ops.fused_lora.lora_linear(*forward)
        x, weight, A, B, _, _, seed, keep, impl, _ = forward
        dy = torch.randn(M, y.shape[-1]).to(x.dtype)
        needs = [f in case["grads"] for f in ("x", "lora_A", "lora_B")]
        flat, keep_bits = x.reshape(M, x.shape[-1]), None if seed is None else keep_bits
        backward = (
            dy, flat.detach(), weight, A.detach(), B.detach(), S, scaling,
            keep_bits, dropout.KEEP_ALL / keep, impl, needs,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fused_lora.lora_linear_backward.default, backward)


@pytest.mark.parametrize("name", [n for n in CASES if "base" not in n and CASES[n].get("grads", 1)])
def test_operators_compute_what_eager_does(name):
    """Bit-identical results and dtypes; the gradients come from the registered formula."""
    case = PLAIN | CASES[name]
    if case["impl"] == "triton" and not has_triton:
        pytest.skip("needs Triton")
    args, _ = arguments(**case)
    x, weight, A, B, bias, scaling, *_ = args
    leaves = [t for t in (x, A, B, bias) if t is not None and t.requires_grad]
    seed = {} if not case["p"] else {"dropout_p": case["p"]}
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "draw_seed", lambda device: args[6])
        eager = fused_lora_linear(
            x, weight, A, B, bias, scaling=float(scaling), impl=case["impl"], **seed
        )
    for y in (eager, custom_ops.lora_linear(Operands(*args))):
        dy = torch.ones_like(y)
        outcomes.append((y, *torch.autograd.grad(y, leaves, dy)))
    for registered, expected in zip(*outcomes, strict=True):
        assert registered.dtype == expected.dtype
        torch.testing.assert_close(registered, expected, rtol=0, atol=0)


def test_double_backward():
    inputs = {k: v for k, v in make_inputs(5, 7, 6, 3, FP64).items() if k != "scaling"}
    leaves = [inputs[n].requires_grad_() for n in ("x", "lora_A", "lora_B", "bias")]

    def layer(x, A, B, bias):
        seed = torch.tensor(3)
        operands = Operands(x, inputs["weight"], A, B, bias, 1.3, seed, 40_000)
        return custom_ops.lora_linear(operands)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("emulated", [(), (BF16,)], ids=["plain", "emulated"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_traced_graph_holds_for_any_number_of_rows(dtype, emulated, monkeypatch):
    """Optimisations for few or many rows must not become guards of the graph."""
    monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset(emulated))
    inputs = make_inputs(5, 40, 24, 4, dtype, adapter_dtype=FP32, scaling=2.0)
    *tensors, scaling = inputs.values()
    call = partial(fused_lora_linear, scaling=scaling)
    graph = make_fx(call, tracing_mode="symbolic")(*tensors)
    assert not graph.shape_env.guards
    for rows in (17, 200):
        args = torch.randn(rows, 40).to(dtype), *tensors[1:]
        if dtype in emulated:  # only the graph rounds S, the base and the sum
            assert relative_rms(graph(*args), call(*args)) <= 3 * UNIT_ROUNDOFF[dtype]
        else:
            torch.testing.assert_close(graph(*args), call(*args))
