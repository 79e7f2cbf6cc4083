"""Public reports: merges that overflow, and replicas of DataParallel."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import Tiny, assert_unchanged, snapshot, train_like
from special_bases import Doubled
from torch import nn

from fused_lora import (
    apply_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    patch_peft,
    unload_lora,
    unmerge_lora,
    unpatch_peft,
)

MERGES = {
    "merge": merge_lora,
    "final": lambda model: merge_lora(model, keep_base=False),
    "unload": unload_lora,
}
merges = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def overflowing(dtype, excess: float) -> nn.Module:
    """Two layers; one entry of the second merged weight is ``excess`` times the largest number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype))
    apply_lora(model, rank=2, alpha=2, adapter_dtype=torch.float64)
    train_like(model)
    root = torch.finfo(dtype).max ** 0.5 * excess**0.5
    with torch.no_grad():
        layer = model[1]
        layer.weight.zero_()
        layer.lora_A.zero_()[0, 3] = -root
        layer.lora_B.zero_()[5, 0] = root
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@merges
def test_a_merge_that_overflows_is_refused(dtype, merge):
    """peft#1001: NaN or infinity in merged weights; peft#3706: the base must stay untouched."""
    model = overflowing(dtype, 1.01)
    before = snapshot(model)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^1: expected a merged .* range of {name}, ±.*: call"):
        merge(model)
    assert_unchanged(model, before)
    if dtype != torch.float64:  # the cure that the message names
        model.double()
        merge(model)
        assert model[1].weight[5, 3] < -torch.finfo(dtype).max
        assert model[1].weight.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@merges
def test_the_largest_number_is_merged(dtype, merge):
    """peft#1001: a sum may overflow that the separate products do not; up to there it merges."""
    model = overflowing(dtype, 0.995)
    merge(model)
    assert model[1].weight[5, 3] < -0.99 * torch.finfo(dtype).max
    assert model[1].weight.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "lora_magnitude_vector"])
