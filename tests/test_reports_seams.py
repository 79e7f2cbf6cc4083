"""Combinations of reported cases: where two tools, or a tool and an error, meet in one layer.

The tests without a source of their own combine cases that the other files ``test_reports_*``
cite one by one: quantised, hooked, resized, parametrized or on the meta device, and then switched,
merged, disabled or saved.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import llama, tokens, train_like
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_lora import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    check_adapters,
    disable_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from fused_lora.layers.beside import LoRABeside


class Sub(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def two(kind=nn.Linear, size: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(size, size), kind(size, size))


def adapted(model: nn.Module, **options) -> nn.Module:
    apply_lora(model, rank=2, **options)
    return train_like(model)


def quantise(model: nn.Module, *names: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    config = torchao.Int8WeightOnlyConfig()
    torchao.quantize_(model, config, filter_fn=lambda module, name: name in names)


def names_of(model: nn.Module) -> list:
    layers = lora_layers(model).values()
    return [(layer.adapter_name, sorted(layer.inactive_adapters)) for layer in layers]


def test_a_layer_that_cannot_switch_leaves_all_as_they_were():
    """peft#1663: a model whose layers disagree about the active adapter."""
    model = adapted(two(), target_modules=["0", "1"])
    add_adapter(model, "b", rank=2)
    parametrize.register_parametrization(model[1], "lora_A", Twice())
    before, x = names_of(model), torch.randn(3, 8)
    y = model(x)
    with pytest.raises(RuntimeError, match=r"^1: expected lora_A to be a Parameter"):
        set_adapter(model, "b")
    assert names_of(model) == before
    assert torch.equal(model(x), y)


def test_a_trained_module_that_cannot_be_copied_leaves_no_new_name():
    model = adapted(two(), target_modules=["0"], modules_to_save=["1"])
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(RuntimeError, match=r"Parameter|parametrization"):
        add_weighted_adapter(model, "w", {"default": 1.0})
    assert adapter_names(model) == ["default"]


@pytest.mark.parametrize("names", [["1"], ["0", "1"]])
def test_a_layer_quantised_while_merged_is_not_unmerged(names):
    """peft#3223: adapters first, quantised second; peft#2321: quantised weights are not exact."""
    model = adapted(two(size=64))
    merge_lora(model)
    state = copy.deepcopy(model.state_dict())
    quantise(model, *names)
    x = torch.randn(3, 64)
    y = model(x)
    for undo in (unmerge_lora, lambda model: unload_lora(model, merge=False)):
        with pytest.raises(
            TypeError, match=r"expected a plain weight to restore, got a Int8Tensor"
        ):
            undo(model)
        assert all(layer.merged for layer in lora_layers(model).values())
        assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match=r"1: expected a plain weight to restore"):
        model.load_state_dict(state)
    unload_lora(model)  # the cure
    assert torch.equal(model(x), y)


def test_hooks_come_and_go_around_a_layer_beside():
    """diffusers#10730: hooks of accelerate that wrap a wrapper recurse without end."""
    accelerate = pytest.importorskip("accelerate")
    model, x = two(), torch.randn(3, 8)
    accelerate.cpu_offload(model, execution_device="cpu")
    adapted(model)
    layer = model[0]
    assert type(layer) is LoRABeside
    y = model(x)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), y)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(x), y)
    inner, twice = layer.forward, lambda x: 2 * inner(x)
    layer.forward = twice
    assert "forward" in vars(layer)
    torch.testing.assert_close(layer(x), 2 * inner(x))


def test_hooks_are_called_after_a_failed_apply():
    model = nn.Sequential(Sub(8, 8), nn.Conv2d(8, 8, 1, groups=2))
    calls = []
    handle = model[0].register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match="groups=1"):
        apply_lora(model, target_modules=["0", "1"])
    assert type(model[0]) is Sub
    model[0](torch.randn(3, 8))
    assert len(calls) == 1
    handle.remove()
    assert not model[0]._forward_hooks


def test_an_adapter_on_meta_beside_a_loaded_base_is_initialised(tmp_path):
    """peft#1961: an adapter created on meta is on its weight's device once that is loaded."""
    x, plain = torch.randn(3, 8), two(Sub)
    with torch.device("meta"):
        model = nn.Sequential(Sub(8, 8), Sub(8, 8))
    apply_lora(model, rank=2)
    unloaded = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"got a layer on the meta device: load its weights"):
        unloaded(x)
    model.load_state_dict(plain.state_dict(), assign=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(x), plain(x))
    assert model[0].lora_A.norm() > 0
    source = adapted(two(Sub))
    save_adapter(source, tmp_path)
    load_adapter(model, tmp_path)
    assert torch.equal(model(x), source(x))
    state = source.state_dict()
    unloaded.load_state_dict(state, assign=True)  # adapters in the state are not initialised anew
    assert torch.equal(unloaded(x), source(x))


