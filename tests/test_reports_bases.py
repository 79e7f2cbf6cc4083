"""Public reports: adapters on bases that are quantised, hooked, or linear in another way."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import llama, tokens, train_like
from special_bases import BASES, Doubled, K, N, Net, OnlyLinear, linear
from torch import nn

from fused_lora import (
    FusedLoRAConv1D,
    FusedLoRALinear,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    assert_only_lora_gradients,
    delete_adapter,
    disable_lora,
    explain,
    fused_lora_linear,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from fused_lora.layers.beside import LoRABeside
from support import UNIT_ROUNDOFF, by_default, needs_triton, relative_rms

BF16, FP32 = torch.bfloat16, torch.float32
bases = pytest.mark.parametrize("name", BASES)
INT8 = "Int8WeightOnlyConfig"
TARGETS = ["before", "base", "after"]


def adapted(name: str, dtype=FP32, **options) -> Net:
    torch.manual_seed(0)
    model = Net(BASES[name][0](dtype), dtype)
    apply_lora(model, rank=4, target_modules=TARGETS, **options)
    return train_like(model)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@bases
def test_the_sum_and_its_gradients_are_eagers(name, dtype):
    """transformers#32306: torchao quantises a Linear's weight, and adapters train beside it."""
    make, fused = BASES[name]
    torch.manual_seed(0)
    base = make(dtype)
    x, dy = torch.randn(5, K, dtype=dtype, requires_grad=True), torch.randn(5, N, dtype=dtype)
    plain = base(x.detach()).detach()
    model = Net(base, dtype)
    assert apply_lora(model, rank=4, target_modules=TARGETS) == TARGETS
    layer = model.base
    assert type(layer) is (FusedLoRALinear if fused else LoRABeside)
    assert fused or layer.base_layer is base
    assert layer.lora_A.dtype == layer.lora_B.dtype == FP32  # as PEFT's
    assert layer.lora_A.device == layer.lora_B.device == x.device
    assert torch.equal(layer(x), plain)
    train_like(model)
    leaves = [x, layer.lora_A, layer.lora_B]

    def eager():
        y = F.linear(x, layer.weight, layer.bias) if fused else base(x)
        low = F.linear(F.linear(x, layer.lora_A.to(dtype)), layer.lora_B.to(dtype))
        return y + layer.scaling * low.to(y.dtype)

    y, expected = layer(x), eager()
    assert y.dtype == expected.dtype == plain.dtype
    unit = UNIT_ROUNDOFF[dtype]
    assert relative_rms(y, expected) <= 4 * unit
    gradients = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    for got, wanted in zip(*gradients, strict=True):
        assert got.dtype == wanted.dtype
        assert relative_rms(got, wanted) <= 4 * unit
    model(x).sum().backward()
    assert_only_lora_gradients(model)
    with torch.autocast("cpu", BF16):
        assert relative_rms(layer(x), expected) <= 2.0**-6


@bases
def test_the_life_of_an_adapter(name, tmp_path):
    """qlora#145 (artidoro): an adapter goes into a quantised model, and on training there."""
    model, x = adapted(name), torch.randn(5, K)
    base, layer, on = model.base, model.base, model(x)
    with disable_lora(model):
        off = model(x)
    assert not torch.allclose(on, off)
    save_adapter(model, tmp_path)
    # An adapter of a special base loads on a plain one, under PEFT's keys, and back.
    full = Net(linear(FP32))
    assert sorted(load_adapter(full, tmp_path)) == sorted(TARGETS)
    assert torch.equal(full.base.lora_A, layer.lora_A)
    save_adapter(full, tmp_path / "full")
    again = Net(BASES[name][0](FP32))
    load_adapter(again, tmp_path / "full")
    assert type(again.base) is type(layer)
    assert torch.equal(again.base.lora_B, layer.lora_B)
    load_adapter(model, tmp_path, "b")
    add_adapter(model, "c", rank=2)
    assert set_adapter(model, "b") == []
    assert torch.equal(model(x), on)
    with pytest.warns(UserWarning, match="new optimizer"):
        set_adapter(model, "c")
    assert torch.equal(model(x), off)
    with pytest.warns(UserWarning, match="new optimizer"):
        set_adapter(model, "b")
    delete_adapter(model, "c")
    add_weighted_adapter(model, "half", {"b": 0.5})
    if name != "tensor subclass":  # PyTorch cannot copy it
        assert torch.equal(copy.deepcopy(model)(x), on)
    explain(layer)
    assert "rank=4" in repr(layer) or "Tensor" in repr(layer)  # torchao replaces extra_repr
    base = layer if BASES[name][1] else layer.base_layer
    unload_lora(model, merge=False)
    assert torch.equal(model(x), off)
    if base is not layer:
        assert model.base is base


@bases
def test_merging_is_refused_before_anything_changes(name):
    """peft#2321: merging into 4-bit weights changes the outputs."""
    model, x = adapted(name), torch.randn(5, K)
    on = model(x)
    for attempt in (merge_lora, lambda model: merge_lora(model, keep_base=False), unload_lora):
        with pytest.raises(TypeError, match=r"base: expected a plain .*load_adapter and merge in"):
            attempt(model)
        assert not any(layer.merged for layer in lora_layers(model).values())
        assert torch.equal(model(x), on)