@merges
def test_values_that_are_not_finite_are_named(name, bad, merge):
    """peft#1001: NaN and infinity, which ``isnan`` alone would miss, before a merge."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_lora(model, rank=2, use_dora=True)
    train_like(model)
    with torch.no_grad():
        getattr(model[1], name).flatten()[3] = bad
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^1: expected finite values .* infinity in {name}"):
        merge(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["table", "conv", "hidden"])
def test_other_layers_overflow_alike(name):
    """peft#3706: the check was there for Linear and missing for Conv2d."""
    model = Tiny().half()
    apply_lora(model, rank=2, target_modules=["table", "conv", "hidden", "out"])
    with torch.no_grad():
        layer = model.get_submodule(name)
        layer.lora_A.fill_(3e3)
        layer.lora_B.fill_(3e3)
    for merge in MERGES.values():
        with pytest.raises(ValueError, match=f"^{name}: expected a merged .* float16"):
            merge(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    with pytest.raises(ValueError, match=r"^expected a merged .* or model\.bfloat16\(\) before"):
        layer.merge()


def test_doras_direction_of_a_row_of_zeros_is_named():
    """peft#2049: DoRA divides by the norm of a row of zeros, and the outputs are NaN."""
    model = nn.Sequential(nn.Linear(8, 8))
    apply_lora(model, rank=2, use_dora=True)
    with torch.no_grad():
        model[0].weight[3] = 0
    for merge in MERGES.values():
        with pytest.raises(ValueError, match="that DoRA computes of a row of zeros"):
            merge(model)


def test_a_merge_is_what_it_was():
    """LyCORIS#264: merging and restoring changed the base weights a little each time."""
    model = Tiny().half()
    apply_lora(model, rank=2, target_modules=["table", "conv", "hidden", "out"])
    train_like(model)
    base = {n: layer.weight.clone() for n, layer in lora_layers(model).items()}
    merge_lora(model)
    for name, layer in lora_layers(model).items():
        update = layer.lora_B.float().flatten(1) @ layer.lora_A.float().flatten(1)
        expected = layer.to_matrix(base[name]).float() + layer.scaling * update
        torch.testing.assert_close(layer.to_matrix(layer.weight), expected.half())
    unmerge_lora(model)
    assert all(torch.equal(x.weight, base[n]) for n, x in lora_layers(model).items())


def test_a_merged_layer_that_loads_an_overflow_stays_unmerged():
    """peft#3705: after an error in a merge the layer was half merged, and said it was not."""
    model = overflowing(torch.float16, 0.5)
    large = {key: t.clone() for key, t in overflowing(torch.float16, 1.5).state_dict().items()}
    merge_lora(model)
    with pytest.raises(RuntimeError, match="1, now unmerged: expected a merged weight within"):
        model.load_state_dict(large)
    assert model[0].merged
    assert not model[1].merged
    assert all(torch.equal(t, large[key]) for key, t in model.state_dict().items())


def replica(module: nn.Module) -> nn.Module:
    """What ``nn.parallel.replicate`` makes, on a CPU: tensors in place of Parameters."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for source, target in copies.items():
        for name, child in source._modules.items():
            setattr(target, name, None if child is None else copies[child])
        for name, parameter in source._parameters.items():
            if parameter is None:
                target._parameters[name] = None
            else:  # a tensor that is computed from the Parameter, as by a broadcast
                setattr(target, name, parameter.view_as(parameter))
        for name, buffer in source._buffers.items():
            if buffer is not None:
                setattr(target, name, buffer.clone())
    return copies[module]


def results(model: nn.Module, called: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = called(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_bias": True}, {"lora_dropout": 0.5}, {"use_dora": True}, {"use_rslora": True}],
    ids=str,
)
@pytest.mark.parametrize("everywhere", [True, False], ids=["class", "model"])
def test_replicas_of_a_patched_model_equal_pefts(options, everywhere):
    """peft#805: LoRA under DataParallel; pytorch#49828: a replica has no parameters."""
    peft = pytest.importorskip("peft")
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), Conv1D(8, 8), nn.Linear(8, 8, bias=False), Doubled(8, 4)
    )
    config = peft.LoraConfig(
        r=2, target_modules=["0", "2", "3", "4"], init_lora_weights=False, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D has fan_in_fan_out
        model = peft.get_peft_model(model, config)
    x = torch.randn(5, 8)
    expected = results(model, replica(model), x)
    assert len(expected) == 1 + sum(p.requires_grad for p in model.parameters())
    patch_peft(None if everywhere else model)
    for got, wanted in zip(results(model, replica(model), x), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    unpatch_peft()


@pytest.mark.usefixtures("unpatched")
def test_a_bias_that_is_no_parameter_runs_pefts_forward():
    """pytorch#49828: a replica's tensors are no Parameters, nor is a bias set as a tensor."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)),
        peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    )
    base = model.base_model.model[0].base_layer
    bias = base.bias.detach().clone()
    del base.bias
    base.bias = bias
    x = torch.randn(5, 8)
    expected = model(x)
    assert patch_peft(model).beside == {"base_model.model.0": "a computed weight or bias"}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"dropout": 0.3}], ids=str)
def test_replicas_of_our_own_layers_equal_them(options):
    """pytorch#49828: a replica has no parameters; peft#805: LoRA under DataParallel."""
    torch.manual_seed(0)
    kinds = [nn.Linear(8, 8), nn.Linear(8, 8, bias=False)]
    if "use_dora" not in options:
        kinds.append(Doubled(8, 8))
    model = nn.Sequential(*kinds)
    apply_lora(model, rank=2, **options)
    train_like(model)
    x = torch.randn(5, 8)
    expected = results(model, model, x)
    assert len(expected) == 1 + sum(1 for _ in lora_parameters(model))
    for got, wanted in zip(results(model, replica(model), x), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_replicas_of_embeddings_and_convolutions_equal_them():
    """pytorch#49828: a replica has no parameters; peft#805: LoRA under DataParallel."""
    model = Tiny()
    ids = torch.randint(1, 20, (2, 12))
    apply_lora(model, rank=2, target_modules=["table", "conv"])
    train_like(model)
    expected = results(model, model, ids)
    for got, wanted in zip(results(model, replica(model), ids), expected, strict=True):
        torch.testing.assert_close(got, wanted)
