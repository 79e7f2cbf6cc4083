"""Layers that share an input, in small modules: their chain, the calls in between, the probe."""

import copy
import gc
import pickle
import random
import threading
import weakref
from functools import partial

import numpy
import pytest
import torch
from together import (
    MLP,
    Net,
    Top,
    alone,
    assert_equal,
    assert_same,
    gradients,
    in_block,
    is_linear,
    rand,
    small,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fused_lora import fuse_projections
from fused_lora.layers import gated_block, shared_input
from fused_lora.models.probe import shared_inputs


def test_cross_attention(ran):
    """k and v share another input than q, which then led in vain; self attention groups all."""
    model = small()
    x, other = rand(40, 64), rand(40, 64)
    assert_same(gradients(model, x, other), gradients(alone(model), x, other))
    assert ran == {"chains": 2, "layers": 3}
    ran.clear()
    assert_same(gradients(model, x), gradients(alone(model), x))
    assert ran == {"chains": 1, "layers": 3}


@pytest.mark.parametrize("make", ["group", "block"])
def test_few_and_many_rows_compile_once(make):
    """What runs together depends on the number of rows, but not in compiled code."""
    model, width = (small(), 64) if make == "group" else (in_block(), 32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for rows in (4, shared_input.MIN_ROWS, 100):
        compiled(rand(rows, width))
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", ["group", "block"])
def test_selective_checkpointing_runs_layers_alone(make, ran):
    """Its dispatch mode keeps results of operators, which a chain must not see."""
    model, x = (small(dropout=0.3), rand(40, 64)) if make == "group" else (in_block(), rand(40, 32))
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def policy(context, operator, *args, **kwargs):
        save = operator in kept
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    region = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    wrapped = Top(model)
    wrapped.forward = lambda x: region(model, x)
    expected = gradients(alone(model), x)
    got = gradients(wrapped, x)
    assert_same({n.removeprefix("net."): g for n, g in got.items()}, expected)
    assert not ran


@pytest.mark.parametrize("calls", [("q_proj",), ("q_proj", "v_proj"), ("v_proj", "q_proj")])
def test_layers_that_never_come_or_come_late(calls):
    model = small(Net(*calls), dropout=0.3)
    x = rand(40, 64, requires_grad=True)
    got, expected = gradients(model, x), gradients(alone(model), x)
    assert got.keys() == expected.keys()
    if calls == ("q_proj",):  # the first seed is the same; of later ones some were drawn in vain
        assert_same(got, expected)


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept_of_a_layer_that_never_comes(grad):
    """x is freed after backward, or at once without gradients."""
    model = small(Net("q_proj", "k_proj"))
    x = rand(40, 64, requires_grad=grad) * 1
    storage = weakref.ref(x.untyped_storage()), weakref.ref(x)
    with torch.set_grad_enabled(grad):
        y = model(x)
    if grad:
        y.sum().backward()
    del x, y
    gc.collect()
    assert storage[1]() is None
    chain = shared_input._thread.chain
    assert chain is None or (chain.alias is None and not chain.waiting)


def test_an_exception_between_two_layers():
    model = small(dropout=0.3)
    x = rand(40, 64)
    expected = gradients(model, x)

    def fail(*_):
        raise KeyError("planted")

    handle = model.net.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        gradients(model, x)
    handle.remove()
    assert_equal(gradients(model, x), expected)


class Changing(Net):
    """Changes its input, an adapter or a scale between the calls."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        with torch.no_grad():
            x = x * 1
            y = self.q_proj(x)
            if self.what == "x":
                x.add_(1)
            elif self.what == "lora_A":
                self.k_proj.lora_A.add_(1)
            elif self.what == "lora_B":
                self.k_proj.lora_B.add_(1)
            elif self.what == "scaling":
                self.k_proj.scaling = 9.0
            elif self.what == "enabled":
                self.k_proj.enabled = False
            elif self.what == "grad mode":
                with torch.enable_grad():
                    return y + self.k_proj(x) + self.v_proj(x)
            elif self.what == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    return y + self.k_proj(x) + self.v_proj(x)
            return y + self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize(
    "what", ["x", "lora_A", "lora_B", "scaling", "enabled", "grad mode", "autocast"]
)
def test_what_changes_between_the_calls_counts(what, ran):
    model = small(Changing(what))
    x = rand(40, 64)
    separate = alone(model)
    torch.testing.assert_close(model(x), separate(x), rtol=1e-5, atol=1e-5)
    assert ran["chains"] >= 1


def test_dropout_that_changes_between_the_calls():
    class Dropping(Net):
        def forward(self, x):
            y = self.q_proj(x)
            self.k_proj.dropout = 0.5
            return self.k_proj(x) if y is not None else y

    model = small(Dropping(), dropout=0.1)
    dropped = (model(rand(400, 64).fill_(1)) - model.net.k_proj.bias).std()
    model.net.k_proj.dropout = 0.1
    assert dropped > 0  # k ran with its own mask, not with the one that was drawn for 0.1


class Freezing(Net):
    """k's adapter and x begin to need gradients after q was called."""

    def forward(self, x):
        y = self.q_proj(x)
        self.k_proj.lora_A.requires_grad_(True)
        x.requires_grad_(True)
        return y + self.k_proj(x) + self.v_proj(x)


def test_gradients_that_are_wanted_later():
    model = small(Freezing())
    model.net.k_proj.lora_A.requires_grad_(False)
    separate, x = alone(model), rand(40, 64)
    assert_same(gradients(model, x.clone()), gradients(separate, x.clone()))


class Checkpointed(Net):
    """A checkpoint around some of the layers."""

    def forward(self, x):
        y = self.q_proj(x)
        return y + checkpoint(lambda x: self.k_proj(x) * self.v_proj(x), x, use_reentrant=False)


@pytest.mark.parametrize("grad", [False, True])
def test_a_checkpoint_around_some_layers(grad):
    model = small(Checkpointed())
    x = rand(40, 64, requires_grad=grad)
    assert_same(gradients(model, x), gradients(alone(model), x))


def test_heads_with_losses_of_their_own():
    """Two backward passes, which layers alone allow if x needs no gradient."""
    model = small()
    x = rand(40, 64)
    q, k = model.net.q_proj(x), model.net.k_proj(x)
    q.sum().backward()
    k.sum().backward()
    assert model.net.k_proj.lora_A.grad is not None


def test_pickles_of_one_layer():
    model = small()
    layer = model.net.q_proj
    place = pickle.loads(pickle.dumps(layer)).shared_input
    assert place is None or place._parent() is None
    del model
    gc.collect()
    assert pickle.loads(pickle.dumps(layer)).shared_input is None


STATES = {
    "merged": lambda layer: layer.merge(),
    "disabled": lambda layer: setattr(layer, "enabled", False),
    "another impl": lambda layer: setattr(layer, "impl", "torch"),
    "reference": lambda layer: setattr(layer, "impl", "reference"),
    "own forward": lambda layer: setattr(
        layer, "forward", lambda x: 2 * type(layer).forward(layer, x)
    ),
}


@pytest.mark.parametrize("change", STATES.values(), ids=list(STATES))
@pytest.mark.parametrize("index", [0, 1])
def test_the_others_still_share(index, change, ran):
    model = small()
    separate = alone(model)
    for candidate in (model, separate):
        change([candidate.net.q_proj, candidate.net.k_proj][index])
    x = rand(40, 64)
    got, expected = gradients(model, x), gradients(separate, x)
    assert_same(got, expected)
    assert ran["chains"] == 1


def test_threads():
    model = small()
    x = [rand(40, 64) for _ in range(4)]
    expected = [gradients(copy.deepcopy(model), each)["y"] for each in x]
    results = {}

    def work(i):
        with torch.no_grad():
            results[i] = [model(x[i]) for _ in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, found in results.items():
        for y in found:
            torch.testing.assert_close(y, expected[i], rtol=1e-5, atol=1e-5)


def test_a_copy_of_one_layer_is_alone():
    model = small()
    layer = copy.deepcopy(model.net.q_proj)
    assert layer.shared_input is None
    assert model.net.q_proj.shared_input is not None
    x = rand(40, 64)
    torch.testing.assert_close(layer(x), model.net.q_proj(x))


def test_the_model_is_freed():
    """Places refer to modules weakly: no cycle delays it."""
    model = small()
    freed = weakref.ref(model.net.q_proj)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_a_replaced_layer_is_found():
    model = small()
    replacement = nn.Linear(64, 64).double()
    separate = alone(model)
    model.net.k_proj = separate.net.k_proj = replacement
    x = rand(40, 64)
    assert_same(gradients(model, x), gradients(separate, x))


WRONG_GROUPS = [
    ([["q_proj"]], "two or more"),
    ([["q_proj", "q_proj"]], "different names"),
    (["q_proj"], "groups of names"),
    ([["q_proj", "absent"]], "which no module has"),
    ([["q_proj", 3]], "groups of names"),
]


@pytest.mark.parametrize("case", WRONG_GROUPS, ids=lambda case: case[1])
def test_wrong_groups(case):
    groups, message = case
    with pytest.raises((TypeError, ValueError), match=message):
        fuse_projections(small(), groups)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, x, mask, *, scale):
        x = self.norm(x)
        q, k = self.q(x), self.k(x)
        assert mask is not None, "stops here"
        return self.o(q + k + self.v(x))


class Noisy(Net):
    def __init__(self):
        super().__init__()
        self.count, self.log = 0, []
        self.register_buffer("cache", torch.ones(1))

    def forward(self, x):
        self.count += 1
        self.log.append(x)
        self.cache.zero_()
        random.random()
        numpy.random.rand()
        self.q_proj(x)
        self.k_proj(x)
        self.v_proj(x)
        raise SystemExit


def test_the_probe_sees_what_ran_and_leaves_no_trace():
    module = Attention()
    before = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    found = shared_inputs(module, Attention.forward, is_linear)
    assert found == [("q", "k")]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), before[1].values(), strict=True)
    )
    python, numpy_state = random.getstate(), numpy.random.get_state()[1].tolist()
    noisy = Noisy()
    assert shared_inputs(noisy, Noisy.forward, is_linear) == [("q_proj", "k_proj", "v_proj")]
    assert (noisy.count, noisy.log, noisy.cache.tolist()) == (0, [], [1.0])
    assert random.getstate() == python
    assert numpy.random.get_state()[1].tolist() == numpy_state
    assert shared_inputs(MLP(), gated_block.original_forward(MLP()), is_linear) == [("gate", "up")]
    assert shared_inputs(Net(), Net.forward, is_linear) == [("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("rows", [1, 31])
def test_few_rows_run_alone(rows, ran):
    small()(rand(rows, 64))
    in_block()(rand(rows, 32))
    assert not ran


def test_inference_mode_and_other_tensors_run_alone(ran):
    model = small()
    with torch.inference_mode():
        model(rand(40, 64))
    assert not ran
    jagged = torch.nested.nested_tensor([rand(30, 64), rand(9, 64)], layout=torch.jagged)
    model(jagged)
    assert not ran
