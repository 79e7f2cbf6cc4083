"""Heads: ``modules_to_save`` as PEFT has it, and heads that no file holds.

Reports: peft#876 and peft#1070 (a classifier's head that is not saved), peft#2027 and its fix
peft#2033 ("all-linear" took the head), peft#493 (disabled adapters left the trained head in place),
peft#1574 and peft#1615 (several adapters, and their weighted sum), peft#1225 (the wrapper had no
``weight``), peft#2777 and peft#2803 (embeddings no longer tied).
"""

import copy
import pickle
import warnings

import pytest
import torch
from models import tokens
from torch import nn

from fused_lora import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    assert_only_lora_gradients,
    delete_adapter,
    disable_lora,
    lora_layers,
    lora_param_groups,
    lora_parameters,
    merge_lora,
    parameter_summary,
    save_adapter,
    set_adapter,
    unload_lora,
)
from fused_lora.models.parameters import unsaved_parameters
from support import by_default


class Net(nn.Module):
    """A layer to adapt and a head with a BatchNorm, in float64."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def trained(**arguments) -> tuple[Net, nn.Module]:
    """A plain model, and the same one adapted at ``body`` with another head's values."""
    torch.manual_seed(0)
    base = Net().eval()
    model = copy.deepcopy(base)
    apply_lora(
        model, rank=2, **{"target_modules": ["body"], "modules_to_save": ["head"]} | arguments
    )
    return base, disturb(model)


def disturb(model: nn.Module) -> nn.Module:
    """Give all Parameters that train other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def test_training_is_pefts():
    """PEFT's ModulesToSaveWrapper (peft 0.21, utils/other.py): same losses, buffers, counts."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Net()
    model = copy.deepcopy(base)
    apply_lora(model, rank=2, alpha=4, target_modules=["body"], modules_to_save=["head"])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["body"], modules_to_save=["head"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    layer = theirs.base_model.model.body
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(model.body.lora_A)
    # weight decay also moves what has no gradient
    optimizers = [
        torch.optim.SGD(lora_param_groups(model, lr=0.1, weight_decay=0.1)),
        torch.optim.SGD((p for p in theirs.parameters() if p.requires_grad), 0.1, weight_decay=0.1),
    ]
    for _ in range(3):
        for net, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(X).pow(2).mean().backward()
            optimizer.step()
    assert_only_lora_gradients(model)
    copied = theirs.base_model.model.head.modules_to_save["default"]
    for name, tensor in copied.state_dict().items():
        torch.testing.assert_close(model.head.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    assert parameter_summary(model).trainable == theirs.get_nb_trainable_parameters()[0]
    with disable_lora(model), theirs.disable_adapter():  # in training, BatchNorm's buffers change
        torch.testing.assert_close(model(X), theirs(X), rtol=1e-12, atol=1e-12)
    original = theirs.base_model.model.head.original_module
    torch.testing.assert_close(
        unload_lora(model, merge=False).head.state_dict(), original.state_dict()
    )


def test_disabled_adapters_leave_the_original_head():
    """peft#493: the trained head stayed while adapters were disabled."""
    base, model = trained()
    expected, weight = model(X), model.head[0].weight
    with disable_lora(model), disable_lora(model):
        assert torch.equal(model(X), base(X))
        assert not model.head[0].weight.requires_grad
    assert torch.equal(model(X), expected)
    assert model.head[0].weight is weight
    loss = model(X)
    with torch.no_grad(), disable_lora(model):  # as DPO's reference pass, before the backward
        reference = model(X)
    (loss - reference).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("compiled", by_default([False], [False, True]))
def test_merging_and_unloading(compiled):
    base, model = trained()
    expected = model(X)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(run(X), expected)
    with disable_lora(model):
        torch.testing.assert_close(run(X), base(X))
    merge_lora(model)
    torch.testing.assert_close(run(X), expected)
    plain = unload_lora(copy.deepcopy(model))
    torch.testing.assert_close(plain(X), expected)
    back = unload_lora(model, merge=False)
    assert torch.equal(back(X), base(X))
    for net in (plain, back):
        assert not any(p.requires_grad for p in net.parameters())
        assert not any("_apply" in vars(part) for part in net.modules())


def test_each_adapter_has_its_own_head():
    """peft#1574: the head of several adapters. An optimizer stays valid."""
    base, model = trained()
    first, weight = model(X), model.head[0].weight
    add_adapter(model, "b", rank=2)
    set_adapter(model, "b")
    assert torch.equal(model(X), base(X))  # as in PEFT, the copy is of the original
    assert model.head[0].weight is weight
    assert weight.requires_grad
    second = disturb(model)(X)
    set_adapter(model, "default")
    assert torch.equal(model(X), first)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))).to(torch.bfloat16).double()
    set_adapter(model, "b")
    rounded = copy.deepcopy(base).to(torch.bfloat16).double()
    torch.testing.assert_close(model(X), second, rtol=2e-2, atol=2e-2)
    with disable_lora(model):
        assert torch.equal(model(X), rounded(X))
    delete_adapter(model, "default")
    assert adapter_names(model) == ["b"]


