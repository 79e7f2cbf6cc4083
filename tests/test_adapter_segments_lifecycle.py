"""Many adapters in one batch: what a block refuses, and what a change inside or its end does."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn

from fused_lora import (
    adapter_losses,
    adapter_parameters,
    adapter_segments,
    add_adapter,
    apply_lora,
    load_adapter,
    merge_lora,
    patch_peft,
    save_adapter,
    set_adapter,
    unpatch_peft,
)

peft = pytest.importorskip("peft")
from mixed_batches import NAMES, K, N, net, peft_net, samples, without, without_adapters  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")


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
            lambda: changed(lambda m: setattr(m[0], "impl", "triton:seeded")),
            ["b"],
            RuntimeError,
            "impl='triton:seeded', which does not support segments: use 'triton:split' or",
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
