"""The proof that a forward is a gated MLP: those it recognises, and lookalikes that it refuses."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from models import train_like
from together import MLP, alone, assert_same, gradients, is_linear, rand
from torch import nn

from fused_lora import apply_lora, fuse_projections
from fused_lora.layers import gated_block
from fused_lora.models.symbolic import NotGatedError, prove


class Reversed(MLP):
    def forward(self, x):
        return self.down(torch.mul(self.up(x), F.gelu(self.gate(x), approximate="tanh")))


class Clamped(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x).clamp(max=7)) * self.up(x))


class Scaled(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * 2)


class Limited(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x).clamp(max=self.limit))


class Normed(MLP):
    def forward(self, x):
        return self.down(F.layer_norm(self.act(self.gate(x)) * self.up(x), (48,)))


class Residual(MLP):
    def forward(self, x):
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Branching(MLP):
    def forward(self, x):
        if x.shape[0] > 100:
            x = x * 2
        return self.down(self.act(self.gate(x)) * self.up(x))


class Typed(MLP):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x.float()
        return self.down(self.act(self.gate(x)) * self.up(x))


class TwoInputs(MLP):
    def forward(self, x, other):
        return self.down(self.act(self.gate(x)) * self.up(other))


class SameTwice(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.gate(x))


class InPlace(MLP):
    def forward(self, x):
        g = self.gate(x)
        g.clamp_(max=0.1)
        return self.down(self.act(g) * self.up(x))


class Dropped(MLP):
    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        _ = F.relu(h, inplace=True)
        return self.down(h)


class ItemSet(MLP):
    def forward(self, x):
        g = self.gate(x)
        g[..., :8] = 0
        return self.down(self.act(g) * self.up(x))


class Without(MLP):
    def forward(self, x):
        with torch.no_grad():
            u = self.up(x)
        return self.down(self.act(self.gate(x)) * u)


class Decorated(MLP):
    @torch.no_grad()
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Swallowing(MLP):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        try:
            y = y * self.scale
        except Exception:
            y = y * 2
        return y


class Random(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) if random.random() < 1 else x


class Monitored(MLP):
    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        print(h)
        return self.down(h)


class Reading(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * len(x.shape))


def helper(x):
    return F.silu(x)


class Helped(MLP):
    def forward(self, x):
        return self.down(helper(self.gate(x)) * self.up(x))


class OwnCall(MLP):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OwnAttribute(MLP):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Shadowed(MLP):
    act = staticmethod(torch.tanh)


GATED = {
    "silu": (MLP(), "silu", ("gate", "up")),
    "gelu": (MLP(nn.GELU()), "gelu", ("gate", "up")),
    "gelu_tanh": (MLP(nn.GELU(approximate="tanh")), "gelu_tanh", ("gate", "up")),
    "relu": (MLP(nn.ReLU()), "relu", ("gate", "up")),
    "function": (MLP(F.silu), "silu", ("gate", "up")),
    "reversed": (Reversed(), "gelu_tanh", ("up", "gate")),
}


@pytest.mark.parametrize("case", GATED.values(), ids=list(GATED))
def test_gated_mlps_are_recognised_and_equal(case, ran):
    module, activation, order = case
    found = prove(module, gated_block.original_forward(module), is_linear)
    assert (found.gate, found.up, found.down) == ("gate", "up", "down")
    assert (found.activation, found.order) == (activation, order)
    model = nn.Sequential(copy.deepcopy(module))
    apply_lora(model, rank=4, dropout=0.3)
    train_like(model.train().double())
    x = rand(40, 32)
    separate = alone(model)
    assert_same(gradients(model, x), gradients(separate, x))
    assert ran["blocks"] == 1


LOOKALIKES = {
    Clamped: "clamp",
    Scaled: "multiplies or returns",
    Limited: "reads self.limit",
    Normed: "layer_norm",
    Residual: "add",
    Branching: "more than return one expression: ",
    Typed: "more than return one expression: ",
    TwoInputs: "cannot be followed",
    SameTwice: "more than once",
    InPlace: "more than return one expression: ",
    Dropped: "it drops the result of relu",
    ItemSet: "more than return one expression: ",
    Without: "try or with",
    Decorated: "try or with",
    Swallowing: "try or with",
    Random: "more than return one expression: ",
    Monitored: "more than return one expression: ",
    Reading: "reads the shape of a tensor",
    Helped: "its forward calls helper",
    OwnCall: "a __call__ of its own",
    OwnAttribute: "a __getattr__ of its own",
    Shadowed: "its class has another act",
}


@pytest.mark.parametrize("cls", LOOKALIKES, ids=lambda cls: cls.__name__)
def test_lookalikes_are_refused_by_name(cls):
    with pytest.raises(NotGatedError, match=LOOKALIKES[cls]):
        prove(cls(), gated_block.original_forward(cls()), is_linear)
    model = nn.Sequential(cls())
    apply_lora(model, rank=4, fuse_projections=False)
    report = fuse_projections(model)
    assert LOOKALIKES[cls] in report.blocks["0"]
    assert gated_block.block_of(model[0]) is None


class ChangingActivation(nn.Module):
    def forward(self, x):
        x.clamp_(max=3)
        return F.silu(x)


class ModalActivation(nn.Module):
    def forward(self, x):
        return F.silu(x) if self.training else F.relu(x)


class PrivateActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self._approximate = ["tanh"]

    def forward(self, x):
        return F.gelu(x, approximate=self._approximate[0])


class CallingActivation(nn.SiLU):
    def __call__(self, x):
        return 2 * super().__call__(x)


ACTIVATION_LOOKALIKES = {
    "tanh": nn.Tanh(),
    "leaky": nn.LeakyReLU(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "in a container": nn.Sequential(nn.SiLU()),
    "scaled": lambda x: F.silu(x) * 2,
    "clamped": lambda x: F.silu(x, inplace=False).clamp(max=3),
    "of a scaled input": lambda x: F.gelu(2 * x),
    "in place": nn.SiLU(inplace=True),
    "changes its input": ChangingActivation(),
    "has modes": ModalActivation(),
    "reads a private attribute": PrivateActivation(),
    "has a call of its own": CallingActivation(),
}


@pytest.mark.parametrize("act", ACTIVATION_LOOKALIKES.values(), ids=list(ACTIVATION_LOOKALIKES))
def test_other_activations_are_refused(act):
    module = MLP(act)
    with pytest.raises(NotGatedError):
        prove(module, gated_block.original_forward(module), is_linear)
