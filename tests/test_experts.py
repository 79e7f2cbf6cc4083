"""The forward of transformers' experts with adapters, and which experts it can run."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora.layers import experts as layer_experts
from fused_lora.layers.experts import ExpertAdapter, experts_forward
from support import relative_rms

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
from expert_nets import FP64, E, experts_of, routed  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")


def test_every_class_of_experts_is_known():
    """Those of the installed transformers, by what they run; one computes in float32."""
    root, found = Path(transformers.__file__).parent / "models", {}
    pattern = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    for folder in ("mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "granitemoe", "gpt_oss"):
        for name in pattern.findall((root / folder / f"modeling_{folder}.py").read_text("utf-8")):
            module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
            experts = getattr(module, name)
            experts = experts.__new__(experts)
            vars(experts).update(num_experts=E, has_bias=False, is_transposed=False)
            for run in ("eager", "grouped_mm", "batched_mm"):
                vars(experts)["config"] = SimpleNamespace(_experts_implementation=run)
                found[name, run] = layer_experts.unsupported(experts)
    assert len(found) == 18
    assert set(found.values()) == {None}


def test_words_that_transformers_may_add_later_are_refused():
    def grouped(self, x):
        return x * self.up_scale

    def loop(self, x):
        return x.tanh() @ self.down_proj

    assert layer_experts._words(grouped) == ({"up_scale"}, set())
    grouped.__module__, grouped.__name__ = moe.__name__, "grouped_mm_experts_forward"
    loop.__module__ = "transformers.models.new"
    assert layer_experts._function_reason("grouped_mm", grouped) == "experts that read up_scale"
    assert layer_experts._loop_reason(loop) == "an eager forward with tanh"
    assert layer_experts._words(print) == ({"what has no source"}, set())


def test_double_backward():
    experts = experts_of("GptOss", "batched_mm")
    x, index, shares = routed()
    A, B = torch.randn(E, 2, 32, dtype=FP64) * 0.3, torch.randn(E, 48, 2, dtype=FP64)
    inputs = x[:5].detach(), shares[:5].detach(), A, B
    inputs = [t.requires_grad_() for t in inputs]

    def call(x, shares, A, B):
        return experts_forward(
            experts, x, index[:5], shares, {"gate_up_proj": ExpertAdapter(A, B, 0.5)}
        )

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def draw(experts: nn.Module, scale=0.3, dropout_p=0.0) -> dict[str, ExpertAdapter]:
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        _, N, K = layer_experts.weight_of(experts, name).shape
        A, B = (torch.randn(shape, dtype=FP64) * scale for shape in ((E, 3, K), (E, N, 3)))
        found[name] = ExpertAdapter(A, B, 0.7, dropout_p)
    return found


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "MuseSpark"])
def test_sentinels_of_expert_parallelism_add_nothing(kind):
    """Slots of other ranks' experts: what these would compute must not be read."""
    experts = experts_of(kind, "batched_mm")
    experts._is_expert_parallel = True
    x, index, shares = routed()
    index[::3, 0], index[4] = E, E
    with torch.no_grad():
        shares[index == E] = 0
    adapters = draw(experts)
    folded = copy.deepcopy(experts)
    for name, (A, B, s, _) in adapters.items():
        delta = s * (B @ A)
        folded._parameters[name] += delta.mT if experts.is_transposed else delta

    def grads(call):
        y = call(x, index, shares)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, shares))

    got = grads(lambda *inputs: experts_forward(experts, *inputs, adapters))
    expected = grads(folded)
    assert not got[0][4].any()
    for value, other in zip(got, expected, strict=True):
        assert relative_rms(value, other) <= 1e-12


def test_masks_belong_to_tokens_not_to_experts():
    """With equal experts the route does not matter, nor does dropout's mask depend on it."""
    experts = experts_of()
    adapters = {
        name: ExpertAdapter(*(t[:1].expand_as(t) for t in adapter[:2]), adapter.scaling, 0.4)
        for name, adapter in draw(experts).items()
    }
    for p in experts.parameters():
        p.copy_(p[:1].expand_as(p))
    x, index, shares = routed()
    found = []
    for route in (index, (index + 1) % E, index.flip(0)):
        torch.manual_seed(4)
        found.append(experts_forward(experts, x, route, shares, adapters))
    without = {name: adapter._replace(dropout_p=0.0) for name, adapter in adapters.items()}
    whole = experts_forward(experts, x, index, shares, without)
    assert relative_rms(found[0], whole) > 0.05
    for y in found[1:]:
        assert relative_rms(y, found[0]) <= 1e-12


def test_checkpoints_repeat_the_mask():
    experts = experts_of()
    adapters = draw(experts, dropout_p=0.3)
    x, index, shares = routed()
    found = []
    for through in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(4)
        y = through(lambda x: experts_forward(experts, x, index, shares, adapters), x)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [FP64, torch.float32], ids=str)
def test_a_router_that_does_not_train(dtype):
    """The gradient of the tokens is the same; the shares may have another dtype."""
    experts = experts_of()
    adapters = draw(experts)
    x, index, shares = routed()
    found = []
    for used in (shares, shares.detach().to(dtype)):
        y = experts_forward(experts, x, index, used, adapters)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for value, expected in zip(*found, strict=True):
        assert relative_rms(value, expected) <= (1e-12 if dtype == FP64 else 1e-6)


def test_tokens_without_experts_get_zeros():
    order = layer_experts._Order.of(torch.zeros(4, 0, dtype=torch.long))
    y = layer_experts._WeighTokens.apply(torch.zeros(0, 8), torch.zeros(4, 0), order)
    assert torch.equal(y, torch.zeros(4, 8))
