"""Many adapters in one batch, against a run of each adapter on its own samples."""

import copy
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import gpt2, llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    FusedLoRALinear,
    adapter_losses,
    adapter_parameters,
    adapter_segments,
    add_adapter,
    apply_lora,
    clip_adapter_grad_norm_,
    disable_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    patch_peft,
    save_adapter,
    set_adapter,
    unpatch_peft,
)
from support import relative_rms

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("unpatched")

K, N = 24, 16
NAMES = ["default", "c", "c", None, "b", "default"]  # "d" is absent
SORTED = ["b", "b", "c", "default", "default"]


def net(dropout=0.0, dtype=torch.float64, **options) -> nn.Module:
    """Two linears with four adapters, of other ranks, scales and dropouts, as after training."""
    model = nn.Sequential(nn.Linear(K, 20), nn.Tanh(), nn.Linear(20, N)).to(dtype)
    apply_lora(model, target_modules=["0", "2"], rank=4, dropout=dropout, **options)
    add_adapter(model, "b", rank=2, alpha=5)
    add_adapter(model, "c", rank=6, alpha=3, dropout=2 * dropout)
    add_adapter(model, "d", rank=1)
    return noisy(model)


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameters in adapter_parameters(model).values():
            for p in parameters:
                p.copy_(torch.randn(p.shape) * 0.3)
    return model


def peft_net(make=None, targets=("0", "2"), dropout=0.0, dtype=torch.float64) -> nn.Module:
    """As :func:`net`, of PEFT."""
    base = make() if make else nn.Sequential(nn.Linear(K, 20), nn.Tanh(), nn.Linear(20, N))
    config = partial(peft.LoraConfig, target_modules=list(targets), lora_dropout=dropout)
    model = peft.get_peft_model(base.to(dtype), config(r=4, lora_alpha=8))
    for name, rank, alpha in (("b", 2, 5), ("c", 6, 3), ("d", 1, 8)):
        model.add_adapter(name, config(r=rank, lora_alpha=alpha))
    patch_peft(model)
    return noisy(model)


