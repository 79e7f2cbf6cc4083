"""Checks of what a tensor-parallel layer computes."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from block import (
    FEATURES,
    HIDDEN,
    OWN,
    STOCK,
    TOKENS,
    Block,
    assert_matches,
    assert_same_bits,
    data,
    mesh,
    parallel,
    part_of,
    run_sharded,
    sent,
    step,
    watched_operands,
    whole,
    yardsticks,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from fused_lora import FusedLoRALinear, explain, fused_lora_add, fused_lora_linear, lora_parameters
from support import assert_as_good_as_eager, in_eager, in_float64, make_inputs

REDUCE, GATHER, SCATTER = "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"
ANYWHERE = Replicate(), Shard(0), Shard(1)


def check_own_styles():
    model = Block()
    for layer in (model.up, model.down):
        layer.bias.requires_grad_()
    assert_matches(model, parallel(model), *data())


def check_stock_styles():
    model = Block()
    assert_matches(model, parallel(model, STOCK), *data())


def check_half_precision():
    for styles in (OWN, STOCK):
        model = Block(dtype=torch.bfloat16)
        assert model.up.lora_A.dtype == torch.float32
        assert_matches(model, parallel(model, styles), *data(torch.bfloat16))


def check_autocast():
    model, (x, dy) = Block(), data()
    half = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = parallel(model)(x)
    wide, eager = yardsticks(half, x.bfloat16(), dy.bfloat16())
    assert_as_good_as_eager({"y": y.detach()}, wide, eager)


def check_implementations():
    for impl in ("reference", "triton"):
        model = Block(impl=impl)
        shards = parallel(model)
        assert explain(shards.up).impl == impl
        assert_matches(model, shards, *data())


def check_uneven_shards():
    """Sizes not divisible by the number of processes: only DTensors may pass between layers."""
    model = Block(hidden=HIDDEN - 1)
    for styles in (OWN, STOCK):
        assert_matches(model, parallel(model, styles, {"use_local_output": False}), *data())
        with pytest.raises(ValueError, match="expected x of shape"):
            parallel(model, styles)(data()[0])


def check_empty_shards():
    """More processes than features: only the first one has anything to compute."""
    model = Block(hidden=1, impl="triton")
    shards = parallel(model, OWN, {"use_local_output": False})
    assert_matches(model, shards, *data())
    assert ("empty" in explain(shards.up).reason) == (dist.get_rank() > 0)


def check_collectives():
    """The collectives of each direction: the base and its adapter share one reduction."""
    every, part = slice(None), part_of(TOKENS)
    by_tokens = {"up": {"input_layouts": Shard(1)}, "down": {"output_layouts": Shard(1)}}
    both = {GATHER: 1, SCATTER: 1}
    # Backward reduces the gradients of x (scattered by tokens), up.lora_A and down.lora_B.
    assert_sends(parallel(Block()), every, {REDUCE: 1}, {REDUCE: 3})
    assert_sends(parallel(Block(), **by_tokens), part, both, {**both, REDUCE: 2})
    # A replicated x needs one seed on all ranks, hence the gather.
    assert_sends(parallel(Block(dropout=0.5)), every, {REDUCE: 1, GATHER: 1}, {REDUCE: 3})


def assert_sends(shards: Block, part: slice, forward: dict, backward: dict) -> None:
    x, dy = (t[:, part] for t in data())
    x.requires_grad_()
    y, calls = sent(lambda: shards(x))
    assert calls == forward
    _, calls = sent(lambda: y.backward(dy))
    assert calls == backward


def check_shared_input():
    """Layers with a shared input, such as q, k and v: its gradient is reduced once for all."""
    x, _ = data(torch.float64)
    models = [Block().double() for _ in range(3)]
    one = x.clone().requires_grad_()
    sum(m.up(one).square().sum() for m in models).backward()
    many = x.clone().requires_grad_()
    spread = DTensor.from_local(many, mesh(), [Replicate()])
    layers = [parallel(m, up={"use_local_output": False}).up for m in models]
    loss = sum(layer(spread).square().sum() for layer in layers).full_tensor()
    _, calls = sent(loss.backward)
    assert calls == {REDUCE: 1 + len(layers)}
    torch.testing.assert_close(many.grad, one.grad)


def check_sequence_parallel():
    """Activations are sharded by tokens outside; products get plain tensors, fully communicated."""
    (x, dy), part = data(), part_of(TOKENS)
    model = Block()
    shards = parallel(model, OWN, {"input_layouts": Shard(1)}, {"output_layouts": Shard(1)})
    with watched_operands() as seen:
        results = step(shards, x[:, part], dy[:, part])
    assert seen <= {Tensor, nn.Parameter}, seen
    for name in ("y", "x"):
        results[name] = DTensor.from_local(results[name], mesh(), [Shard(1)]).full_tensor()
    assert_as_good_as_eager(results, *yardsticks(model, x, dy))


def check_whole_layer_between():
    """It is called while x and dY are being communicated; its products get the complete ones."""
    one = nn.Sequential(Block(), FusedLoRALinear(FEATURES, FEATURES), Block()).double()
    many = copy.deepcopy(one)
    many[0] = parallel(one[0], down={"output_layouts": Shard(1)})
    many[2] = parallel(one[2], up={"input_layouts": Shard(1)})
    x, dy = data(torch.float64)
    with watched_operands() as seen:
        for m in (one, many):
            m(x).backward(dy)
    assert seen <= {Tensor, nn.Parameter}, seen
    for own, expected in zip(lora_parameters(many[1]), lora_parameters(one[1]), strict=True):
        dist.all_reduce(own.grad)  # each rank has its own tokens' share
        torch.testing.assert_close(own.grad, expected.grad)


def check_placements():
    """``fused_lora_linear`` with operands in every placement."""
    inputs = make_inputs(TOKENS, FEATURES, HIDDEN, 3, torch.float32)
    inputs["scaling"] = torch.tensor(inputs["scaling"])
    dy = torch.randn(TOKENS, HIDDEN)
    expected, eager = in_float64(inputs, dy), in_eager(inputs, dy)
    for weight, others in itertools.product(ANYWHERE, ANYWHERE):
        places = dict.fromkeys(inputs, others) | {"weight": weight}
        places |= {"bias": Replicate(), "scaling": Replicate()}
        actual = run_sharded(fused_lora_linear, inputs, places, dy)
        assert_as_good_as_eager(actual, expected, eager)


def check_beside_a_base():
    """``fused_lora_add`` to a base's output in every placement of a parallel base."""
    names, sizes = ("base", "x", "lora_A", "lora_B"), ((8, 16), (8, 12), (3, 12), (16, 3))
    inputs = {n: torch.randn(*s).double() for n, s in zip(names, sizes, strict=True)}
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    expected = fused_lora_add(**leaves)
    expected.square().sum().backward()
    for base, others in itertools.product((Partial(), *ANYWHERE), ANYWHERE):
        own = {n: distribute_tensor(t, mesh(), [others]) for n, t in inputs.items()}
        if base.is_partial():
            share = inputs["base"] / dist.get_world_size()
            own["base"] = DTensor.from_local(share, mesh(), [base])
        else:
            own["base"] = distribute_tensor(inputs["base"], mesh(), [base])
        for tensor in own.values():
            tensor.requires_grad_()
        y = fused_lora_add(**own).full_tensor()
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        for name in names:
            torch.testing.assert_close(own[name].grad.full_tensor(), leaves[name].grad)