@pytest.mark.parametrize("first", [True, False])
def test_a_quantised_embedding_has_an_adapter(first, tmp_path):
    """peft#3223: quantised before or after it is adapted; peft#337: LoRA of embeddings."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 64)), torch.arange(9)
    targets = {"target_modules": ["0", "1"]}
    if first:
        quantise(model, "0")
        table = model[0](torch.arange(32))
        adapted(model, **targets)
    else:
        adapted(model, **targets)
        quantise(model, "0")
        with disable_lora(model):
            table = model[0](torch.arange(32))
    layer = model[0]
    expected = table[ids] + layer.scaling * layer.lora_A.t()[ids] @ layer.lora_B.t()
    torch.testing.assert_close(layer(ids), expected)
    model(ids).sum().backward()
    assert check_adapters(model) == {}
    save_adapter(model, tmp_path)
    add_adapter(model, "b", rank=3)
    with pytest.raises(TypeError, match="0: expected a plain weight to merge into"):
        merge_lora(model)


def test_a_pissa_layer_quantised_afterwards_refuses_a_state_first():
    """peft#3223: adapters first, quantised second."""
    model = adapted(two(size=64), init="pissa")
    state = copy.deepcopy(model.state_dict())
    quantise(model, "1")
    train_like(model)
    before = {name: p.detach().clone() for name, p in model[1].named_parameters() if "lora" in name}
    with pytest.raises(RuntimeError, match="load the state before the model is quantised"):
        model.load_state_dict(state)
    assert all(torch.equal(model[1].get_parameter(name), p) for name, p in before.items())


@pytest.mark.parametrize("kind", ["merged", "pissa"])
def test_a_layer_resized_while_its_base_is_aside_says_so(kind):
    """peft#1746: a weight of another shape than the adapter's, and no error."""
    if kind == "merged":
        model, ids = llama(), tokens(vocabulary=80)
        adapted(model, target_modules=["q_proj", "embed_tokens"])
        merge_lora(model)
        model.resize_token_embeddings(110)
        layer = model.get_input_embeddings()
        for state in (model.state_dict, layer.state_dict):
            with pytest.raises(
                RuntimeError, match=r"got \(100, 32\): the merged layer was resized"
            ):
                state()
    else:
        model, ids = adapted(two(), init="pissa"), torch.randn(3, 8)
        model[1].weight = nn.Parameter(torch.randn(9, 8), requires_grad=False)
    with (
        disable_lora(model),
        pytest.raises(RuntimeError, match=r"expected a base weight of shape .* was resized"),
    ):
        model(ids)


@pytest.mark.parametrize("kind", ["merged", "pissa"])
def test_a_disabled_layer_does_not_drop_the_gradient_of_a_computed_weight(kind):
    """A derivative that is not computed is an error, not a zero."""
    model = adapted(two(), init="pissa" if kind == "pissa" else "default")
    if kind == "merged":
        merge_lora(model)
    layer, x = model[0], torch.randn(3, 8)
    weight = torch.randn(8, 8, requires_grad=True)
    call = torch.func.functional_call
    with disable_lora(model):
        expected = layer(x)
        with pytest.raises(RuntimeError, match="expected a weight without gradient"):
            call(layer, {"weight": weight}, (x,))
        assert torch.equal(call(layer, {"weight": weight.detach()}, (x,)), expected)
        # Derivatives in anything else go on working.
        own = dict(layer.named_parameters())
        jacobian = torch.func.grad(lambda x: call(layer, own, (x,)).sum())(x)
        base = layer.base_weight
        torch.testing.assert_close(jacobian, base.sum(0).expand(3, 8))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", ["prune", "weight_norm", "spectral_norm"])
def test_weights_that_old_hooks_compute_are_refused_with_the_cure(compute):
    """retinanet-examples#257: ``prune.remove`` finds its hook on the pruned layer alone."""
    apply, remove = {
        "prune": (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            lambda layer: prune.remove(layer, "weight"),
        ),
        "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    }[compute]
    model = two().eval()
    apply(model[0])
    with pytest.raises(TypeError, match=r"^0: expected weight to be a Parameter.*permanent first"):
        apply_lora(model)
    x = torch.randn(3, 8)
    y = model(x)
    remove(model[0])
    apply_lora(model)
    torch.testing.assert_close(model(x), y)


def test_merging_goes_on_beside_a_sparse_parameter():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    sparse = torch.eye(4).to_sparse()
    for name, tensor in {"s": sparse, "c": sparse.to_sparse_csr()}.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    adapted(model)
    x = torch.randn(3, 8)
    y = model["a"](x)
    merge_lora(model)
    torch.testing.assert_close(model["a"](x), y)


def test_merging_beside_names_a_cure_that_works(tmp_path):
    """peft#868: merging an offloaded model."""
    accelerate = pytest.importorskip("accelerate")
    model, x = two(), torch.randn(3, 8)
    accelerate.cpu_offload(model, execution_device="cpu")
    adapted(model)
    y = model(x)
    with pytest.raises(TypeError, match=r"cannot be known to be exact.*remove_hook_from_module"):
        merge_lora(model)
    save_adapter(model, tmp_path)
    unload_lora(model, merge=False)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    load_adapter(model, tmp_path)
    merge_lora(model)
    torch.testing.assert_close(model(x), y)
    with pytest.raises(TypeError, match=r"computes no other product, nn.Linear with its weight"):
        merge_lora(adapted(two(Sub)))


def test_a_forward_that_failed_has_not_run():
    model = nn.Sequential(Sub(8, 8), nn.Conv2d(3, 4, 1), nn.Embedding(5, 8))
    apply_lora(model, target_modules=["0", "1", "2"])
    good = torch.randn(2, 8), torch.randn(1, 3, 4, 4), torch.tensor([1])
    bad = torch.randn(2, 5), torch.randn(1, 2, 4, 4), torch.tensor([9])
    for layer, wrong, right in zip(model, bad, good, strict=True):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            layer(wrong)
        assert not layer.has_run
        layer(right)
        assert layer.has_run