def samples(names=NAMES, rows=5, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(len(names), rows, K, dtype=dtype)


def clear(model: nn.Module) -> None:
    for parameters in adapter_parameters(model).values():
        for p in parameters:
            p.grad = None


def gradients(model: nn.Module) -> dict:
    return {
        f"{name} {i}": None if p.grad is None else p.grad.clone()
        for name, parameters in adapter_parameters(model).items()
        for i, p in enumerate(parameters)
    }


def together(model, x, names, call=lambda model, x: model(x), **options) -> dict:
    """Outputs, losses and gradients of one batch."""
    clear(model)
    x = x.clone().requires_grad_(x.is_floating_point())
    with adapter_segments(model, names, **options):
        y = call(model, x)
        losses = adapter_losses(y.square().mean(-1), names)
        sum(losses.values()).backward()
    return {"y": y.detach(), "dx": x.grad, **losses, **gradients(model)}


def apart(model, x, names, call=lambda model, x: model(x)) -> dict:
    """The same of one run for each adapter."""
    clear(model)
    x = x.clone().requires_grad_(x.is_floating_point())
    parts, losses, where = [], {}, []
    for name in dict.fromkeys(names):
        own = [i for i, n in enumerate(names) if n == name]
        where += own
        if name is None:
            parts.append(without_adapters(model, call, x[own]).detach())
            continue
        model.set_adapter(name) if of_peft(model) else set_adapter(model, name)
        y = call(model, x[own])
        losses[name] = y.square().mean(-1).mean()
        losses[name].backward()
        parts.append(y.detach())
    order = torch.tensor(where).argsort()
    return {"y": torch.cat(parts)[order], "dx": x.grad, **losses, **gradients(model)}


def without_adapters(model, call, x):
    with without(model):
        return call(model, x)


def without(model):
    return model.disable_adapter() if of_peft(model) else disable_lora(model)


def of_peft(model) -> bool:
    return isinstance(model, peft.PeftModel)


def assert_equal(got: dict, expected: dict, bound=1e-13) -> None:
    assert set(got) >= set(expected)
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert got[name].shape == value.shape, name
            error = relative_rms(got[name].detach(), value.detach())
            assert error <= bound, (name, error)


@pytest.mark.parametrize("make", [net, peft_net])
@pytest.mark.parametrize("names", [NAMES, SORTED, [None, "c"], ["b"]], ids=str)
def test_equals_a_run_for_each_adapter(make, names):
    model, x = make(), samples(names)
    got, expected = together(model, x, names), apart(model, x, names)
    assert_equal(got, expected)
    for name in ("default", "b", "c", "d"):
        assert (got[f"{name} 0"] is None) == (name not in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layers_bits_are_those_of_separate_calls(dtype):
    """With one segment of at least four rows per adapter."""
    layer = net(dtype=dtype, impl="torch")[:1]
    x = torch.randn(5, 4, K).to(dtype)
    got, expected = together(layer, x, SORTED), apart(layer, x, SORTED)
    for name, value in expected.items():
        if name in SORTED:
            continue  # a sum over the batch
        assert (got[name] is None) == (value is None), name
        assert value is None or torch.equal(got[name], value), name


@pytest.mark.parametrize("make", [gpt2, llama])
def test_whole_models(make):
    """Chains of one input and gated MLPs run layer by layer."""
    model, ids = make().double(), tokens(6, 9)
    apply_lora(model, rank=4)
    add_adapter(model, "b", rank=2, alpha=5)
    add_adapter(model, "c", rank=6, dropout=0.1)
    noisy(model)
    run = lambda model, ids: model(input_ids=ids).logits  # noqa: E731
    got, expected = together(model, ids, NAMES, run), apart(model, ids, NAMES, run)
    assert_equal(got, expected, 1e-12)


def test_whole_models_of_peft():
    model = peft_net(llama, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    ids = tokens(6, 9)
    run = lambda model, ids: model(input_ids=ids).logits  # noqa: E731
    got, expected = together(model, ids, NAMES, run), apart(model, ids, NAMES, run)
    assert_equal(got, expected, 1e-12)


def test_layers_run_one_by_one_inside_and_together_outside(ran):
    model, ids = llama(), tokens(4, 16)
    apply_lora(model, rank=4)
    names = ["default"] * 4
    outside = model(input_ids=ids).logits
    before = dict(ran)
    assert before["chains"] > 0
    assert before["blocks"] > 0
    with adapter_segments(model, names):
        inside = model(input_ids=ids).logits
    assert dict(ran) == before
    torch.testing.assert_close(inside, outside)
    model(input_ids=ids)
    assert ran["blocks"] == 2 * before["blocks"]


def test_adapters_of_other_layers_in_peft():
    """A layer that an adapter does not target computes its base for that adapter's samples."""
    model = peft_net()
    model.add_adapter("only", peft.LoraConfig(r=3, target_modules=["2"]))
    patch_peft(model)
    noisy(model)
    names = ["only", "b", "only", "default"]
    x = samples(names)
    assert_equal(together(model, x, names), apart(model, x, names))
    assert_equal(together(model, x, ["only"] * 4), apart(model, x, ["only"] * 4))


def test_peft_mixes_the_same_in_inference():
    model, x = peft_net().eval(), samples()
    theirs = model(x, adapter_names=[n or "__base__" for n in NAMES])
    with adapter_segments(model, [n or "__base__" for n in NAMES]), torch.no_grad():
        torch.testing.assert_close(model(x), theirs)
    with torch.inference_mode(), adapter_segments(model, NAMES):
        torch.testing.assert_close(model(x), theirs)


@pytest.mark.parametrize("make", [net, peft_net])
def test_dropout(make):
    """Equal to the reference's with its masks; a dropout of an adapter is that adapter's own."""
    model, x = make(dropout=0.3).train(), samples(rows=7)
    torch.manual_seed(5)
    got = together(model, x, NAMES)
    torch.manual_seed(5)
    again = together(model, x, NAMES)
    assert torch.equal(got["y"], again["y"])
    changed = (got["y"] != together(model, x, NAMES)["y"]).flatten(1).any(1)
    without = {None, "b"} if make is net else {None}  # one b without dropout
    assert changed.tolist() == [name not in without for name in NAMES]
    assert_equal(together(model.eval(), x, NAMES), apart(model, x, NAMES))


def test_dropout_equals_the_reference():
    model, x = net(dropout=0.3, impl="torch"), samples(rows=7)
    torch.manual_seed(5)
    got = together(model, x, NAMES)
    for layer in lora_layers(model).values():
        layer.impl = "reference"
    torch.manual_seed(5)
    assert_equal(got, together(model, x, NAMES))


def test_dropout_keeps_the_mean():
    layer = FusedLoRALinear(K, N, bias=False, rank=K, alpha=K, dropout=0.25)
    model = nn.Sequential(layer)
    add_adapter(model, "b", rank=K, alpha=K, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        for A, B in adapter_parameters(model).values():
            A.copy_(torch.eye(K))
            B.copy_(torch.eye(N, K))
    with adapter_segments(model, ["default", "b"]):
        y = model(torch.ones(2, 2000, K))
    for part, p in zip(y, (0.25, 0.5), strict=True):
        torch.testing.assert_close(part, (part > 0.5) / (1 - p), atol=1e-4, rtol=0)
        assert abs((part < 0.5).float().mean() - p) < 0.01


@pytest.mark.parametrize("make", [net, peft_net])
def test_shapes_of_inputs(make):
    model, x = make(), samples()
    with adapter_segments(model, NAMES), torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model(x.flatten(0, 1)), y.flatten(0, 1))
        torch.testing.assert_close(model(x.view(6, 1, 5, K)), y.view(6, 1, 5, N))
        torch.testing.assert_close(model(x[:, 0]), y[:, 0])
        for wrong in (x[:4], x.flatten(0, 1)[:-1], x.transpose(0, 1), x[0, 0]):
            with pytest.raises(ValueError, match="expected an input of 6 samples"):
                model(wrong)
    with adapter_segments(model, ["b"]), torch.no_grad():
        assert model(x[0, 0]).shape == (N,)


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


def test_threads_and_other_models_are_not_affected():
    model, other, x = net(), net(), samples()
    names = {"one": NAMES, "two": ["b"] * 6, "three": None}
    found, barrier = {}, threading.Barrier(len(names))

    def run(key):
        barrier.wait()
        if names[key] is None:
            found[key] = model(x)
        else:
            with adapter_segments(model, names[key]):
                barrier_inside.wait()
                found[key] = model(x)

    with torch.no_grad():
        plain, others = model(x), other(x)
        expected = {"three": plain}
        for key in ("one", "two"):
            with adapter_segments(model, names[key]):
                expected[key] = model(x)
                assert torch.equal(other(x), others)
    barrier_inside = threading.Barrier(2)
    threads = [threading.Thread(target=run, args=(key,)) for key in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: torch.equal(found[key], expected[key]) for key in names} == dict.fromkeys(
        names, True
    )
    assert model[0].segment_route is None


def test_two_models_in_two_blocks():
    model, other, x = net(), net(), samples()
    with torch.no_grad(), adapter_segments(model, NAMES):
        alone = model(x)
        with adapter_segments(other, ["b"] * 6):
            assert torch.equal(model(x), alone)
        assert torch.equal(model(x), alone)


@pytest.mark.parametrize("make", [net, peft_net])
def test_the_state_is_restored(make):
    model, x = make(), samples()
    before = model(x)
    with pytest.raises(KeyError), adapter_segments(model, NAMES):
        raise KeyError
    assert torch.equal(model(x), before)
    with adapter_segments(model, NAMES):
        for inner in (model, next(m for m in model.modules() if hasattr(m, "lora_A"))):
            nested = pytest.raises(RuntimeError, match="cannot be nested")
            with nested, adapter_segments(inner, NAMES):
                pass
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), before)
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def unpatched_net() -> nn.Module:
    model = peft_net()
    unpatch_peft(model)
    return model


def changed(change, *args, **options):
    model = net()
    change(model, *args, **options)
    return model


def dora():
    model = nn.Sequential(nn.Linear(K, N))
    apply_lora(model, rank=2, use_dora=True)
    return model


def peft_dora():
    config = peft.LoraConfig(target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    patch_peft(model)
    return model


def other_kinds(plain: nn.Module, of_peft: bool) -> nn.Module:
    model = nn.Sequential(plain, nn.Linear(K, N))
    if of_peft:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
        patch_peft(model)
    else:
        apply_lora(model, target_modules=["0", "1"])
    return model


def with_head(of_peft: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 3))
    if of_peft:
        config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
        model = peft.get_peft_model(model, config)
        patch_peft(model)
    else:
        apply_lora(model, target_modules=["0"], modules_to_save=["1"])
    return model


@pytest.mark.parametrize(
    ("make", "names", "error", "hint"),
    [
        (net, ["x", "b"], ValueError, "adapters default, b, c, d, got 'x'"),
        (peft_net, ["x"], ValueError, "adapters default, b, c, d, got 'x'"),
        (net, [], ValueError, "a name per sample, got none"),
        (net, "b", TypeError, "expected names to be a list, one per sample, got 'b'"),
        (net, [3], TypeError, "expected a name of an adapter, got 3"),
        (lambda: None, ["b"], TypeError, "expected a model"),
        (lambda: nn.Linear(2, 2), ["b"], ValueError, "expected a model with adapters"),
        (unpatched_net, ["b"], ValueError, r"call patch_peft\(model\) first"),
        (partial(changed, merge_lora), ["b"], RuntimeError, "0: expected .* got a merged layer"),
        (dora, ["default"], RuntimeError, "0: expected .* got DoRA in the adapter 'default'"),
        (peft_dora, ["default"], RuntimeError, "model.0: .* got the variant Dora"),
        (
            partial(other_kinds, nn.Embedding(9, K), False),
            ["default"],
            RuntimeError,
            "0: expected a layer that can run in segments, got a LoRAEmbedding",
        ),
        (
            partial(other_kinds, nn.Conv2d(1, K, 3), False),
            ["default"],
            RuntimeError,
            "got a LoRAConv2d",
        ),
        (
            partial(other_kinds, nn.Embedding(9, K), True),
            ["default"],
            RuntimeError,
            "base_model.model.0: .* got a lora.Embedding layer",
        ),
        (partial(with_head, False), ["default"], ValueError, "without modules_to_save, got 1,"),
        (partial(with_head, True), ["default"], ValueError, "without modules_to_save, got a Mod"),
        (lambda: nn.DataParallel(net()), ["b"], ValueError, "in DataParallel"),
        (
            lambda: changed(lambda m: setattr(m[0], "impl", "triton")),
            ["b"],
            RuntimeError,
            "impl='triton', which has no segments",
        ),
    ],
)
def test_refusals(make, names, error, hint):
    model = make()
    with pytest.raises(error, match=hint), adapter_segments(model, names):
        pass


@pytest.mark.parametrize("make", [net, peft_net])
def test_changes_inside_a_block(make):
    model, x = make(), samples()
    with adapter_segments(model, NAMES):
        y = model(x)
        with without(model):
            base = model(x)
        assert torch.equal(model(x), y)
        torch.testing.assert_close(base, without_adapters(model, lambda m, x: m(x), x))
        if make is net:
            merge_lora(model)
        else:
            model.merge_adapter()
        with pytest.raises(RuntimeError, match=r"0: expected .* got a merged layer"):
            model(x)
        if make is peft_net:
            model.unmerge_adapter()
            with pytest.raises(TypeError, match="expected one argument"):
                model.eval()(x, adapter_names=["b"] * 6)
            for scope in (None, model):
                with pytest.raises(RuntimeError, match="unpatch_peft outside of adapter_segm"):
                    unpatch_peft(scope)


class Doubled(nn.Linear):
    """A base that computes its own product."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("of_peft", [False, True])
def test_bases_that_compute_their_own_product(of_peft):
    model = nn.Sequential(Doubled(K, N)).double()
    if of_peft:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4))
        model.add_adapter("b", peft.LoraConfig(target_modules=["0"], r=2))
        patch_peft(model)
    else:
        apply_lora(model, target_modules=["0"], rank=4)
        add_adapter(model, "b", rank=2)
    noisy(model)
    names = ["b", None, "default", "b"]
    x = samples(names)
    assert_equal(together(model, x, names), apart(model, x, names))


@pytest.mark.parametrize("make", [net, peft_net])
def test_zeros_for_absent_adapters(make):
    model, x = make(), samples()
    expected = together(model, x, NAMES)
    got = together(model, x, NAMES, zeros=True)
    for i in range(4):
        assert expected[f"d {i}"] is None
        assert not got[f"d {i}"].any()
        expected[f"d {i}"] = got[f"d {i}"]
    assert_equal(got, expected, 0.0)


def test_parameters_of_adapters(tmp_path):
    model, x = net(), samples()
    found = adapter_parameters(model)
    assert {name: len(parameters) for name, parameters in found.items()} == dict.fromkeys(
        ("default", "b", "c", "d"), 4
    )
    assert list(adapter_parameters(model, ["c"])) == ["c"]
    keys = set(model.state_dict())
    optimizer = torch.optim.SGD([p for ps in found.values() for p in ps], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with adapter_segments(model, NAMES):
            sum(adapter_losses(model(x).square().mean(-1), NAMES).values()).backward()
        optimizer.step()
        set_adapter(model, "c")  # no warning: the optimizer stays valid
    assert set(model.state_dict()) == keys
    for name, parameters in adapter_parameters(model).items():
        assert all(p is q for p, q in zip(parameters, found[name], strict=True))
    model.to(torch.float32)
    assert found["b"][0].dtype == torch.float32 == found["c"][0].dtype
    assert adapter_parameters(model)["b"][0] is found["b"][0]
    y = {}
    with torch.no_grad(), adapter_segments(model, ["b", "c"]):
        y["b"], y["c"] = model(x[:2].float())
    save_adapter(model, tmp_path / "b", "b")
    values = found["b"][0].clone()
    with torch.no_grad():
        found["b"][0].zero_()
    load_adapter(model, tmp_path / "b", "b")
    assert torch.equal(found["b"][0], values)
    assert adapter_parameters(model)["b"][0] is found["b"][0]
    set_adapter(model, "b")
    torch.testing.assert_close(model(x[:1].float())[0], y["b"])
    with pytest.raises(ValueError, match="got 'x'"):
        adapter_parameters(model, ["x"])


def test_adapters_that_will_not_train_are_named():
    model = nn.Sequential(nn.Linear(K, N))
    apply_lora(model, rank=2, target_modules=["0"])
    add_adapter(model, "b", rank=2)
    with pytest.warns(UserWarning, match="'b' will not train"), adapter_segments(model, ["b"]):
        pass
    adapter_parameters(model)
    with adapter_segments(model, ["b"]):
        pass


def test_losses():
    logits, labels = torch.randn(6, 5, 9, dtype=torch.float64), torch.randint(9, (6, 5))
    labels[0, :3] = labels[2] = labels[4] = -100
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    for given in (losses, losses.view(6, 5)):
        found = adapter_losses(given, NAMES, labels)
        assert list(found) == ["default", "c", "b"]
        for name in ("default", "c"):
            own = [i for i, n in enumerate(NAMES) if n == name]
            expected = F.cross_entropy(logits[own].flatten(0, 1), labels[own].flatten())
            torch.testing.assert_close(found[name], expected)
        assert found["b"] == 0
    torch.testing.assert_close(adapter_losses(losses, NAMES)["c"], losses[5:15].mean())
    broken = losses.clone()
    broken[:5] = float("nan")
    assert adapter_losses(broken, NAMES)["c"].isfinite()
    for call, hint in (
        ((losses[:-1], NAMES), "expected losses of 6 samples"),
        ((losses.mean(), NAMES), "not reduced, got shape"),
        ((losses.view(5, 6), NAMES), "expected losses of 6 samples"),
        ((losses, NAMES, labels[:4]), "expected labels of 30 entries"),
    ):
        with pytest.raises(ValueError, match=hint):
            adapter_losses(*call)


@pytest.mark.parametrize("make", [net, peft_net])
def test_clipping(make):
    model, x = make(), samples()
    before = together(model, x, NAMES)
    norms = clip_adapter_grad_norm_(model, 0.1)
    assert set(norms) == {"default", "b", "c"}
    for name, parameters in adapter_parameters(model, list(norms)).items():
        own = torch.stack([before[f"{name} {i}"].norm() for i in range(4)]).norm()
        torch.testing.assert_close(norms[name], own)
        now = torch.stack([p.grad.norm() for p in parameters]).norm()
        torch.testing.assert_close(now, own.clamp(max=0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [net, peft_net])
def test_compiled_models(make, nothing_compiled):
    model, x = make(), samples()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(x)
        torch.testing.assert_close(compiled(x), plain)
        for names in (NAMES, ["b"] * 6, NAMES):
            with adapter_segments(model, names):
                torch.testing.assert_close(compiled(x), model(x))
                assert not torch.allclose(model(x), plain)
            torch.testing.assert_close(compiled(x), plain)


def test_autocast():
    model, x = net(dtype=torch.float32), samples(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = together(model, x, NAMES), apart(model, x, NAMES)
    assert_equal(got, expected, 0.02)