@bases
def test_what_needs_the_weights_values_is_refused(name, tmp_path):
    """peft#1474: DoRA needs the norms of the weight, which a quantised layer does not have."""
    for option in ({"use_dora": True}, {"init": "pissa"}):
        model = Net(BASES[name][0](FP32))
        with pytest.raises(
            ValueError, match=r"base: expected a plain weight for .*exclude_modules"
        ):
            apply_lora(model, rank=4, target_modules=TARGETS, **option)
        assert not any(hasattr(module, "lora_A") for module in model.modules())
    model = adapted(name)
    with pytest.raises(ValueError, match="base: expected a plain weight for use_dora"):
        add_adapter(model, "dora", use_dora=True)
    full = Net(linear(FP32))
    apply_lora(full, rank=4, target_modules=TARGETS, use_dora=True)
    save_adapter(full, tmp_path)
    with pytest.raises(ValueError, match="base: expected a plain weight for use_dora"):
        load_adapter(Net(BASES[name][0](FP32)), tmp_path)


@needs_triton
@bases
def test_the_kernels_run_beside(name):
    """litgpt#694: the quantised product and the adapter's are computed apart and added."""
    x = torch.randn(5, K)
    torch.testing.assert_close(adapted(name, impl="triton:addmm")(x), adapted(name)(x))


@pytest.mark.parametrize(
    "name",
    by_default(
        ["torchao int8"],
        ["torchao int8", "bitsandbytes nf4", "subclass", "tensor subclass"],
    ),
)
def test_compiled_and_copied(name):
    """peft#1886: quantised models that were fine-tuned with PEFT could not be compiled."""
    model, x = adapted(name), torch.randn(5, K)
    on = model(x)
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    assert set(state) == {f"{t}.{p}" for t in TARGETS for p in ("lora_A", "lora_B")}
    if name != "tensor subclass":  # Dynamo does not know it
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), on)
    model.load_state_dict({n: torch.zeros_like(t) for n, t in state.items()}, strict=False)
    assert not torch.allclose(model(x), on)
    model.load_state_dict(state, strict=False)
    assert torch.equal(model(x), on)