def test_a_weighted_sum_has_no_head():
    """peft#1615: a sum of adapters silently got the untrained head; now PEFT raises too."""
    _, model = trained()
    expected = model(X)
    add_adapter(model, "b")
    with pytest.raises(ValueError, match=r"expected one adapter .*\(head\).*got default, b"):
        add_weighted_adapter(model, "sum", {"default": 0.5, "b": 0.5})
    add_weighted_adapter(model, "copy", {"default": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_adapter(model, "copy")
    torch.testing.assert_close(model(X), expected)


def test_the_module_stays_itself():
    """peft#1225: code that reads ``head.weight`` met a wrapper."""
    base, model = trained(modules_to_save=["head.3"])
    assert type(model.head[3]) is nn.Linear
    assert model.state_dict().keys() - base.state_dict().keys() == {"body.lora_A", "body.lora_B"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        *("body.lora_A", "body.lora_B", "head.3.weight", "head.3.bias")
    ]
    assert len(list(lora_parameters(model))) == 2
    assert "2 in" not in str(parameter_summary(model))
    assert f"{5 * 3 + 3} in modules_to_save" in str(parameter_summary(model))


NAMES = {  # PEFT compares the ends of names, dots or not
    "end": ["head"],
    "part": ["head.0"],
    "no dot": ["ead"],
    "nested": ["head", "3"],
    "several": ["head.1", "head.3"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_match_as_in_peft(names):
    peft = pytest.importorskip("peft")
    _, model = trained(modules_to_save=names)
    config = peft.LoraConfig(target_modules=["body"], r=2, modules_to_save=names)
    theirs = peft.get_peft_model(Net(), config)
    copied = {
        name.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad and "lora" not in name
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == copied


def test_targets_leave_trained_modules_out():
    """A module trains one way or the other; PEFT excludes it from the targets too."""
    base, model = trained(target_modules="all-linear")
    assert list(lora_layers(model)) == ["body"]
    with pytest.raises(ValueError, match="that modules_to_save does not train whole"):
        apply_lora(base, target_modules=["0"], modules_to_save=["head"])


class Odd(nn.Module):
    """Modules that cannot train whole."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.parts = nn.ModuleList([nn.Linear(4, 4)])
        self.table = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.empty = nn.Linear(4, 4, device="meta")
        self.coded = nn.Linear(4, 4)
        self.coded.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.idle = nn.ReLU()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["part"], ValueError, "match a module, got 'part'; similar names: parts"),
        (["body", "hea"], ValueError, "match a module, got 'hea'"),
        (["idle"], ValueError, "names idle without any"),
        (["empty"], ValueError, "empty.weight without .on the meta device"),
        (["parts"], TypeError, "got parts, a ModuleList: name its members, such as parts.0"),
        (["table"], TypeError, "got table, a ModuleDict"),  # as in PEFT
        (["coded"], TypeError, "float Parameters in modules_to_save, got coded.weight"),
        ("body", TypeError, "a list of names, got the str 'body'"),
        (5, TypeError, "a list of names, got the int 5"),
        ([""], TypeError, "names of modules as str"),
    ],
)
def test_refused_modules_leave_the_model_unchanged(names, error, message):
    model = Odd()
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        apply_lora(model, target_modules=["parts.0"], modules_to_save=names)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before


def test_a_name_that_also_ends_a_part_is_refused():
    """PEFT saves such a model, and its loading then fails on the key of the part."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"tell apart, got 1, which is also the end of 1\.1"):
        apply_lora(model, target_modules="0", modules_to_save=["1"])
    apply_lora(model, target_modules="0", modules_to_save=["1.1"])


def test_parameters_that_no_file_will_hold(tmp_path):
    """peft#876: a norm trained beside the adapters is not in the file."""
    base = Net()
    apply_lora(base, target_modules=["body"])
    base.head[1].weight.requires_grad_(True)
    base.body.bias.requires_grad_(True)
    assert unsaved_parameters(base) == ["body.bias", "head.1.weight"]
    with pytest.warns(UserWarning, match=r"body.bias, head.1.weight require grad.*modules_to_save"):
        save_adapter(base, tmp_path)
    with pytest.raises(RuntimeError, match=r"adapters only, got one at body.bias, head.1.weight"):
        assert_only_lora_gradients(base)
    _, model = trained()
    assert unsaved_parameters(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"every adapter and modules_to_save, got none at body"):
        assert_only_lora_gradients(model)


class Recurrent(nn.Module):
    """An LSTM, which lists its weights beside its Parameters."""

    def __init__(self):
        super().__init__()
        self.body, self.memory = nn.Linear(6, 6), nn.LSTM(6, 4)
        self.double()

    def forward(self, x):
        return self.memory(self.body(x))[0]


def test_a_module_that_lists_its_weights():
    base = Recurrent()
    model = copy.deepcopy(base)
    apply_lora(model, target_modules=["body"], modules_to_save=["memory"])
    expected = disturb(model)(X)
    copied = copy.deepcopy(base.memory)
    copied.load_state_dict(model.memory.state_dict())
    assert torch.equal(expected, copied(model.body(X))[0])
    with disable_lora(model):
        assert torch.equal(model(X), base(X))
    expected.sum().backward()
    assert_only_lora_gradients(model)
    assert torch.equal(unload_lora(model, merge=False)(X), base(X))


def test_parts_replaced_since_are_told(tmp_path):
    """SyncBatchNorm's conversion makes new modules, which have no originals."""
    _, model = trained()
    add_adapter(model, "b")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for action in (
        lambda: disable_lora(model).__enter__(),
        lambda: set_adapter(model, "b"),
        lambda: save_adapter(model, tmp_path, "b"),
        lambda: unload_lora(model, merge=False),
    ):
        with pytest.raises(RuntimeError, match="got a new SyncBatchNorm at 1 in it: replace mod"):
            action()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)  # the active adapter is whole


def test_originals_that_do_not_fit_are_told():
    """A head resized after apply_lora has no original of its size."""
    _, model = trained(modules_to_save=["head.3"])
    model.head[3].weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    model.head[3].bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    for undo in (lambda: disable_lora(model).__enter__(), lambda: unload_lora(model, merge=False)):
        with pytest.raises(
            ValueError, match=r"head.3.weight of shape \(3, 5\).*resize the model b"
        ):
            undo()
    with pytest.raises(RuntimeError, match="with memory for a module in modules_to_save, got meta"):
        trained()[1].to("meta")


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tied):
    """peft#2777: training one of two tied layers ends the tie; peft#2803: unless asked."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=30, num_hidden_layers=1, tie_word_embeddings=True, **sizes
    )
    base = transformers.LlamaForCausalLM(config).eval()
    model, ids = copy.deepcopy(base), tokens(2, 5, vocabulary=30)
    arguments = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": tied}
    if tied:
        apply_lora(model, **arguments)
    else:
        with pytest.warns(UserWarning, match="embed_tokens, no longer tied to lm_head, as in PEFT"):
            apply_lora(model, **arguments)
    disturb(model)
    head, table = model.lm_head, model.model.embed_tokens
    assert (head.weight is table.weight) == tied
    assert torch.equal(head.weight, base.lm_head.weight) != tied
    with disable_lora(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
    plain = unload_lora(model, merge=False)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    untied = transformers.LlamaConfig(vocab_size=30, num_hidden_layers=1, **sizes)
    base = transformers.LlamaForCausalLM(untied)
    with pytest.raises(ValueError, match="got lm_head, which share none"):
        apply_lora(base, modules_to_save=["lm_head"], ensure_weight_tying=True)


def test_merging_into_a_kept_original_is_refused():
    """The head's base weight is also the original of the trained embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30)
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.warns(UserWarning, match="no longer tied to lm_head"):
        apply_lora(model, include_head=True, modules_to_save=["wte"])
    disturb(model)
    with pytest.raises(ValueError, match=r"used by lm_head alone, got one shared with .*wte"):
        merge_lora(model)
    ids = tokens(2, 5, vocabulary=30)
    expected = model(ids).logits
    torch.testing.assert_close(unload_lora(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)
