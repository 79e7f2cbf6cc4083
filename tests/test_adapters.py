"""Named adapters: add, switch in place, delete, combine; and the accuracy lost by switching."""

import copy

import pytest
import torch
from models import ALL, Tiny, assert_unchanged, snapshot, tokens, train_like
from torch import nn

from fused_lora import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    delete_adapter,
    lora_layers,
    lora_parameters,
    merge_lora,
    set_adapter,
)


@pytest.fixture
def ids():
    return tokens(4, 6, vocabulary=20)


def two_adapters(**kwargs) -> nn.Module:
    model = Tiny()
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    add_adapter(model, "second", **{"rank": 2, **kwargs})
    return model


def test_switching_back_and_forth(ids):
    model = Tiny()
    plain = model(ids)
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    first = model(ids)
    add_adapter(model, "second", rank=2, alpha=4, dropout=0.1)
    assert adapter_names(model) == ["default", "second"]
    assert torch.equal(model(ids), first)
    assert set_adapter(model, "second") == []
    assert adapter_names(model) == ["second", "default"]
    assert [model.hidden.scaling, model.hidden.dropout] == [2.0, 0.1]
    model.eval()
    torch.testing.assert_close(model(ids), plain)
    train_like(model)
    second = model(ids)
    set_adapter(model, "default")
    assert torch.equal(model(ids), first)
    set_adapter(model, "second")
    assert torch.equal(model(ids), second)
    assert set_adapter(model, "second") == []


def test_optimizers_stay_valid_where_shapes_match(ids):
    model = two_adapters()
    before = [(p, p.data_ptr()) for p in lora_parameters(model)]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    model(ids).sum().backward()
    set_adapter(model, "second")
    after = [(p, p.data_ptr()) for p in lora_parameters(model)]
    assert all(p is q and at == was for (p, at), (q, was) in zip(after, before, strict=True))
    assert all(p.grad is None for p in lora_parameters(model))  # not those of the other adapter
    values = model.hidden.lora_B.clone()
    model(ids).sum().backward()
    optimizer.step()
    assert not torch.equal(model.hidden.lora_B, values)
    trained = model.hidden.lora_B.clone()
    set_adapter(model, "default")
    set_adapter(model, "second")
    assert torch.equal(model.hidden.lora_B, trained)


def test_other_shapes_make_new_parameters_and_say_so(ids):
    model = two_adapters(rank_pattern={"hidden": 3})
    first = model(ids)
    old, kept = model.hidden.lora_A, model.out.lora_A
    with pytest.warns(UserWarning, match="1 of 4 layers, whose Parameters are new"):
        assert set_adapter(model, "second") == ["hidden"]
    assert model.hidden.lora_A is not old
    assert model.hidden.lora_A.shape == (3, 36)
    assert model.hidden.lora_A.requires_grad
    assert model.out.lora_A is kept
    with pytest.warns(UserWarning, match="new optimizer"):
        set_adapter(model, "default")
    assert torch.equal(model(ids), first)


def test_new_parameters_train_as_those_of_their_name_did(ids):
    model = two_adapters(rank=3)
    model.hidden.lora_A.requires_grad_(False)  # LoRA-FA
    with pytest.warns(UserWarning, match="new optimizer"):
        set_adapter(model, "second")
    assert not model.hidden.lora_A.requires_grad
    assert model.hidden.lora_B.requires_grad


def test_weighted_sums_refuse_dora_and_pissa():
    for arguments, hint in (
        ({"use_dora": True}, "adapters without DoRA, got 'default'"),
        ({"init": "pissa"}, "PiSSA model has one adapter"),
    ):
        model = nn.Sequential(nn.Linear(8, 6))
        apply_lora(model, rank=2, **arguments)
        with pytest.raises(ValueError, match=hint):
            add_weighted_adapter(model, "x", {"default": 1.0})


def test_dora_and_plain_adapters_may_alternate():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    apply_lora(model, rank=2)
    train_like(model)
    x = torch.randn(3, 8)
    plain = model(x)
    add_adapter(model, "dora", rank=2, use_dora=True)
    with pytest.warns(UserWarning, match="new"):
        set_adapter(model, "dora")
    assert model[0].use_dora
    assert len(list(lora_parameters(model))) == 6
    with pytest.warns(UserWarning, match="new"):
        set_adapter(model, "default")
    assert len(list(lora_parameters(model))) == 4
    assert torch.equal(model(x), plain)


def test_inactive_adapters_follow_moves_copies_and_stay_out_of_the_state(ids):
    model = two_adapters()
    set_adapter(model, "second")
    train_like(model)
    second = model(ids)
    set_adapter(model, "default")
    assert not any("second" in key for key in model.state_dict())
    moved = copy.deepcopy(model).double()
    set_adapter(moved, "second")
    torch.testing.assert_close(moved(ids), second.double(), rtol=1e-4, atol=1e-4)
    assert moved.hidden.lora_A.dtype == torch.float64
    assert model.hidden.inactive_adapters["second"].tensors["lora_A"].dtype == torch.float32


def test_delete():
    model = two_adapters()
    with pytest.raises(ValueError, match="the active one"):
        delete_adapter(model, "default")
    delete_adapter(model, "second")
    assert adapter_names(model) == ["default"]
    with pytest.raises(ValueError, match="expected one of the adapters default, got 'second'"):
        delete_adapter(model, "second")


