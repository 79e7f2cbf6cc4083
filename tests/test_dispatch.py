"""What runs a call: explicit choices, automatic ones, the fallback, and the strategies."""

import functools
import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch

from fused_lora import FusedLoRALinear, explain, fused_lora_linear
from fused_lora.ops import cpu_gemm, dispatch, torch_impl
from fused_lora.strategy import cost, devices
from fused_lora.strategy.devices import KNOWN
from support import assert_as_good_as_eager, make_inputs, needs_triton, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _fresh_decisions():
    dispatch.clear_decisions()
    yield
    dispatch.clear_decisions()


def call(impl, **kwargs):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    y = fused_lora_linear(x, weight, A, B, impl=impl, **kwargs)
    return y, torch.autograd.grad(y.sum(), (x, A, B))


def test_auto_on_a_cpu_is_torch():
    decision = explain(FusedLoRALinear(8, 6, rank=2))
    assert (decision.impl, decision.forward) == ("torch", None)
    assert "cpu" in decision.reason


def test_explain_of_other_choices():
    layer = FusedLoRALinear(8, 6, rank=2)
    assert explain(layer, impl="reference").impl == "reference"
    assert explain(layer, impl="torch").reason == "requested"
    layer.merge()
    assert "merged" in str(explain(layer))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_triton_that_cannot_run_says_why():
    """Without the interpreter, on a machine without a GPU: an error, not "0 active drivers"."""
    script = (
        "import torch, fused_lora\n"
        "layer = fused_lora.FusedLoRALinear(8, 6, rank=2, impl='triton')\n"
        "try: layer(torch.randn(5, 8))\n"
        "except ValueError as error: print(error)\n"
        "layer.impl = 'auto'\n"
        "layer(torch.randn(5, 8)).sum().backward()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert "impl='triton' cannot run here" in done.stdout
    assert "Triton" in done.stdout
    assert done.stderr == ""


def test_float64_is_not_for_triton():
    pytest.importorskip("triton")
    layer = FusedLoRALinear(8, 6, rank=2, dtype=torch.float64, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        layer(torch.randn(5, 8, dtype=torch.float64))


def test_explain_tells_of_a_dtype_that_the_cpu_emulates(monkeypatch):
    layer = FusedLoRALinear(8, 6, rank=2, dtype=torch.bfloat16)
    for dtypes in ({torch.bfloat16}, {torch.float16}):
        monkeypatch.setattr(cpu_gemm, "EMULATED", frozenset(dtypes))
        dispatch.clear_decisions()
        for impl in ("auto", "torch"):
            reason = explain(layer, impl=impl).reason
            assert ("no instructions for bfloat16" in reason) is (layer.weight.dtype in dtypes)
    dispatch.clear_decisions()


def test_triton_explains_its_strategies():
    pytest.importorskip("triton")
    decision = explain(FusedLoRALinear(80, 60, rank=2, impl="triton"), tokens=1000)
    assert (decision.impl, decision.forward, decision.backward) == ("triton", "split", "split")
    assert "split" in str(decision)


class BrokenKernels:
    """A stand-in for ``strategies`` whose ``broken`` functions fail like broken kernels."""

    def __init__(self, strategies, broken):
        self.strategies, self.broken, self.calls = strategies, broken, []

    def __getattr__(self, name):
        self.calls.append(name)
        if name in self.broken:
            raise RuntimeError("out of resource: shared memory\nlong details")
        return getattr(self.strategies, name)


@pytest.mark.parametrize("broken", ["forward", "backward", "dropout_mask"])
def test_auto_falls_back_with_one_warning(broken, monkeypatch):
    pytest.importorskip("triton")
    from fused_lora.kernels import strategies

    monkeypatch.setattr(dispatch, "_may_run_triton", lambda x, weight: True)
    monkeypatch.setattr(dispatch, "_not_worth_it", lambda device: None)
    if broken == "dropout_mask":  # PyTorch's operators run the forward with Triton's mask
        modelled = {"forward": "torch", "backward": "split"}
        monkeypatch.setattr(
            dispatch, "modelled", lambda call, device, _: (modelled[call.direction], "modelled")
        )
    dispatch.clear_decisions()
    kernels = BrokenKernels(strategies, (broken,))
    original = dispatch.TritonRunner.__init__

    def with_broken_kernels(self, *args):
        original(self, *args)
        self.strategies = kernels

    monkeypatch.setattr(dispatch.TritonRunner, "__init__", with_broken_kernels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [call("auto", dropout_p=0.3) for _ in range(2)]
    assert kernels.calls.count(broken) == 1
    messages = [str(w.message) for w in caught if "fused_lora" in str(w.message)]
    assert len(messages) == 1
    assert "out of resource: shared memory" in messages[0]
    assert "impl='torch'" in messages[0]
    assert "details" not in messages[0]
    expected = call("torch", dropout_p=0.3)
    for y, grads in results:
        torch.testing.assert_close((y, *grads), (expected[0], *expected[1]))


def test_a_gpu_that_cannot_run_the_kernels_is_announced_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_not_worth_it", lambda device: "too old")
    gpu = torch.device("cuda", 0)
    decide = functools.partial(dispatch.decide, "auto", gpu, torch.float16)
    with pytest.warns(UserWarning, match="too old") as caught:
        decisions = [decide(rows, 8, 8, 2, False) for rows in (1, 2, 3)]
    assert len(caught) == 1
    assert {decision.impl for decision in decisions} == {"torch"}


def test_an_explicit_choice_does_not_fall_back(monkeypatch):
    pytest.importorskip("triton")
    from fused_lora.kernels import strategies

    def fail(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(strategies, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        call("triton")


def test_subclasses_take_aten_operators():
    """A weight of a tensor subclass runs PyTorch's own operators."""

    class Subclass(torch.Tensor):
        pass

    weight = torch.randn(6, 8).as_subclass(Subclass)
    assert (
        dispatch.choose(torch.randn(5, 8), weight, torch.randn(6, 2), "auto", False) is torch_impl
    )


TRITON = ("split", "seeded", "addmm")
SHAPE = {"M": 16_384, "N": 4096, "L": 4096, "rank": 16}
# GPU, item size, changes to SHAPE, strategy
STRATEGIES = [
    ("h100", 2, {"L": 1024}, "split"),
    ("h100", 2, {}, "seeded"),
    ("a100", 2, {"L": 65_536}, "seeded"),
    ("h100", 4, {"L": 1024}, "seeded"),
    ("h100", 2, {"L": 1024, "aligned": False}, "seeded"),
    ("h100", 2, {"L": 1024, "M": 8192}, "seeded"),  # 64 MiB of output, partly in 50 MiB of L2
    ("h100", 2, {"L": 1024, "M": 4300, "N": 10_000}, "seeded"),  # tiles fill 90 % of the GPU
    ("b200", 2, {"L": 1024, "M": 65_536}, "seeded"),
    ("rtx5090", 2, {"L": 1024, "M": 65_536}, "seeded"),
    ("mi300x", 2, {"L": 1024, "M": 65_536}, "seeded"),
    ("h100", 2, {"M": 16, "N": 16_384}, "single_pass"),
    ("h100", 2, {"M": 16, "N": 16_384, "masked": "operand"}, "addmm"),
    ("h100", 2, {"M": 16, "N": 16_384, "rank": 128}, "addmm"),
    # The host is the bottleneck: a strategy is selected if it saves enough host time.
    ("h100", 2, {"M": 512, "N": 1024, "L": 1024}, "addmm"),
    ("h100", 2, {"M": 512, "N": 1024, "L": 1024, "repeated": False}, "torch"),
    ("h100", 2, {"M": 512, "N": 1024, "L": 1024, "repeated": False, "strategies": TRITON}, "addmm"),
    ("h100", 2, {"M": 512, "N": 1024, "L": 1024, "repeated": False, "masked": "operand"}, "addmm"),
    ("h100", 2, {"M": 16_384, "repeated": False}, "seeded"),  # the device is slower here
]


@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_strategies(case):
    gpu, itemsize, changes, expected = case
    arguments = SHAPE | {"masked": None, "aligned": True} | changes
    strategy, reason = cost.choose_strategy(KNOWN[gpu], itemsize, **arguments)
    assert strategy == expected, reason
    assert reason


def test_the_reason_names_the_modelled_gain():
    for L, sign in ((1024, "modelled gain of"), (4096, "is under 5%")):
        arguments = SHAPE | {"L": L, "masked": None, "aligned": True}
        assert sign in cost.choose_strategy(KNOWN["h100"], 2, **arguments)[1]


@needs_triton
def test_explain_tells_the_modelled_gain(monkeypatch):
    monkeypatch.setattr(devices, "device_of", lambda device: KNOWN["h100"])
    layer = FusedLoRALinear(1024, 4096, rank=16, impl="triton", dtype=BF16)
    decision = explain(layer, tokens=16_384)
    assert decision.forward == "split"
    assert "modelled gain of" in decision.reason


@needs_triton
def test_a_decision_is_taken_once_a_shape(monkeypatch):
    """The strategy is selected once per shape and direction, then cached."""
    asked = []
    monkeypatch.setattr(cost, "choose_strategy", lambda *a, **k: asked.append(a) or ("split", ""))
    x, weight, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6, 2)
    runners = {dispatch.choose(x, weight, B, "triton", False) for _ in range(3)}
    assert len(runners) == 1
    assert len(asked) == 2  # forward and backward


@pytest.fixture
def pretended(monkeypatch):
    """``auto`` selects the kernels, which are interpreted."""
    monkeypatch.setattr(dispatch, "_may_run_triton", lambda x, weight: True)
    monkeypatch.setattr(dispatch, "_not_worth_it", lambda device: None)
    dispatch.clear_decisions()
    yield monkeypatch
    monkeypatch.undo()
    dispatch.clear_decisions()


@needs_triton
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_errors_that_pytorch_would_not_survive_are_raised(error, pretended):
    from fused_lora.kernels import strategies

    def fail(*args):
        raise error("full, or an illegal address")

    pretended.setattr(strategies, "forward", fail)
    with pytest.raises(error):
        fused_lora_linear(**make_inputs(5, 8, 6, 2, FP32))


@needs_triton
def test_a_failure_is_remembered_for_its_dtype_alone(pretended):
    from fused_lora.kernels import strategies

    forward, ran = strategies.forward, []

    def fail_in_half(operands, *args):
        ran.append(operands.x.dtype)
        if operands.x.dtype == FP16:
            raise RuntimeError("no")
        return forward(operands, *args)

    pretended.setattr(strategies, "forward", fail_in_half)
    with pytest.warns(UserWarning, match="Triton failed"):
        fused_lora_linear(**make_inputs(5, 8, 6, 2, FP16))
    fused_lora_linear(**make_inputs(5, 8, 6, 2, FP32))
    assert ran == [FP16, FP32]


def test_explain_knows_the_state_of_a_layer():
    layer = FusedLoRALinear(80, 72, rank=2)
    layer.enabled = False
    assert "disabled" in explain(layer).reason


@needs_triton
def test_explain_leaves_dropout_out_in_eval_mode():
    """With few rows, dropout of x rules out the single pass in training, but not in eval mode."""
    layer = FusedLoRALinear(80, 72, rank=2, dropout=0.5, impl="triton")
    assert explain(layer, tokens=8).forward == "split"
    assert explain(layer.eval(), tokens=8).forward == "single_pass"
    assert explain(layer, tokens=8, dropout_p=0.5).forward == "split"
    # dY is never dropped, whatever the forward's operand is.
    assert explain(layer.train(), tokens=8).backward == "single_pass"


@needs_triton
def test_the_alignment_of_x_reaches_the_choice(monkeypatch):
    """Whether the rows of x start on 16 bytes is passed to the choice of a strategy."""
    asked = []

    def record(*args, aligned, **kwargs):
        asked.append(aligned)
        return "split", "recorded"

    monkeypatch.setattr(cost, "choose_strategy", record)
    weight, B = torch.zeros(64, 64, dtype=BF16), torch.zeros(64, 2)
    flat = torch.zeros(5 * 72 + 1, dtype=BF16)
    views = {
        "whole": flat[:320].view(5, 64),
        "offset": flat[1:321].view(5, 64),
        "odd rows": flat[: 5 * 66].view(5, 66)[:, :64],
    }
    forward = {}
    for name, x in views.items():
        dispatch.clear_decisions()
        asked.clear()
        dispatch.choose(x, weight, B, "triton", False)
        forward[name] = asked[0]
    dispatch.clear_decisions()
    assert forward == {"whole": True, "offset": False, "odd rows": False}


def test_a_single_pass_needs_columns_for_half_the_gpu():
    few = {"M": 16, "L": 4096, "rank": 16, "masked": None, "aligned": True}
    assert cost.choose_strategy(KNOWN["h100"], 2, N=66 * 64, **few)[0] == "single_pass"
    assert cost.choose_strategy(KNOWN["h100"], 2, N=65 * 64, **few)[0] == "addmm"


def results_of(inputs: dict, dy: torch.Tensor, p: float, impl: str) -> dict:
    """Output and gradients of one call; the seed, and so the mask, is the same in every dtype."""
    torch.manual_seed(0)
    return run(lambda **kw: fused_lora_linear(**kw, dropout_p=p, impl=impl), inputs, dy)


# strategy of forward, of backward, and the implementation of a call without dropout
DIRECTIONS = [
    ("torch", "split", "triton"),
    ("addmm", "torch", "triton"),
    ("torch", "torch", "torch"),
]


@needs_triton
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", DIRECTIONS, ids=str)
def test_either_direction_may_be_pytorchs(case, p, pretended):
    """Either implementation can read what the other saved, and both use the same mask."""
    forward, backward, impl = case
    chosen = {"forward": forward, "backward": backward}
    pretended.setattr(
        dispatch, "modelled", lambda call, device, _: (chosen[call.direction], "modelled")
    )
    for dtype in (BF16, FP32):
        inputs = make_inputs(130, 40, 24, 5, dtype)  # PyTorch's S is a transpose from 128 rows on
        dy = torch.randn(130, 24, dtype=torch.float64)
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        exact = results_of(wide, dy, p, "reference")
        eager = results_of(inputs, dy.to(dtype), p, "reference")
        assert_as_good_as_eager(results_of(inputs, dy.to(dtype), p, "auto"), exact, eager)
        tensors = inputs["x"], inputs["weight"], inputs["lora_A"]
        assert explain(*tensors).impl == impl
        assert explain(*tensors, dropout_p=0.3).impl == "triton"  # for the mask at least


def test_a_choice_on_a_gpu_says_that_nothing_was_measured(pretended):
    pytest.importorskip("triton")
    pretended.setattr(devices, "device_of", lambda device: KNOWN["h100"])
    pretended.setattr(dispatch, "triton_problem", lambda device: None)
    pretended.setattr(dispatch.tuning_cache, "lookup", lambda call, device: None)
    gpu = torch.device("cuda", 0)
    reason = dispatch.decide("auto", gpu, BF16, 8192, 4096, 4096, 16, False).reason
    assert "modelled, not measured for this shape" in reason
    assert "python -m fused_lora.tune" in reason


# rows per segment, K, N, segments with a weight each, forward, backward
SEGMENTED = [
    (256, 2048, 1536, True, "addmm", "addmm"),  # few rows: the weights are most of the bytes
    (256, 768, 2048, True, "split", "addmm"),
    (1024, 768, 2048, True, "split", "split"),
    (1024, 768, 2048, False, "split", "split"),
]


@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_segments_on_an_h100(case, monkeypatch):
    """One launch where it moves so many bytes less that the slower product is worth it."""
    rows, K, N, of_experts, forward, backward = case
    monkeypatch.setattr(devices, "device_of", lambda device: KNOWN["h100"])
    call = dispatch.SegmentedCall(128 * rows, K, N, 128, of_experts, True, frozenset([(16, 65536)]))
    decision = dispatch.decide_segmented("triton", torch.device("cpu"), torch.bfloat16, call)
    assert (decision.forward, decision.backward) == (forward, backward)
    assert "modelled gain" in decision.reason
    for name in ("split", "addmm"):
        decision = dispatch.decide_segmented(
            f"triton:{name}", torch.device("cpu"), torch.bfloat16, call
        )
        assert (decision.forward, decision.backward) == (name, name)
    unaligned = call._replace(aligned=False)
    decision = dispatch.decide_segmented("triton", torch.device("cpu"), torch.bfloat16, unaligned)
    assert decision.forward == "addmm"


def test_untuned_on_an_h100_the_vendors_gemm_runs_every_shape():
    """docs/usage.md and docs/tuning.md state this; the counts are those of docs/usage.md."""
    from harness.shapes import GPU_FULL

    counts = {}
    for gpu in ("h100", "h200"):
        for M, K, N, R in GPU_FULL:
            for backward, p in itertools.product((False, True), (0.0, 0.1)):
                columns, inner = (K, N) if backward else (N, K)
                masked = ("output" if backward else "operand") if p else None
                strategy, _ = cost.choose_strategy(
                    KNOWN[gpu], 2, M, columns, inner, R,
                    masked=masked, aligned=True, gradients=backward,
                )  # fmt: skip
                counts[strategy] = counts.get(strategy, 0) + 1
    assert counts == {"seeded": 270, "addmm": 34}
