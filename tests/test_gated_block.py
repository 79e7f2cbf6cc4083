"""Gated MLPs that run as one block, and whatever makes them run their own forward."""

import pytest
import torch
import torch.nn.functional as F
from together import MLP, alone, assert_same, gradients, in_block, rand, small
from torch import nn

from fused_lora import (
    FusedLoRALinear,
    fuse_projections,
    lora_layers,
    unfuse_projections,
    unload_lora,
)


class Twice(FusedLoRALinear):
    def forward(self, input):
        return 2 * super().forward(input)


CHANGES = {
    "another activation": lambda m: setattr(m, "act", nn.Tanh()),
    "another setting": lambda m: setattr(m.act, "inplace", True),
    "a hook on the activation": lambda m: m.act.register_forward_hook(lambda _, a, y: y * 2),
    "a hook on a layer": lambda m: m.down.register_forward_hook(lambda _, a, y: y * 2),
    "a pre-hook on a layer": lambda m: m.up.register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
    "a forward of the layer": lambda m: setattr(
        m.gate, "forward", lambda x: 2 * F.linear(x, m.gate.weight)
    ),
    "its own forward": lambda m: setattr(m, "forward", lambda x: m.down(m.gate(x))),
    "a merged layer": lambda m: m.up.merge(),
    "a disabled layer": lambda m: setattr(m.gate, "enabled", False),
    "another impl": lambda m: setattr(m.gate, "impl", "reference"),
    "a layer of a subclass": lambda m: setattr(m.up, "__class__", Twice),
    "a layer replaced": lambda m: setattr(m, "up", nn.Linear(32, 48).double()),
    "a trained weight": lambda m: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_module_runs_its_own_forward(change, ran):
    model = in_block()
    separate = alone(model)
    torch.manual_seed(0)
    change(model[0])
    torch.manual_seed(0)
    change(separate[0])
    x = rand(40, 32)
    assert_same(gradients(model, x), gradients(separate, x))
    assert ran["blocks"] == (change is CHANGES["a trained weight"])


@pytest.mark.parametrize("value", [1.0, 1.5, -0.5, True])
def test_an_invalid_dropout_raises_as_alone(value):
    model, group = in_block(), small()
    model[0].up.dropout = group.net.k_proj.dropout = value
    for candidate, width in ((model, 32), (group, 64)):
        with pytest.raises((TypeError, ValueError), match="dropout"):
            candidate(rand(40, width))


def test_an_unknown_impl_raises_as_alone():
    model, group = in_block(), small()
    for layer in lora_layers(model).values():
        layer.impl = "nonsense"
    group.net.q_proj.impl = "nonsense"
    for candidate, width in ((model, 32), (group, 64)):
        with pytest.raises(ValueError, match="impl"):
            candidate(rand(40, width))


def test_a_block_called_by_keyword(ran):
    model = in_block()
    x = rand(40, 32)
    assert torch.equal(model[0](x=x), model[0](x))
    assert ran["blocks"] == 2
    with pytest.raises(TypeError, match="unexpected keyword"):
        model[0](y=x)


def test_the_class_gets_its_forward_back():
    class Own(MLP):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    before = Own.forward
    first, second = in_block(Own()), in_block(Own())
    assert Own.forward is not before
    unload_lora(first)
    assert Own.forward is not before  # the second one is a block still
    unfuse_projections(second)
    assert Own.forward is before


def test_a_forward_taken_from_a_class_with_blocks(ran):
    keep = in_block()

    class Borrowed(MLP):
        forward = type(keep[0]).forward

    model = in_block(Borrowed())
    model(rand(40, 32))
    assert ran["blocks"] == 1


def test_an_activation_without_members(ran):
    """An empty container is falsy."""

    class Empty(nn.Sequential):
        def forward(self, input):
            return F.silu(input)

    in_block(MLP(Empty()))(rand(40, 32))
    assert ran["blocks"] == 1


def test_a_hook_on_every_module(ran):
    model, calls = in_block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        model(rand(40, 32))
    finally:
        handle.remove()
    assert len(calls) == 6
    assert not ran["blocks"]


def test_wrong_input_has_the_layers_own_error():
    model = in_block()
    with pytest.raises(ValueError, match="expected x of shape"):
        model(rand(40, 31))
    with pytest.raises(TypeError, match="dtype"):
        model(torch.randn(40, 32))
    group = small()
    with pytest.raises(ValueError, match="expected x of shape"):
        group(rand(40, 63))


def test_a_forward_replaced_later_is_respected(ran):
    """Another library may patch the class after the blocks were found."""

    class Own(MLP):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    model = in_block(Own())
    Own.forward = lambda self, x: self.down(torch.tanh(self.gate(x)))
    x = rand(40, 32)
    expected = model[0].down(torch.tanh(model[0].gate(x)))
    torch.testing.assert_close(model(x), expected)
    assert not ran["blocks"]
    report = fuse_projections(model)
    assert "tanh" in report.blocks["0"]


def test_subclasses_derived_later_keep_the_block(ran):
    """FSDP2 swaps the class of a module for a subclass."""
    model = in_block()
    model[0].__class__ = type("Derived", (MLP,), {})
    model(rand(40, 32))
    assert ran["blocks"] == 1
