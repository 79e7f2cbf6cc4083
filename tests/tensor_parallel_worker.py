"""Checks of tensor parallelism for ``torchrun``; rank 0 prints the name of each that passed.

Arguments are the names of checks to leave out.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import os
import sys
from functools import partial

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

import pytest
import torch
import torch.distributed as dist
from models import Tiny, tokens, train_like
from parallel_block import (
    BATCH,
    FEATURES,
    HIDDEN,
    OWN,
    STOCK,
    TOKENS,
    Block,
    assert_matches,
    assert_replicas_equal,
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    disable_lora,
    explain,
    fused_lora_add,
    fused_lora_linear,
    lora_parameters,
    merge_lora,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from fused_lora.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel
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
    """Features that the number of processes does not divide: between layers, DTensors only."""
    model = Block(hidden=HIDDEN - 1)
    for styles in (OWN, STOCK):
        assert_matches(model, parallel(model, styles, {"use_local_output": False}), *data())
        with pytest.raises(ValueError, match="expected x of shape"):
            parallel(model, styles)(data()[0])


def check_collectives():
    """What each direction sends: the base and its adapter have one reduction between them."""
    every, part = slice(None), part_of(TOKENS)
    by_tokens = {"up": {"input_layouts": Shard(1)}, "down": {"output_layouts": Shard(1)}}
    both = {GATHER: 1, SCATTER: 1}
    # Backward reduces the gradients of x (scattered by tokens), up.lora_A and down.lora_B.
    assert_sends(parallel(Block()), every, {REDUCE: 1}, {REDUCE: 3})
    assert_sends(parallel(Block(), **by_tokens), part, both, {**both, REDUCE: 2})
    # A replicated x has one seed, gathered.
    assert_sends(parallel(Block(dropout=0.5)), every, {REDUCE: 1, GATHER: 1}, {REDUCE: 3})


def assert_sends(shards: Block, part: slice, forward: dict, backward: dict) -> None:
    x, dy = (t[:, part] for t in data())
    x.requires_grad_()
    y, calls = sent(lambda: shards(x))
    assert calls == forward
    _, calls = sent(lambda: y.backward(dy))
    assert calls == backward


def check_sequence_parallel():
    """Activations sharded by tokens outside; the products get plain tensors that have arrived."""
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
    """Its x and dY are on their way when it is called; its products get them arrived."""
    model = nn.Sequential(Block(), FusedLoRALinear(FEATURES, FEATURES), Block()).double()
    shards = nn.Sequential(*(parallel(m) if isinstance(m, Block) else m for m in model))
    shards[1] = copy.deepcopy(model[1])
    x, dy = data(torch.float64)
    with watched_operands() as seen:
        torch.testing.assert_close(step(shards, x, dy), step(model, x, dy))
    assert seen <= {Tensor, nn.Parameter}, seen


def check_placements():
    """The function, wherever its operands lie."""
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
    """The function that adds to a base's output, as a parallel base leaves it."""
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
    """One mask of a replicated x, though generators differ; of shards, masks of their own."""
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
        # Alike where masks must differ, and different where they must not.
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
    """As many True as independent draws give, within five standard deviations."""
    deviation = (p * (1 - p) / flags.numel()) ** 0.5
    assert abs(flags.double().mean().item() - p) < 5 * deviation


