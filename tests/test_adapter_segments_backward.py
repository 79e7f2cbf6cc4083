"""Many adapters in one batch: activation checkpoints, and where backward may run."""

import pytest
import torch
from models import llama, tokens
from torch.utils.checkpoint import checkpoint

from fused_lora import adapter_losses, adapter_segments, add_adapter, apply_lora

pytest.importorskip("peft")
from mixed_batches import (
    NAMES,
    assert_equal,
    clear,
    gradients,
    net,
    noisy,
    peft_net,
    samples,
    together,
)

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [net, peft_net])
def test_checkpointing(make, reentrant):
    model, x = make(dropout=0.2).train(), samples()
    repeated = lambda model, x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    torch.manual_seed(2)
    expected = together(model, x, NAMES)
    torch.manual_seed(2)
    assert_equal(together(model, x, NAMES, repeated), expected, 0.0)

    def late(names=None):
        clear(model)
        with adapter_segments(model, NAMES):
            loss = repeated(model, x.clone().requires_grad_()).sum()
        if names is None:
            loss.backward()
        else:
            with adapter_segments(model, names):
                loss.backward()

    for names in (None, NAMES):  # another block is not the block of that forward
        with pytest.raises(RuntimeError, match="expected backward inside the with block of ada"):
            late(names)
    # Forwards outside of blocks are repeated as they were, but not inside.
    repeated(model.eval(), x.clone().requires_grad_()).sum().backward()
    got = gradients(model)
    clear(model)
    model(x).sum().backward()
    assert_equal(got, gradients(model))
    outside = repeated(model, x.clone().requires_grad_())
    again = pytest.raises(RuntimeError, match="not computed in it before")
    with adapter_segments(model, NAMES), again:
        outside.sum().backward()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_nested_checkpoints(outer, inner):
    model, x = net(), samples()

    def nested(model, x):
        first = lambda x: checkpoint(model[0], x, use_reentrant=inner).sin()  # noqa: E731
        return model[2](checkpoint(lambda x: first(x).exp().tanh(), x, use_reentrant=outer))

    plain = lambda model, x: model[2](model[0](x).sin().exp().tanh())  # noqa: E731
    expected = together(model, x, NAMES, plain)
    assert_equal(together(model, x, NAMES, nested), expected)
    with adapter_segments(model, NAMES):
        loss = nested(model, x.clone().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="expected backward inside the with block"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_whole_checkpointed_models(reentrant):
    model, ids = llama(), tokens(6, 9)
    apply_lora(model, rank=4)
    add_adapter(model, "b", rank=2)
    add_adapter(model, "c", rank=6)
    noisy(model.double().train())
    run = lambda model, ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    expected = together(model, ids, NAMES, run)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(together(model, ids, NAMES, run), expected)
    with adapter_segments(model, NAMES):
        loss = run(model, ids).sum()
    with pytest.raises(RuntimeError, match="expected backward inside the with block"):
        loss.backward()
    clear(model)
    run(model, ids).sum().backward()  # chains and gated MLPs are repeated as they ran


def test_unknown_hooks_need_backward_inside():
    model, x = net(), samples()
    offload = torch.autograd.graph.save_on_cpu
    expected = together(model, x, NAMES)

    def offloaded(model, x):
        with offload():
            return model(x)

    assert_equal(together(model, x, NAMES, offloaded), expected, 0.0)
    with adapter_segments(model, NAMES):
        loss = offloaded(model, x).sum()
    with pytest.raises(RuntimeError, match="expected backward inside the with block"):
        loss.backward()


def test_backward_outside_without_checkpoints():
    model, x = net(), samples()
    expected = together(model, x, NAMES)
    clear(model)
    with adapter_segments(model, NAMES):
        losses = adapter_losses(model(x).square().mean(-1), NAMES)
    sum(losses.values()).backward()
    assert_equal({**expected, **gradients(model)}, expected, 0.0)