@pytest.mark.parametrize("config", by_default([INT8], [INT8, "Float8WeightOnlyConfig"]))
def test_torchao_models_equal_pefts(config, tmp_path):
    """diffusers#11752, diffusers#10621; also with the model quantised after it was adapted."""
    peft = pytest.importorskip("peft")
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(model):
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    torch.manual_seed(0)
    plain, ids = llama(), tokens()
    first = quantise(copy.deepcopy(plain))
    assert len(apply_lora(first, rank=4, alpha=8)) == 14
    train_like(first)
    save_adapter(first, tmp_path)
    # peft#3223: adapters first, quantised second
    second = copy.deepcopy(plain)
    load_adapter(second, tmp_path)
    quantise(second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(quantise(plain), tmp_path, is_trainable=True)
    expected = theirs(input_ids=ids, labels=ids)
    expected.loss.backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for model in (first, second):
        got = model(input_ids=ids, labels=ids)
        torch.testing.assert_close(got.logits, expected.logits)
        got.loss.backward()
        for name, p in model.named_parameters():
            if "lora_" in name:
                key = f"base_model.model.{name}.default.weight"
                torch.testing.assert_close(p.grad, wanted[key], rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match=r"got a .*Tensor, which cannot hold the sum"):
        merge_lora(second)


@pytest.mark.parametrize("bits", by_default([4], [4, 8]))
def test_qlora_trains_as_with_peft(bits, tmp_path):
    """peft#2321's steps: bitsandbytes while loading, PEFT's preparation, then adapters."""
    pytest.importorskip("bitsandbytes")
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    llama().save_pretrained(tmp_path)
    ids = tokens()

    def load():
        config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        return peft.prepare_model_for_kbit_training(
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=config, device_map="cpu"
            )
        )

    ours = load()
    apply_lora(ours, rank=4, alpha=8)
    assert {type(layer) for layer in lora_layers(ours).values()} == {LoRABeside}
    save_adapter(train_like(ours), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter", is_trainable=True)
    losses = []
    for model in (ours.train(), theirs.train()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[0]
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-4, atol=0)


def test_dora_that_is_quantised_afterwards_is_refused():
    """peft#3223: adapters first, quantised second, with torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(K, N))
    apply_lora(model, use_dora=True)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="expected a plain weight for use_dora"):
        model(torch.randn(3, K))


def test_a_base_that_drops_gradients_is_refused():
    """ao#4376: torchao's schemes with dynamic activations are for inference only."""
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(nn.Linear(K, K), nn.Linear(K, N)), torch.randn(3, K)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    apply_lora(model, rank=4)
    train_like(model)
    with pytest.raises(RuntimeError, match=r"got a Int8Tensor that drops them.*torch\.no_grad"):
        model(x)
    with torch.no_grad():
        assert model(x).shape == (3, N)

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    model = nn.Sequential(nn.Linear(K, K), Detached(K, N))
    apply_lora(model, rank=4)
    with pytest.raises(RuntimeError, match="got a Detached that drops them"):
        model(x)


def test_an_offloaded_model_equals_one_in_memory():
    """peft#868, peft#1190: a model dispatched by accelerate before it is adapted."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    plain, ids = llama(), tokens()
    model = copy.deepcopy(plain)
    apply_lora(plain, rank=4)
    train_like(plain)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    apply_lora(model, rank=4)
    for p, q in zip(lora_parameters(model), lora_parameters(plain), strict=True):
        p.data.copy_(q.data)
    expected, got = (m(input_ids=ids, labels=ids) for m in (plain, model))
    assert torch.equal(got.logits, expected.logits)
    expected.loss.backward()
    got.loss.backward()
    for p, q in zip(lora_parameters(model), lora_parameters(plain), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(ids).logits, expected.logits)
    unload_lora(model, merge=False)
    apply_lora(model, rank=4)  # without its hooks it is a plain model again
    assert {type(layer) for layer in lora_layers(model).values()} == {FusedLoRALinear}
    train_like(model)
    on = model(ids).logits
    unload_lora(model)
    torch.testing.assert_close(model(ids).logits, on)


def test_the_layer_stands_for_its_base():
    """Other code reads and ties weights; hooks see the sum, and their handles stay valid.

    Megatron-Bridge#4198: attention code reads ``weight`` of a layer that LoRA wraps.
    """
    base = Doubled(8, 8)
    seen = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output))
    base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model = nn.Sequential(base, nn.Linear(8, 8))
    plain = copy.deepcopy(model).state_dict()
    assert apply_lora(model, rank=2) == ["0", "1"]  # all-linear has subclasses, as PEFT's
    train_like(model)
    layer, x = model[0], torch.randn(3, 8)
    assert layer.weight is base.weight
    assert (layer.in_features, layer.out_features) == (8, 8)
    y = model(x)
    assert torch.equal(seen[-1], layer(x))
    expected = base(x + 1) + layer.scaling * (x + 1) @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(seen[-1], expected)
    model.load_state_dict(plain)  # a plain model's state loads strictly, as for other layers
    assert torch.equal(model(x), y)
    layer.weight = tied = nn.Parameter(torch.zeros(8, 8))
    assert base.weight is tied
    assert "weight" not in layer._parameters
    unload_lora(model, merge=False)
    handle.remove()
    seen.clear()
    torch.testing.assert_close(model[0](x), (2 * base.bias).expand(3, 8))
    assert not seen
    with pytest.raises(AttributeError, match="Doubled"):
        layer.no_such_attribute  # noqa: B018


def test_what_no_adapter_can_stand_beside():
    """Baichuan2#340, "Target module NormHead() is not supported": say what is."""
    model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"lazy ones \(0\.weight, 0\.bias\): call the model once"):
        apply_lora(model)
    model = nn.Sequential(nn.Bilinear(8, 8, 8))
    with pytest.raises(TypeError, match="expected targets to be Linear"):
        apply_lora(model, target_modules=["0"])

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = nn.Sequential(Pair(8, 8))
    apply_lora(model)
    with pytest.raises(TypeError, match=r"\(3, 8\) from the Pair beside an adapter, got a tuple"):
        model(torch.randn(3, 8))

    class Grouped(nn.Linear):  # transformers' DeepseekV4GroupedLinear
        def forward(self, x):
            return super().forward(x)[..., :4]

    model = nn.Sequential(Grouped(8, 8))
    apply_lora(model)
    with pytest.raises(
        ValueError, match=r"the Grouped beside an adapter, got shape \(3, 4\): leave"
    ):
        model(torch.randn(3, 8))


def test_the_function_multiplies_a_special_weight_by_its_own_product():
    """transformers#32306: the layer stays a Linear, its weight's own class multiplies."""
    weight = torch.randn(N, K).as_subclass(OnlyLinear)
    A, B = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    x = torch.randn(5, K, requires_grad=True)
    plain = weight.as_subclass(torch.Tensor)
    got, expected = (fused_lora_linear(x, w, A, B, scaling=0.5) for w in (weight, plain))
    torch.testing.assert_close(got, expected)
    dy = torch.randn(5, N)
    gradients = (torch.autograd.grad(y, [x, A, B], dy) for y in (got, expected))
    torch.testing.assert_close(*gradients)


def test_conv1d_with_a_special_weight_runs_itself():
    """transformers#24504: quantisation of GPT-2, whose layers are Conv1D."""
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)
    model = nn.Sequential(layer)
    apply_lora(model, target_modules=["0"])
    assert type(model[0]) is FusedLoRAConv1D
    unload_lora(model)
    layer = model[0]
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OnlyLinear), requires_grad=False)
    apply_lora(model, target_modules=["0"])
    assert type(model[0]) is LoRABeside
