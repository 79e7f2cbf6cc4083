"""What the checks of idle layers, read weights and fresh heads must tell, and must not tell."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import train_like
from torch import nn

from fused_lora import (
    apply_lora,
    check_adapters,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
    unload_lora,
)
from support import caught


def product(layer: nn.Linear, x):
    """A helper outside the class, whose reads no scan of the class finds."""
    return F.linear(x, layer.weight, layer.bias)


class Headed(nn.Module):
    """Without ``called``, only the head can train."""

    def __init__(self, called: bool = False):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.called = called

    def forward(self, x):
        return self.head(self.body(x) if self.called else product(self.body, x))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_head_that_trains_tells_that_no_adapter_runs(loaded, tmp_path):
    """unsloth-zoo#1242: adapters that no forward uses attach, step, and change nothing."""
    x = torch.randn(3, 8)
    model = Headed()
    names = {"target_modules": ["body"], "modules_to_save": ["head"]}
    if loaded:
        other = Headed()
        apply_lora(other, **names)
        save_adapter(other, tmp_path)
        load_adapter(model, tmp_path)
    else:
        apply_lora(model, **names)
    assert check_adapters(model) == {}
    _, log = caught(lambda: model(x).sum().backward())
    assert len(log) == 1
    assert "after the first backward pass, 1 of 1 adapted layers have never run. body:" in log[0]
    assert caught(lambda: model(x).sum().backward())[1] == []
    assert not any(p._post_accumulate_grad_hooks for p in model.head.parameters())
    assert check_adapters(model).keys() == {"body"}
    assert "saving, 1 of 1" in caught(save_adapter, model, tmp_path)[1][0]
    assert "merging, 1 of 1" in caught(merge_lora, model)[1][0]


def test_a_head_that_trains_beside_running_adapters_is_no_alarm(tmp_path):
    model = Headed(called=True)
    apply_lora(model, target_modules=["body"], modules_to_save=["head"])
    _, log = caught(lambda: model(torch.randn(3, 8)).sum().backward())
    assert log == []
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []
    assert caught(unload_lora, model)[1] == []


class Tied(nn.Module):
    """An embedding that is called, and whose weight is the decoder's too."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return F.linear(self.body(self.table(ids)), self.table.weight)


@pytest.mark.parametrize("merge", [merge_lora, unload_lora])
def test_merging_a_weight_that_is_run_and_read_is_told(merge):
    """peft#2018: merging the adapter of one of two tied layers changes the other's results."""
    model, ids = Tied(), torch.arange(5)
    _, log = caught(lambda: apply_lora(model, target_modules=["table", "body"]))
    reason = "table: Tied reads its weight, in some cases without calling it"
    assert len(log) == 1
    assert reason in log[0]
    model(ids).sum().backward()
    assert check_adapters(model) == {}
    assert caught(merge, copy.deepcopy(model))[1] == []  # B = 0 adds nothing
    train_like(model, 1.0)
    before = model(ids)
    _, log = caught(merge, model)
    assert len(log) == 1
    assert reason in log[0]
    assert "until it is merged" in log[0]
    assert (model(ids) - before).abs().max() > 1e-3


SIZES = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40},
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("saved", "loaded", "head"),
    [
        ("BertForSequenceClassification", "BertForSequenceClassification", None),
        ("BertForSequenceClassification", "BertForQuestionAnswering", "qa_outputs"),
        ("BertModel", "BertForSequenceClassification", "classifier"),
        ("BertForMaskedLM", "BertForTokenClassification", "classifier"),
        ("BertForTokenClassification", "BertForTokenClassification", None),
        ("BertForMaskedLM", "BertForSequenceClassification", "classifier, bert.pooler"),
        ("BertForMaskedLM", "BertForMultipleChoice", "classifier, bert.pooler"),
        ("BertForMaskedLM", "BertModel", "pooler"),
    ],
)
def test_a_head_from_the_checkpoint_is_not_fresh(saved, loaded, head, tmp_path):
    """peft#2369: heads "not initialized from the model checkpoint" need training, others do not."""
    T = pytest.importorskip("transformers")
    getattr(T, saved)(T.BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = getattr(T, loaded).from_pretrained(tmp_path)
    names, log = caught(apply_lora, model)
    if head is None:
        assert log == []
        assert "classifier" in names
        return
    assert len(log) == 1
    assert f"no adapter for {head}, frozen" in log[0]
    fresh = head.split(", ")
    assert not [name for name in names if name.startswith(tuple(fresh))]
    again = getattr(T, loaded).from_pretrained(tmp_path).eval()
    assert caught(apply_lora, again, modules_to_save=fresh)[1] == []
    train_like(again)
    ids = torch.arange(8).view(2, 4)
    if loaded == "BertForMultipleChoice":
        ids = ids[None]
    expected = again(ids)[0]
    assert caught(save_adapter, again, tmp_path / "adapter")[1] == []
    other = getattr(T, loaded).from_pretrained(tmp_path).eval()
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(ids)[0], expected)