class Wrapped(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(self.model, x)


def assert_same_bits(model: Block, other: nn.Module) -> None:
    results = []
    x, dy = data()
    for m in (model, other):
        torch.manual_seed(dist.get_rank())
        results.append(list(step(m, x, dy).values()))
    assert all(map(torch.equal, *results))


def check_checkpointed():
    model = parallel(Block(dropout=0.5))
    assert_same_bits(model, Wrapped(copy.deepcopy(model), partial(checkpoint, use_reentrant=False)))


def check_compiled():
    model = parallel(Block(dropout=0.5))
    other = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_same_bits(model, other)


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


def check_training():
    x, target = data(torch.float64)
    for styles in (OWN, STOCK):
        model = Block().double()
        shards = parallel(model, styles)
        losses = []
        for m in (model, shards):
            optimizer = torch.optim.AdamW(lora_parameters(m), lr=1e-2)
            for _ in range(20):
                loss = (m(x) - target).square().mean()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(lora_parameters(m), 0.05)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(torch.stack([loss.detach(), whole(norm)]))
        one, many = torch.stack(losses).chunk(2)
        assert one[-1, 0] < one[0, 0]
        torch.testing.assert_close(many, one)
        for name, parameter in shards.named_parameters():
            assert_replicas_equal(name, parameter)
            torch.testing.assert_close(whole(parameter), model.get_parameter(name))


def check_with_fsdp():
    """Sharded by FSDP2 along the other dimension of the mesh, which averages the gradients."""
    copies = 2
    grid = init_device_mesh(
        "cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=("data", "tensor")
    )
    x, dy = data(torch.float64)
    model = Block().double()
    own = slice(BATCH // copies * grid.get_local_rank("data"), None)
    own = slice(own.start, own.start + BATCH // copies)
    for styles in (OWN, STOCK):
        shards = fully_shard(parallel(model, styles, on=grid["tensor"]), mesh=grid["data"])
        expected = step(copy.deepcopy(model), x, dy)
        actual = step(shards, x[own], dy[own])
        for name in ("y", "x"):
            torch.testing.assert_close(actual.pop(name), expected.pop(name)[own])
        torch.testing.assert_close({n: g * copies for n, g in actual.items()}, expected)


def check_life_cycle():
    x, _ = data()
    for styles in (OWN, STOCK):
        model = Block()
        add_adapter(model, "second", rank=3)
        add_adapter(model, "wide", rank=4)
        set_adapter(model, "second")
        train_like(model)
        set_adapter(model, "default")
        shards = parallel(model, styles)
        y = shards(x)
        with disable_lora(model), disable_lora(shards):
            torch.testing.assert_close(shards(x), model(x))
        merge_lora(shards)
        torch.testing.assert_close(shards(x), y)
        unmerge_lora(shards)
        assert torch.equal(shards(x), y)
        for m in (model, shards):
            assert set_adapter(m, "second") == []
        torch.testing.assert_close(shards(x), model(x))
        with pytest.raises(ValueError, match="make it the active one before sharding"):
            set_adapter(shards, "wide")
        torch.testing.assert_close(shards(x), model(x))


def check_state():
    """A whole state from shards, and shards from a whole state, on every rank."""
    options = StateDictOptions(full_state_dict=True)
    x, _ = data()
    for styles in (OWN, STOCK):
        one, another = Block(), Block()
        shards = parallel(one, styles)
        torch.testing.assert_close(get_model_state_dict(shards, options=options), one.state_dict())
        set_model_state_dict(shards, another.state_dict(), options=options)
        torch.testing.assert_close(shards(x), another(x))


def check_other_layers():
    """The layers without a kernel run in DTensor's own operators; by rows of plain ones too."""
    model = Tiny()
    apply_lora(model, rank=3, target_modules=["table", "out"], include_head=True)
    train_like(model)
    plan = {
        "table": LoRAColwiseParallel(output_layouts=Replicate()),
        "hidden": LoRAColwiseParallel(),
        "out": LoRARowwiseParallel(),
    }
    ids = tokens(2, 5, vocabulary=20)
    with pytest.raises(TypeError, match="expected a FusedLoRALinear, got LoRAEmbedding"):
        parallelize_module(copy.deepcopy(model), mesh(), plan)
    plan["table"] = ColwiseParallel(output_layouts=Replicate())
    shards = parallelize_module(copy.deepcopy(model), mesh(), plan)
    for m in (model, shards):
        m(ids).square().sum().backward()
    torch.testing.assert_close(shards(ids), model(ids))
    for one, many in zip(lora_parameters(model), lora_parameters(shards), strict=True):
        torch.testing.assert_close(whole(many.grad), one.grad)


def check_refusals():
    x, _ = data()
    shards = parallel(Block())
    for call in (unload_lora, partial(add_adapter, name="second")):
        with pytest.raises(ValueError, match=r"whole model .* fully_shard or parallelize_module"):
            call(shards)
    plain = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    parallelize_module(plain, mesh(), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"whole model to adapt, .* or parallelize_module"):
        apply_lora(plain)
    with pytest.raises(ValueError, match="whole weight to adapt, got a sharded one"):
        FusedLoRALinear.from_linear(plain[0])
    with pytest.raises(ValueError, match="expected a whole layer, got a sharded one"):
        parallel(shards)
    merged = Block()
    merge_lora(merged)
    with pytest.raises(ValueError, match="expected an unmerged layer"):
        parallel(merged)
    with pytest.raises(ValueError, match="expected a layer without DoRA"):
        parallel(Block(use_dora=True))
    with pytest.raises(ValueError, match="expected a whole weight for DoRA"):
        parallel(Block(use_dora=True), STOCK)(x)
    layer, A, B = shards.up, shards.up.lora_A, shards.up.lora_B
    with pytest.raises(ValueError, match="got a plain Tensor for x"):
        fused_lora_linear(x, layer.weight, A, B)
    spread = distribute_tensor(x, mesh(), [Replicate()])
    with pytest.raises(ValueError, match="got a plain Tensor for lora_A, lora_B: adapt the model"):
        fused_lora_linear(spread, layer.weight, whole(A), whole(B))
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    elsewhere = distribute_tensor(whole(A).detach(), other, [Replicate()] * 2)
    with pytest.raises(ValueError, match=r"expected lora_A on x's DeviceMesh.*, got DeviceMesh"):
        fused_lora_linear(spread, layer.weight, elsewhere, B)
    largest = DTensor.from_local(torch.ones(1, HIDDEN), mesh(), [Partial("max")])
    with pytest.raises(ValueError, match="expected base sharded, replicated or summed"):
        fused_lora_add(largest, spread[0, :1], A, B)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, check in CHECKS.items():
        if name in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        check()
        dist.barrier()
        if dist.get_rank() == 0:
            print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
