"""Whole models: disabling, merging, unmerging and unloading adapters."""

import copy
import functools

import pytest
import torch
from models import ALL, Tiny, assert_unchanged, gpt2, snapshot, stack, tokens, train_like
from torch import nn

from fused_lora import apply_lora, disable_lora, lora_layers, merge_lora, unload_lora, unmerge_lora


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("make", [gpt2, Tiny])
def test_disable_lora_is_the_base_and_comes_back(make, merged):
    model, ids = make(), tokens(4, 6, vocabulary=20)

    def output() -> torch.Tensor:
        y = model(ids)
        return getattr(y, "logits", y)

    base = output()
    apply_lora(model, target_modules=ALL if make is Tiny else "all-linear")
    train_like(model)
    if merged:
        merge_lora(model)
    on = output()
    assert (on - base).abs().max() > 0.01
    with disable_lora(model):
        assert torch.equal(output(), base)
    assert torch.equal(output(), on)
    next(iter(lora_layers(model).values())).enabled = False
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    states = [layer.enabled for layer in lora_layers(model).values()]
    assert states == [False] + [True] * (len(states) - 1)


def test_merge_unmerge_and_unload():
    model, ids = Tiny(), tokens(4, 6, vocabulary=20)
    plain = copy.deepcopy(model)
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    on = model(ids)
    weights = {name: layer.weight.clone() for name, layer in lora_layers(model).items()}
    merge_lora(model)
    torch.testing.assert_close(model(ids), on, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(x.weight, weights[n]) for n, x in lora_layers(model).items())
    with pytest.raises(RuntimeError, match=r"table: .*merged already"):
        merge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(x.weight, weights[n]) for n, x in lora_layers(model).items())
    assert torch.equal(model(ids), on)
    with pytest.raises(RuntimeError, match=r"table: .*not merged"):
        unmerge_lora(model)
    off = copy.deepcopy(model)
    assert unload_lora(off, merge=False) is off
    assert torch.equal(off(ids), plain(ids))
    assert off.state_dict().keys() == plain.state_dict().keys()
    model.hidden.merge()  # already merged; unload_lora merges the others
    unload_lora(model)
    torch.testing.assert_close(model(ids), on, rtol=1e-4, atol=1e-4)
    assert repr(model) == repr(plain)
    apply_lora(model, target_modules=ALL)
    merge_lora(model)  # no earlier layer still claims the weights


def test_unload_of_a_final_merge():
    model, x = stack(), torch.randn(2, 8)
    apply_lora(model)
    train_like(model)
    on = model(x)
    merge_lora(model, keep_base=False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"0: .*keep_base=False"):
        unload_lora(model, merge=False)
    with pytest.raises(RuntimeError, match=r"0: .*keep_base=False"):
        unmerge_lora(model)
    assert_unchanged(model, before)
    unload_lora(model)
    torch.testing.assert_close(model(x), on)


def test_a_tied_weight_is_not_merged():
    model, ids = gpt2(), tokens()
    apply_lora(model, target_modules=["c_attn", "wte"])
    train_like(model)
    before, on = snapshot(model), model(ids).logits
    for attempt in (merge_lora, unload_lora):
        with pytest.raises(
            ValueError, match=r"transformer\.wte alone, got one shared with lm_head"
        ):
            attempt(model)
        assert_unchanged(model, before)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, on, rtol=1e-4, atol=1e-4)