def quantised(model):
    config = pytest.importorskip("torchao.quantization")
    config.quantize_(model, config.Int8WeightOnlyConfig())


def pissa(model):
    apply_lora(model, init="pissa")
    unload_lora(model)


def trained(model):
    apply_lora(model, target_modules=["q_proj"], modules_to_save=["mlp"])
    unload_lora(model)


def normed(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight * 1)


CHANGES = {
    "none": lambda model: None,
    "resize": lambda model: model.resize_token_embeddings(50),
    "half": lambda model: model.half(),
    "offload": lambda model: pytest.importorskip("accelerate").cpu_offload(model, "cpu"),
    "quantise": quantised,
    "pissa": pissa,
    "trained": trained,
    "copied": lambda model: setattr(model, "model", copy.deepcopy(model.model)),
    "assign": lambda model: model.model.load_state_dict(model.model.state_dict(), assign=True),
    "new weights": normed,
    "deeper": lambda model: model.model.layers.append(copy.deepcopy(model.model.layers[0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_found_and_changed_since_is_not_fresh(change, tmp_path):
    """transformers marks the Parameters that it found; other code makes new ones of them."""
    T = pytest.importorskip("transformers")
    config = T.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    T.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = T.LlamaForCausalLM.from_pretrained(tmp_path)
    CHANGES[change](model)
    names, log = caught(apply_lora, model)
    assert not [message for message in log if "afresh" in message]
    assert len(names) == (14 if change == "deeper" else 7)


def test_what_no_checkpoint_holds_is_not_fresh(tmp_path):
    """Marian's sinusoidal positions are computed: transformers ignores that they are missing."""
    T = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16}
    T.MarianMTModel(T.MarianConfig(**sizes)).save_pretrained(tmp_path)
    assert caught(apply_lora, T.MarianMTModel.from_pretrained(tmp_path))[1] == []


def test_a_pretrained_classifier_in_a_model_of_ones_own(tmp_path):
    """peft#2369: a head that from_pretrained found is not fresh."""
    T = pytest.importorskip("transformers")
    T.BertForSequenceClassification(T.BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = nn.ModuleDict({"scorer": T.BertForSequenceClassification.from_pretrained(tmp_path)})
    model["head"] = nn.Linear(2, 2)
    names, log = caught(apply_lora, model)
    assert {"scorer.classifier", "head"} <= set(names)
    assert log == []


READ_AND_CALLED = {  # how a layer is called whose weight is also read
    "getattr": 'getattr(self, f"p{k}")(x)',
    "constant": 'getattr(self, "p0")(x)',
    "nested": 'getattr(self.nest, f"p{k}")(x)',
    "modules": 'self._modules[f"p{k}"](x)',
    "children": "next(iter(self.nest.children()))(x)",
    "submodule": 'self.get_submodule(f"p{k}")(x)',
    "values": "[part(x) for part in self.table.values()][0]",
    "items": "[part(x) for _, part in self.table.items()][0]",
    "enumerate": "[part(x) for _, part in enumerate(self.row)][0]",
    "sum": 'getattr(self, "p" + str(k))(x)',
    "zip": "[part(x) for part, _ in zip(self.row, x)][0]",
}
METADATA = {  # no values are read
    "data": "self.p0(x.to(self.p0.weight.data.dtype))",
    "detach": "self.p0(x.to(self.p0.weight.detach().dtype))",
    "data detach": "self.p0(x.to(self.p0.weight.data.detach().device))",
    "size": "self.p0(x[..., : self.p0.weight.data.size(1)])",
    "container": "self.p0(x) * (len(self.row) > 0)",
    "to": "self.p0(x.to(self.p0.weight))",
    "to copy": "self.p0(x.to(self.p0.weight, copy=True))",
    "to data": "self.p0(x.to(self.p0.weight.data, True))",
    "type_as": "self.p0(x.type_as(self.p0.weight))",
    "zeros_like": "self.p0(x) + torch.zeros_like(self.p0.weight)[0]",
    "full_like": "self.p0(x) + torch.full_like(self.p0.weight, 2.0)[0]",
    "new_zeros": "self.p0(x) + self.p0.weight.new_zeros(8)",
}
VALUES = {  # values are read, and nothing is called
    "data": "F.linear(x, self.p0.weight.data)",
    "detach": "F.linear(x, self.p0.weight.detach())",
    "transposed": "x @ self.p0.weight.data.t()",
    "length": "F.linear(x, self.row[0].weight) * len(self.row)",
    "argument": "x.to(self.p0.weight.t() @ self.p0.weight)",
    "sum": "x.to(self.p0.weight + 1) @ self.p0.weight",
    "flag": 'F.linear(x, self.p0.weight) if getattr(self, "fast", True) else x',
}
SOURCE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.p0, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.nest = nn.Module()
        self.nest.p0 = self.p0
        self.row, self.table = nn.ModuleList([self.p0]), nn.ModuleDict({{"a": self.p0}})
    def forward(self, x, k=0):
        {}
"""


def network(body: str) -> nn.Module:
    names = {"nn": nn, "F": F, "torch": torch}
    exec(SOURCE.format(body), names)
    return names["Net"]()


@pytest.mark.parametrize("call", READ_AND_CALLED)
def test_a_layer_called_by_a_computed_name_is_adapted_with_a_warning(call):
    """As in awslabs/slapo, examples/pippy_test.py; here a penalty also reads the weight."""
    body = f"return self.last({READ_AND_CALLED[call]}) + self.p0.weight.norm()"
    model = network(body)
    names, log = caught(apply_lora, model)
    assert names == ["p0", "last"]
    assert len(log) == 1
    assert "p0: Net reads its weight, in some cases without calling it" in log[0]
    caught(lambda: apply_lora(network(body), target_modules=["p0"]))
    model(torch.randn(2, 8)).sum().backward()
    assert check_adapters(model) == {}


@pytest.mark.parametrize("body", METADATA)
def test_metadata_behind_data_or_detach_reads_no_values(body):
    """transformers' T5DenseActDense casts to ``wo.weight.dtype``; others write ``weight.data``."""
    names, log = caught(apply_lora, network(f"return self.last({METADATA[body]})"))
    assert names == ["p0", "last"]
    assert log == []


@pytest.mark.parametrize("body", VALUES)
def test_values_that_are_read_are_a_bypass(body):
    """peft#761: nn.MultiheadAttention and others use a weight without calling its layer."""
    names, log = caught(apply_lora, network(f"return self.last({VALUES[body]})"))
    assert names == ["last"]
    assert "p0 (Net reads its weight without calling it)" in log[0]


class Region(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(8, 8)

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return self.part(x).relu()


def test_regions_that_share_a_trace_raise_no_alarm(tmp_path):
    """pytorch#176121: a side effect in such a region is refused, or done once for all of them."""
    model = nn.Sequential(Region(), Region(), Region(), nn.Linear(8, 8))
    apply_lora(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model[3](model[2](model[1](model[0](x)))))
    for region in model[:3]:
        region.part.has_run = region is model[0]
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []
    for layer in lora_layers(model).values():  # as if none of them had been compiled
        layer.was_traced = False
    model[3].has_run = False
    assert check_adapters(model).keys() == {"1.part", "2.part", "3"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Stack(nn.Module):
    """Blocks in a loop that Dynamo leaves, so that it compiles one block's code for all of them."""

    def __init__(self):
        super().__init__()
        self.blocks, self.out = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 8)
        self.skipped = set()  # as LayerDrop skips blocks

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            torch._dynamo.graph_break()
            if index not in self.skipped:
                x = block(x)
        return self.out(x)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_graph_break_raises_no_alarm(steps, tmp_path):
    """transformers' Wav2Vec2, SwitchTransformers: their loops break the graph."""
    model = Stack()
    apply_lora(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 8)
    compiled(x)
    for _ in range(steps):
        assert caught(lambda: compiled(x).sum().backward())[1] == []
        model.zero_grad()
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []
    assert caught(unload_lora, model)[1] == []


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_skipped_at_random_raises_no_alarm(compiled, tmp_path):
    """LayerDrop, on by default in Wav2Vec2: in the first step some blocks do not run."""
    model = Stack()
    apply_lora(model)
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    model.skipped = {1}
    assert caught(lambda: forward(torch.randn(2, 8)).sum().backward())[1] == []
    skipped = set() if compiled else {"blocks.1.first", "blocks.1.second"}
    assert check_adapters(model).keys() == skipped  # the blocks share compiled code
    model.zero_grad()
    model.skipped = {0}
    forward(torch.randn(2, 8)).sum().backward()
    model.zero_grad()
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []


def test_blocks_that_all_read_their_weights_are_named():
    """Only blocks beside equal ones that ran count as skipped."""
    model = nn.Sequential(nn.ModuleList(Headed() for _ in range(2)), nn.Linear(8, 8))
    apply_lora(model)
    x = torch.randn(3, 8)
    _, log = caught(lambda: model[1](product(model[0][0].body, x)).sum().backward())
    assert "4 of 5 adapted layers have never run. 0.0.body, 0.0.head, 0.1.body" in log[0]


@pytest.mark.parametrize("way", ["modules_to_save", "by hand"])
def test_merging_what_never_ran_is_told_if_a_head_trained(way, tmp_path):
    model = Headed()
    apply_lora(model, target_modules=["body"], modules_to_save=["head"] * (way != "by hand"))
    model.head.requires_grad_(True)
    model(torch.randn(3, 8)).sum().backward()
    assert check_adapters(model).keys() == {"body"}
    assert "saving, 1 of 1" in caught(save_adapter, model, tmp_path)[1][0]
    assert "merging, 1 of 1" in caught(merge_lora, model)[1][0]