def check_dropout():
    """A replicated x has one mask although generators differ; each shard has its own mask."""
    rows, p, size = 128, 0.25, dist.get_world_size()
    drop = partial(fused_lora_linear, dropout_p=p)
    eye = torch.eye(FEATURES)
    seen = {
        "x": torch.ones(rows, FEATURES),
        "weight": torch.zeros(size * FEATURES, FEATURES),
        "lora_A": eye,
        "lora_B": eye.repeat(size, 1),  # every rank of a column-wise layer shows its mask
        "bias": torch.zeros(size * FEATURES),
    }
    inputs = make_inputs(rows, FEATURES, size * FEATURES, FEATURES, torch.float32)
    scale = torch.tensor(inputs.pop("scaling"))
    dy = torch.randn(rows, size * FEATURES)
    for weight, x in (
        (Shard(0), Replicate()),
        (Shard(1), Shard(1)),
        (Replicate(), Replicate()),
        (Replicate(), Shard(0)),
    ):
        places = dict.fromkeys(seen, Replicate()) | {"weight": weight, "x": x}
        # Equal seeds where the masks must differ, different seeds where they must be equal.
        seed = 1 if x.is_shard() else 1 + dist.get_rank()
        torch.manual_seed(seed)
        first, second = (run_sharded(drop, seen, places, dy)["y"] for _ in range(2))
        assert not torch.equal(first, second)
        mask, *others = first.chunk(size, dim=1)
        assert all(torch.equal(mask, other) for other in others)
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
        assert_share(mask > 0, 1 - p)
        if x.is_shard():
            one, another, *_ = mask.chunk(size, dim=x.dim)
            assert_share((one > 0) == (another > 0), p * p + (1 - p) ** 2)
        torch.manual_seed(seed)
        actual = run_sharded(partial(drop, scaling=scale), inputs, places, dy)
        exact = {**inputs, "scaling": scale}
        bounds = in_float64(exact, dy, mask), in_eager(exact, dy, mask)
        assert_as_good_as_eager(actual, *bounds)


def assert_share(flags: Tensor, p: float) -> None:
    """The share of True is that of independent draws, within five standard deviations."""
    deviation = (p * (1 - p) / flags.numel()) ** 0.5
    assert abs(flags.double().mean().item() - p) < 5 * deviation


class Wrapped(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(self.model, x)


def check_checkpointed():
    model = parallel(Block(dropout=0.5))
    assert_same_bits(model, Wrapped(copy.deepcopy(model), partial(checkpoint, use_reentrant=False)))


def check_second_derivatives():
    x, _ = data(torch.float64)
    model = Block().double()
    gradients = []
    for m in (model, parallel(model)):
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        gradients.append([x.grad, *(whole(p.grad) for p in lora_parameters(m))])
    torch.testing.assert_close(*gradients)