def one_storage() -> nn.Module:
    """Tied weights after ``load_state_dict(torch.load(...), assign=True)``: one shared storage."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    return model


def overlapping_rows() -> nn.Module:
    model, rows = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(12, 8)
    model[0].weight, model[1].weight = nn.Parameter(rows[:8]), nn.Parameter(rows[4:])
    return model


def one_parameter() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", [one_parameter, one_storage, overlapping_rows])
def test_parameters_that_share_memory_are_tied(make):
    model = make()
    apply_lora(model)
    train_like(model)
    before = snapshot(model)
    for attempt in (merge_lora, unload_lora):
        with pytest.raises(ValueError, match="0 alone, got one shared with 1"):
            attempt(model)
    assert_unchanged(model, before)
    model[0].merge()
    with pytest.raises(RuntimeError, match="another layer has merged into"):
        model[1].merge()
    if model[0].weight is model[1].weight:  # only this tie survives a deep copy
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="another layer has merged into"):
            twin[1].merge()
    model[0].unmerge()
    model[1].merge()


def test_a_weight_that_the_model_owns_too_is_named():
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_parameter("own", model[0].weight)
    apply_lora(model)
    with pytest.raises(ValueError, match="0 alone, got one shared with the model itself, which"):
        merge_lora(model)


def test_neighbours_in_one_storage_are_not_tied():
    model, rows = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(16, 8)
    model[0].weight, model[1].weight = nn.Parameter(rows[:8]), nn.Parameter(rows[8:])
    apply_lora(model)
    merge_lora(model)
    unmerge_lora(model)
    unload_lora(model)
    apply_lora(model)
    merge_lora(model)  # no earlier layer still claims the weights


@pytest.mark.parametrize("keep_base", [True, False])
def test_memory_that_runs_out_while_merging(keep_base, monkeypatch):
    model, x = stack(), torch.randn(2, 8)
    apply_lora(model)
    on = train_like(model)(x)
    before = snapshot(model)

    def full():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model[2][0], "_adapted_matrix", full)
    with pytest.raises(torch.OutOfMemoryError):
        merge_lora(model, keep_base)
    if keep_base:
        assert_unchanged(model, before)
    monkeypatch.undo()
    unload_lora(model)
    torch.testing.assert_close(model(x), on)


def test_a_merged_layer_is_not_initialised():
    model = stack()
    apply_lora(model)
    merge_lora(train_like(model))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="an unmerged layer to initialise"):
        model[0].reset_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize("part", ["lora_A", "weight"])
def test_a_state_of_other_shapes_leaves_a_final_merge_alone(part):
    model = stack()
    apply_lora(model)
    state = copy.deepcopy(train_like(model).state_dict())
    merge_lora(model, keep_base=False)
    before = snapshot(model)
    state[f"0.{part}"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"0, merged with keep_base=False, got .* other shapes"):
        model.load_state_dict({key: t for key, t in state.items() if key.startswith("0.")}, False)
    assert_unchanged(model, before)


def test_two_linears_with_one_weight_have_adapters_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert apply_lora(model) == ["0", "1"]
    assert model[0].weight is model[1].weight
    assert model[0].lora_A is not model[1].lora_A
    with pytest.raises(ValueError, match="0 alone, got one shared with 1"):
        merge_lora(model)
    unload_lora(model, merge=False)
    assert model[0].weight is model[1].weight


def test_a_computed_weight_is_not_merged():
    model, x = stack(), torch.randn(2, 8)
    apply_lora(model)
    train_like(model)
    nn.utils.parametrizations.weight_norm(model[2][1])
    on = model(x)
    for attempt in (merge_lora, unload_lora):
        with pytest.raises(TypeError, match=r"2\.1: expected weight to be a Parameter"):
            attempt(model)
        assert torch.equal(model(x), on)


def test_a_replaced_forward_is_not_unloaded():
    model = stack()
    apply_lora(model)
    model[2][0].forward = functools.partial(model[2][0].forward)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"2\.0: expected the forward of FusedLoRALinear"):
        unload_lora(model)
    assert_unchanged(model, before)


def tensors(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(), layer.base_weight]


@pytest.mark.parametrize("change", ["dtype", "device", "deepcopy", "state"])
def test_while_merged(change):
    model, ids = Tiny(), tokens(4, 6, vocabulary=20)
    apply_lora(model, target_modules=ALL, rank=2)
    train_like(model)
    merge_lora(model)
    on, state = model(ids), copy.deepcopy(model.state_dict())
    base = {name: layer._base_weight.clone() for name, layer in lora_layers(model).items()}
    if change == "dtype":
        model.double()
        torch.testing.assert_close(model(ids), on.double(), rtol=1e-4, atol=1e-4)
        base = {name: weight.double() for name, weight in base.items()}
    elif change == "device":
        model.to("meta")
        assert all(t.is_meta for layer in lora_layers(model).values() for t in tensors(layer))
        model.to_empty(device="cpu")
        model.load_state_dict(state)
        torch.testing.assert_close(model(ids), on, rtol=1e-4, atol=1e-4)
    elif change == "deepcopy":
        original, model = model, copy.deepcopy(model)
        unmerge_lora(original)
        assert torch.equal(model(ids), on)
    else:
        other = Tiny()
        apply_lora(other, target_modules=ALL, rank=2)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(ids), on, rtol=1e-4, atol=1e-4)
        model = other
        merge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(x.weight, base[n]) for n, x in lora_layers(model).items())
