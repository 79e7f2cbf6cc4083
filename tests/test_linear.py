"""The module: construction, life cycle, state, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def trained(**kwargs) -> FusedLoRALinear:
    """A layer whose adapter changes the output: B is not zero."""
    layer = FusedLoRALinear(40, 24, rank=4, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def test_is_a_linear_that_starts_as_the_plain_one():
    linear = nn.Linear(40, 24)
    layer = FusedLoRALinear.from_linear(linear, rank=4, alpha=8)
    x = torch.randn(5, 40)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert torch.equal(layer(x), linear(x))
    assert layer.scaling == 2.0
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.shape == (4, 40)
    assert layer.lora_B.shape == (24, 4)
    assert not layer.lora_B.any()
    bound = 1 / 40**0.5
    assert bound / 2 < layer.lora_A.abs().max() <= bound


def test_from_linear_keeps_mode_and_refuses_what_it_does_not_reproduce():
    assert not FusedLoRALinear.from_linear(nn.Linear(4, 4).eval()).training
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Conv1d"):
        FusedLoRALinear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got FusedLoRALinear"):
        FusedLoRALinear.from_linear(FusedLoRALinear(4, 4))


@pytest.mark.parametrize(
    ("dtype", "asked", "adapter"),
    [
        (BF16, None, FP32),
        (FP16, None, FP32),
        (FP32, None, FP32),
        (FP64, None, FP64),
        (BF16, BF16, BF16),
    ],
)
def test_adapter_dtype(dtype, asked, adapter):
    layer = FusedLoRALinear(8, 6, rank=2, dtype=dtype, adapter_dtype=asked)
    assert layer.weight.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter
    assert layer(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_rslora_and_the_scaling_setter():
    layer = trained(alpha=16, use_rslora=True)
    assert layer.scaling == 8.0
    x = torch.randn(5, 40)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    delta = layer(x) - base
    layer.scaling = 4
    torch.testing.assert_close(layer(x) - base, delta / 2, rtol=1e-4, atol=1e-5)


def test_enabled():
    layer = trained()
    x = torch.randn(5, 40)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.enabled = True
    assert not torch.equal(layer(x), base)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_merge_and_unmerge(dtype):
    layer = trained(dtype=dtype)
    x = torch.randn(5, 40, dtype=dtype)
    base, on = layer.weight.clone(), layer(x)
    layer.merge()
    assert layer.merged
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), on, rtol=8 * unit, atol=64 * unit)
    layer.enabled = False
    assert torch.equal(layer(x), nn.functional.linear(x, base, layer.bias))
    layer.enabled = True
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    assert torch.equal(layer(x), on)


def test_merge_states_are_checked():
    layer = trained()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    layer.merge(keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        layer.unmerge()
    layer.enabled = False
    with pytest.raises(RuntimeError, match="keep_base=False"):
        layer(torch.randn(1, 40))


def test_gradients_reach_x_through_a_merged_layer():
    layer = trained()
    x = torch.randn(5, 40, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.merge()
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], expected)


def test_converting_a_merged_layer_converts_its_base():
    layer = trained()
    base = layer.weight.clone()
    layer.merge()
    layer.to(FP64)
    layer.unmerge()
    assert torch.equal(layer.weight, base.double())


def test_scaling_survives_conversion_exactly():
    layer = trained(alpha=1, use_rslora=False)
    layer.scaling = 0.1
    layer.to(BF16)
    assert layer.scaling == 0.1  # though the only copy is float32, which rounds it
    assert layer._scaling_tensor.dtype == FP32
    assert layer._scaling_tensor.item() == torch.tensor(0.1).item()


def test_scaling_may_be_set_after_a_move_in_inference_mode():
    layer = trained()
    with torch.inference_mode():
        layer.to_empty(device="cpu")
    layer.scaling = 3.0
    assert layer._scaling_tensor.item() == 3.0
    assert not layer._scaling_tensor.is_inference()


def test_state_dict_round_trip_and_names():
    layer, other = trained(), trained()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 40)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
def test_loads_a_plain_linears_state(strict):
    linear, layer = nn.Linear(40, 24), trained()
    adapter = layer.lora_B.detach().clone()
    result = layer.load_state_dict(linear.state_dict(), strict=strict)
    assert result.missing_keys == []
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.lora_B, adapter)


def test_one_missing_adapter_key_is_an_error():
    state = trained().state_dict()
    del state["lora_B"]
    with pytest.raises(RuntimeError, match="lora_B"):
        trained().load_state_dict(state)


def test_a_plain_linear_loads_the_base_of_a_merged_layer():
    layer = trained()
    base = layer.weight.clone()
    layer.merge()
    state = layer.state_dict()
    assert torch.equal(state["weight"], base)
    linear = nn.Linear(40, 24)
    linear.load_state_dict({k: state[k] for k in ("weight", "bias")})
    assert torch.equal(linear.weight, base)


def test_loading_into_a_merged_layer_merges_the_new_state():
    layer, source = trained(), trained()
    layer.merge()
    layer.load_state_dict(source.state_dict())
    assert layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer.lora_B, source.lora_B)


def test_state_of_a_final_merge_counts_the_adapter_once():
    layer, fresh = trained(), trained()
    x = torch.randn(5, 40)
    layer.merge(keep_base=False)
    merged = layer(x)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), merged)
    layer.load_state_dict({}, strict=False)
    assert layer.merged
    with pytest.raises(RuntimeError, match="keep_base=False"):
        layer.load_state_dict({"lora_A": layer.lora_A}, strict=False)
    layer.load_state_dict(fresh.state_dict())
    assert not layer.merged
    torch.testing.assert_close(layer(x), merged)


def test_assigning_into_a_merged_layer_leaves_the_checkpoint_alone():
    layer, state = trained(), trained().state_dict()
    before = state["weight"].clone()
    layer.merge()
    layer.load_state_dict(state, assign=True)
    assert torch.equal(state["weight"], before)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_layers_that_share_a_weight_merge_one_at_a_time():
    linear = nn.Linear(40, 24)
    first, second = (FusedLoRALinear.from_linear(linear, rank=4) for _ in range(2))
    first.merge()
    with pytest.raises(RuntimeError, match="another layer has merged"):
        second.merge()
    first.unmerge()
    second.merge()


def test_merging_a_computed_weight_is_refused():
    layer = trained()
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    with pytest.raises(TypeError, match="expected weight to be a Parameter"):
        layer.merge()


def test_merge_is_exact_under_autocast_and_usable_after_inference_mode():
    plain, cast = trained(), trained()
    cast.load_state_dict(plain.state_dict())
    plain.merge()
    with torch.autocast("cpu", dtype=BF16), torch.inference_mode():
        cast.merge()
    assert torch.equal(plain.weight, cast.weight)
    cast.enabled = False
    cast(torch.randn(5, 40, requires_grad=True)).sum().backward()


def test_reset_parameters_of_a_merged_layer_unmerges_it():
    layer = trained()
    layer.merge()
    layer.reset_parameters()
    assert not layer.merged
    x = torch.randn(5, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_meta_layer_restores_the_scale(assign):
    source = trained(alpha=8)
    layer = FusedLoRALinear(40, 24, rank=4, alpha=8, device="meta")
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer._scaling_tensor.device.type == "cpu"
    assert layer._scaling_tensor.item() == layer.scaling == 2.0
    x = torch.randn(5, 40)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_pickle_and_save(merged):
    layer = trained(dropout=0.1).eval()
    if merged:
        layer.merge()
    x = torch.randn(5, 40)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for clone in copies:
        assert torch.equal(clone(x), expected)
        assert clone.weight.data_ptr() != layer.weight.data_ptr()
        nn.init.zeros_(clone.lora_B)
        if merged:
            clone.unmerge()
    assert torch.equal(layer(x), expected)


def test_meta_construction_and_to_empty():
    layer = FusedLoRALinear(40, 24, rank=4, alpha=8, device="meta")
    layer.to_empty(device="cpu")
    assert layer.lora_A.isfinite().all()  # loading a plain layer's state would not set it
    assert not layer.lora_B.any()
    layer.reset_parameters()
    x = torch.randn(5, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer._scaling_tensor.item() == layer.scaling == 2.0
    assert layer.lora_A.std() > 0


def test_bias_trains_when_asked():
    layer = trained()
    layer.bias.requires_grad_()
    layer(torch.randn(5, 40)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((24,), 5.0))


def test_a_weight_that_requires_grad_is_refused():
    layer = trained()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen weight"):
        layer(torch.randn(5, 40))


def test_repr_says_what_differs():
    text = repr(trained(dropout=0.1, impl="torch"))
    for part in ("in_features=40", "rank=4", "scaling=4", "dropout=0.1", "impl='torch'"):
        assert part in text
    layer = trained()
    layer.merge()
    assert "merged" in repr(layer)


def test_layers_stack_and_train():
    torch.manual_seed(0)
    model = nn.Sequential(trained(), nn.ReLU(), FusedLoRALinear(24, 3, rank=2))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(64, 40), torch.randn(64, 3)
    frozen = [m.weight.clone() for m in (model[0], model[2])]
    losses = []
    for _ in range(50):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(m.weight, w) for m, w in zip((model[0], model[2]), frozen, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_merge_rounds_once_from_float32(dtype):
    layer = FusedLoRALinear(40, 24, rank=4, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    base = layer.weight.detach().float()
    exact = base + layer.scaling * (layer.lora_B.detach() @ layer.lora_A.detach())
    layer.merge()
    assert torch.equal(layer.weight, exact.to(dtype))


def test_a_computed_weight_that_requires_grad_is_taken_as_frozen():
    """A view of a sharded parameter can require a gradient although the parameter does not."""
    layer = FusedLoRALinear(8, 6, rank=2)
    computed = layer.weight.detach() * torch.ones((), requires_grad=True)
    del layer._parameters["weight"]
    layer.weight = computed
    layer(torch.randn(5, 8)).sum().backward()
    layer.enabled = False
    assert layer(torch.randn(5, 8)).shape == (5, 6)