def weighted(model: nn.Module, weight: float, rank: int | None = None) -> None:
    add_weighted_adapter(model, "x", {"second": weight}, combination="svd", rank=rank)


@pytest.mark.parametrize(
    ("call", "error", "hint"),
    [
        (lambda m: add_adapter(m, "second"), ValueError, "in use"),
        (lambda m: add_adapter(m, ""), ValueError, "got ''"),
        (lambda m: add_adapter(m, 3), TypeError, "a str, got int"),
        (lambda m: add_adapter(m, "x", use_dora=True), ValueError, "table: expected a linear"),
        (lambda m: add_adapter(m, "x", init="pissa"), ValueError, "PiSSA model has one"),
        (lambda m: add_adapter(m, "x", rank_pattern={"no": 2}), ValueError, "rank_pattern's 'no'"),
        (lambda m: set_adapter(m, "x"), ValueError, "adapters default, second, got 'x'"),
        (lambda m: weighted(m, 1.0, rank=0), ValueError, "rank >= 1, got 0"),
        (lambda m: weighted(m, 1.0, rank=-2), ValueError, "rank >= 1, got -2"),
        (lambda m: weighted(m, 1.0, rank=2.0), TypeError, "rank to be an int"),
        (lambda m: weighted(m, float("nan")), ValueError, "finite weight of 'second', got nan"),
        (lambda m: weighted(m, "1"), ValueError, "finite weight of 'second', got '1'"),
        (lambda m: add_weighted_adapter(m, "x", {}), ValueError, "weights of the adapters"),
        (lambda m: add_weighted_adapter(m, "x", {"y": 1.0}), ValueError, "weights of the adapters"),
        (
            lambda m: add_weighted_adapter(m, "x", {"second": 1.0}, combination="linear"),
            ValueError,
            "cat, svd, got 'linear'",
        ),
        (
            lambda m: add_weighted_adapter(m, "x", {"second": 1.0}, rank=3),
            ValueError,
            "rank=None with",
        ),
    ],
)
def test_misuse_is_told_and_changes_nothing(call, error, hint):
    model = two_adapters()
    before, names = snapshot(model), adapter_names(model)
    with pytest.raises(error, match=hint):
        call(model)
    assert_unchanged(model, before)
    assert adapter_names(model) == names


def test_merged_models_do_not_switch():
    model = two_adapters()
    merge_lora(model)
    for call in (
        lambda: set_adapter(model, "second"),
        lambda: set_adapter(model, "default"),
        lambda: add_adapter(model, "third"),
        lambda: add_weighted_adapter(model, "third", {"second": 1.0}),
    ):
        with pytest.raises(RuntimeError, match="table merged: unmerge_lora first"):
            call()


def delta(layer) -> torch.Tensor:
    A, B = layer.lora_A.double().flatten(1), layer.lora_B.double().flatten(1)
    return layer.scaling * B @ A


@pytest.mark.parametrize(("combination", "rank"), [("cat", None), ("svd", None), ("svd", 5)])
def test_weighted_sum(combination, rank):
    model = two_adapters(alpha=5, rank=3)
    deltas = {}
    for name in ("second", "default"):
        with pytest.warns(UserWarning, match="new optimizer"):
            set_adapter(model, name)
        train_like(model)
        deltas[name] = {n: delta(x).detach() for n, x in lora_layers(model).items()}
    add_weighted_adapter(
        model, "sum", {"default": 0.7, "second": -0.4}, combination=combination, rank=rank
    )
    with pytest.warns(UserWarning, match="new optimizer"):
        set_adapter(model, "sum")
    for name, layer in lora_layers(model).items():
        exact = 0.7 * deltas["default"][name] - 0.4 * deltas["second"][name]
        assert layer.rank == (5 if combination == "cat" else rank or 3)
        error = (delta(layer) - exact).norm()
        best = torch.linalg.svdvals(exact)[layer.rank :].norm()  # Eckart and Young's bound
        assert error <= best * 1.0001 + 1e-6 * exact.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switching_merged_adapters_by_copy_is_exact_and_by_subtraction_drifts(dtype, capsys):
    """Tutorials swap by subtracting one update and adding the next; ``merge`` copies the base."""
    swaps, layer = 50, nn.Linear(256, 256, bias=False, dtype=dtype)
    model = nn.Sequential(layer)
    apply_lora(model, rank=8)
    train_like(model, 0.05)
    add_adapter(model, "second", rank=8)
    set_adapter(model, "second")
    train_like(model, 0.05)
    base = layer.weight.clone()
    subtracted, updates = base.clone(), []
    for name in ("default", "second"):
        set_adapter(model, name)
        updates.append(delta(model[0]).detach().to(dtype))
    for swap in range(swaps):
        subtracted += updates[swap % 2]
        subtracted -= updates[swap % 2]
        set_adapter(model, ("default", "second")[swap % 2])
        model[0].merge()
        model[0].unmerge()
    drift = ((subtracted - base).double().norm() / base.double().norm()).item()
    with capsys.disabled():
        print(f"\n{swaps} swaps in {dtype}: copy drifts by 0, subtract-and-add by {drift:.1e}")
    assert torch.equal(model[0].weight, base)
    unit = torch.finfo(dtype).eps
    assert unit / 100 < drift < 50 * unit
