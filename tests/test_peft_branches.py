"""Patched PEFT against PEFT itself, branch by branch: outputs, gradients, hooks, errors."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from fused_lora import patch_peft
from support import UNIT_ROUNDOFF, watch_patch

peft = pytest.importorskip("peft")
from peft.tuners.lora import Linear  # noqa: E402
from peft.tuners.lora import config as lora_config  # noqa: E402
from peft_nets import assert_same, first, net, plain_call, results, second_adapter  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


def each(model: nn.Module, change) -> nn.Module:
    for name in ("first", "second"):
        change(getattr(model.base_model.model, name))
    return model


def replaced_base(change):
    def build() -> nn.Module:
        model = net()
        first(model).base_layer = change(first(model).base_layer)
        return model

    return build


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(linear: nn.Linear) -> nn.Linear:
    other = OtherLinear(24, 16)
    other.load_state_dict(linear.state_dict())
    return other.requires_grad_(False)


def accelerated(linear: nn.Linear) -> nn.Linear:
    plain = linear.forward
    linear.forward = lambda x: plain(x) + 1
    return linear


def hotswap() -> nn.Module:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = net()
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    assert isinstance(first(model).scaling["default"], torch.Tensor)
    return model


def inherited(model: nn.Module) -> nn.Module:
    class Inherits(Linear):
        pass

    return each(model, lambda layer: setattr(layer, "__class__", Inherits))


def uncast() -> nn.Module:
    model = net(torch.bfloat16)
    return each(model, lambda layer: setattr(layer, "cast_input_dtype_enabled", False))


def eval_dropout(model: nn.Module) -> nn.Module:
    return each(model.train(), lambda layer: layer.lora_dropout.eval())


def mixed(module: nn.Module, x):
    return module.eval()(x, adapter_names=["default", "__base__", "other", "other", "__base__"])


def disabled(module, x):
    with module.disable_adapter():
        return module(x)


def autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def checkpointed(reentrant):
    def call(module, x):
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)

    return call


def merged(model: nn.Module) -> nn.Module:
    model.merge_adapter()
    return model


CASES = {  # how to build, how to call, and why PEFT's forward is kept (None: fused)
    "plain": (net, plain_call, None),
    "bf16 base, fp32 adapters": (lambda: net(BF16), plain_call, None),
    "bf16": (lambda: net(BF16, autocast_adapter_dtype=False), plain_call, None),
    "fp16 base, fp32 adapters": (lambda: net(FP16), plain_call, None),
    "fp64": (lambda: net(FP64), plain_call, None),
    "dropout in eval": (lambda: net(lora_dropout=0.3).eval(), plain_call, None),
    "dropout's own mode": (lambda: eval_dropout(net(lora_dropout=0.3)), plain_call, None),
    "autocast": (net, autocast, None),
    "autocast, bf16 base": (lambda: net(BF16), autocast, None),
    "bias all": (lambda: net(bias="all"), plain_call, None),
    "bias lora_only": (lambda: net(bias="lora_only"), plain_call, None),
    "rslora": (lambda: net(use_rslora=True), plain_call, None),
    "hot swap": (hotswap, plain_call, None),
    "set_scale": (lambda: each(net(), lambda x: x.set_scale("default", 0.3)), plain_call, None),
    "frozen A": (
        lambda: each(net(), lambda x: x.lora_A.requires_grad_(False)),
        plain_call,
        None,
    ),
    "checkpointed": (net, checkpointed(False), None),
    "checkpointed, reentrant": (net, checkpointed(True), None),
    "one layer's other adapter": (
        lambda: each(second_adapter(net()), lambda x: x.set_adapter("other")),
        plain_call,
        None,
    ),
    "two active adapters": (lambda: second_adapter(net()), plain_call, "2 active adapters"),
    "no active adapter": (
        lambda: each(net(), lambda x: setattr(x, "_active_adapter", "absent")),
        plain_call,
        "no active adapter",
    ),
    "disabled": (net, disabled, None),
    "merged": (lambda: merged(net()), plain_call, "its adapters are merged"),
    "mixed batch": (lambda: second_adapter(net()), mixed, "2 active adapters"),
    "not cast": (uncast, plain_call, None),
    "lora bias": (lambda: net(lora_bias=True), plain_call, "a bias in lora_B"),
    "dora": (lambda: net(use_dora=True), plain_call, "the variant Dora"),
    "velora": (
        lambda: net(velora_config=lora_config.VeloraConfig()), plain_call, "the variant Velora"
    ),
    "monteclora": (
        lambda: net(monteclora_config=lora_config.MontecloraConfig()).eval(),  # else it samples
        plain_call,
        "the variant Monteclora",
    ),
    "kasa": (lambda: net(kasa_config=lora_config.KasaConfig()), plain_call, "the variant Kasa"),
    "mica": (lambda: net(init_lora_weights="mica"), plain_call, "the variant MiCA"),
    "bd-lora": (
        lambda: net(
            use_bdlora=lora_config.BdLoraConfig(
                target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2
            )
        ),
        plain_call,
        "the variant BdLora",
    ),
    "trainable base": (
        lambda: each(net(), lambda x: x.base_layer.requires_grad_(True)), plain_call, None
    ),
    "fp64 adapters": (
        lambda: each(net(), lambda x: (x.lora_A.double(), x.lora_B.double())),
        plain_call,
        "adapters in torch.float64 on a base in torch.float32",
    ),
    "bf16 adapters on fp32": (
        lambda: each(net(), lambda x: (x.lora_A.bfloat16(), x.lora_B.bfloat16())),
        plain_call,
        "adapters in torch.bfloat16 on a base in torch.float32",
    ),
    "subclass of Linear": (replaced_base(subclass), plain_call, None),
    "computed base": (replaced_base(nn.utils.parametrizations.weight_norm), plain_call, None),
    "replaced forward": (replaced_base(accelerated), plain_call, None),
    "inherited forward": (lambda: inherited(net()), plain_call, "a lora.Inherits layer"),
    "everything dropped": (
        lambda: net(lora_dropout=0.5).train() and each(
            net(lora_dropout=0.5).train(),
            lambda x: setattr(x.lora_dropout["default"], "p", 1.0),
        ),
        plain_call,
        None,
    ),
}  # fmt: skip


BESIDE = {  # fused beside the first layer's base, which runs its own forward for this reason
    "trainable base": "a trainable base weight",
    "subclass of Linear": "class OtherLinear",
    "computed base": "class ParametrizedLinear",
    "replaced forward": "such as accelerate's",
}


@pytest.mark.parametrize("everywhere", [True, False], ids=["class", "model"])
@pytest.mark.parametrize("case", CASES)
def test_branch(case, everywhere):
    build, call, reason = CASES[case]
    model = build()
    dtype = first(model).base_layer.weight.dtype
    x = torch.randn(5, 24).to(dtype)
    expected = results(model, call, x)
    exact, low = None, BF16 if "autocast" in case else dtype
    if low in (BF16, FP16) and case != "not cast":
        exact = results(copy.deepcopy(model).double(), plain_call, x.double())
    report = patch_peft(None if everywhere else model)
    got = results(model, call, x)
    assert_same(got, expected, exact, UNIT_ROUNDOFF.get(low, 2.0**-52))
    if not everywhere:
        why = report.layers["base_model.model.first"]
        assert why is None if reason is None else reason in why
        why = report.beside.get("base_model.model.first")
        assert BESIDE[case] in why if case in BESIDE else why is None


def test_the_fused_path_is_taken(monkeypatch):
    calls = watch_patch(monkeypatch.setattr)
    for case, (build, call, reason) in CASES.items():
        model = build()
        patch_peft(model)
        x = torch.randn(5, 24).to(first(model).base_layer.weight.dtype)
        calls.clear()
        with contextlib.suppress(RuntimeError):  # "not cast" raises it
            call(model, x)
        kept = reason or case in ("disabled", "not cast", "everything dropped")
        expected = ["_added" if case in BESIDE else "_fused"]
        expected.append("_added" if case == "trainable base" else "_fused")
        assert calls == ([] if kept else expected), case


class Column(nn.Linear):
    def forward(self, x):
        return super().forward(x)[..., :1]


def test_a_base_whose_output_is_no_linear_layers(monkeypatch):
    """PEFT broadcasts such an output, and so does the patch."""
    calls = watch_patch(monkeypatch.setattr)
    model, x = net(), torch.randn(5, 24)
    first(model).base_layer.__class__ = Column
    expected = results(model, plain_call, x)
    patch_peft(model)
    got = results(model, plain_call, x)
    assert calls == ["_fused"]  # the call of the second layer
    assert_same(got, expected, None, UNIT_ROUNDOFF[torch.float32])


@pytest.mark.parametrize("role", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_the_parts_fire(role, register):
    model, fired = net(lora_dropout=0.1).eval(), []
    part = getattr(first(model), role)
    part = part if role == "base_layer" else part["default"]
    getattr(part, register)(lambda *_: fired.append(1))
    results(model, plain_call, torch.randn(5, 24))
    expected = len(fired)
    report = patch_peft(model)
    reasons = report.beside if role == "base_layer" else report.layers
    assert reasons["base_model.model.first"] == f"{role}: a hook"
    results(model, plain_call, torch.randn(5, 24))
    assert len(fired) == 2 * expected > 0


def test_hooks_on_every_module_fire():
    model, seen = net(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(torch.randn(5, 24))
        expected = list(seen)
        patch_peft(model)
        seen.clear()
        model(torch.randn(5, 24))
    finally:
        handle.remove()
    assert seen == expected
    assert first(model).base_layer in seen


INPUTS = {
    "1-D": lambda: torch.randn(24),
    "3-D": lambda: torch.randn(2, 3, 24),
    "empty": lambda: torch.randn(0, 24),
    "strided": lambda: torch.randn(24, 6).t(),
    "too narrow": lambda: torch.randn(5, 23),
    "float64": lambda: torch.randn(5, 24).double(),
    "integers": lambda: torch.randint(9, (5, 24)),
    "0-D": lambda: torch.randn(()),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_any_shape_and_the_errors_of_wrong_ones(name):
    model, x = net(), INPUTS[name]()

    def outcome():
        leaf = x.detach().clone()
        if x.is_floating_point():
            leaf.requires_grad_()
        try:
            y = model(leaf)
            y.sum().backward()
            return y.detach(), leaf.grad
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    patch_peft(model)
    if isinstance(expected[0], torch.Tensor):
        torch.testing.assert_close(outcome(), expected)
    else:
        assert outcome() == expected


def test_transforms_and_forward_mode_are_pefts():
    model, x = net(), torch.randn(5, 24)
    functions = {
        "vmap": lambda: torch.func.vmap(model)(x),
        "grad": lambda: torch.func.grad(lambda x: model(x).sum())(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
        "forward_ad": lambda: dual(model, x),
        "inference": lambda: inferred(model, x),
    }
    expected = {name: function() for name, function in functions.items()}
    patch_peft(model)
    for name, function in functions.items():
        torch.testing.assert_close(function(), expected[name], msg=name)


def dual(model, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent


def inferred(model, x):
    with torch.inference_mode():
        return model(x).clone()
