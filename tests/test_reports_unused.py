"""Adapters without effect: a weight that is read without calling its layer (peft#2274 and others).

Each test names the public report that it answers.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import assert_unchanged, snapshot, train_like
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    apply_lora,
    assert_only_lora_gradients,
    check_adapters,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_adapter,
    unload_lora,
)
from fused_lora.models.bypass import bypassed
from support import caught, relative_rms, swept

HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NEVER = "never run while others have"


def mamba(**changes):
    T = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 100, "state_size": 4}
    return T.MambaForCausalLM(T.MambaConfig(**sizes | changes)).eval()


def wavlm():
    T = pytest.importorskip("transformers")
    convolutions = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,)}
    sizes = {"hidden_size": 32, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return T.WavLMModel(T.WavLMConfig(**sizes | HEADS | convolutions)).eval()


class Chosen(nn.Module):
    """``experts`` may be skipped; the weights in ``hidden`` are read where no code shows it."""

    def __init__(self, bypass: bool = True):
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.hidden = nn.ModuleDict({"part": nn.Linear(8, 8)})
        self.bypass = bypass

    def forward(self, x):
        for part in list(self.hidden.values()):
            x = F.linear(x, part.weight, part.bias) if self.bypass else x
        return self.called(x)


def test_all_linear_leaves_out_what_mamba_reads_itself():
    """state-spaces/mamba#279: the LoRA parameters of Mamba get no gradient."""
    model, ids = mamba(), torch.arange(12)[None]
    names, log = caught(apply_lora, model)
    assert [name.rpartition(".")[2] for name in names] == ["in_proj", "x_proj"]
    assert "dt_proj (MambaMixer reads its weight without calling it)" in log[0]
    assert "out_proj (MambaMixer reads its weight, in some cases without calling it)" in log[0]
    _, log = caught(lambda: model(ids, labels=ids).loss.backward())
    assert not log
    assert_only_lora_gradients(model)
    assert check_adapters(model) == {}
    train_like(model)
    expected = model(ids).logits
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dt_proj", "out_proj", "conv1d"])
def test_naming_what_mamba_reads_itself_is_refused(name):
    """peft#2556: raise an error for out_proj and conv1d of Mamba-based models."""
    model = mamba()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name}: MambaMixer reads its weight.*exclude_modules"):
        apply_lora(model, target_modules=["in_proj", name])
    assert_unchanged(model, before)
    apply_lora(model, target_modules=["in_proj", name], exclude_modules=[name])


def test_what_is_called_here_and_read_elsewhere_is_adapted_with_a_warning():
    """state-spaces/mamba#279: LoRA gets no gradient where the fast path only reads weights."""
    model, ids = mamba(), torch.arange(12)[None]
    names, log = caught(lambda: apply_lora(model, target_modules=["x_proj"]))
    assert len(names) == len(log) == 1
    assert "x_proj: MambaMixer reads its weight, in some cases" in log[0]
    model(ids, labels=ids).loss.backward()
    assert_only_lora_gradients(model)


@pytest.mark.parametrize(
    ("reader", "refused"),
    [
        ("mamba2.modeling_mamba2.Mamba2Mixer", {"out_proj", "conv1d"}),
        ("falcon_mamba.modeling_falcon_mamba.FalconMambaMixer", {"dt_proj", "out_proj", "conv1d"}),
        ("falcon_h1.modeling_falcon_h1.FalconH1Mixer", {"out_proj", "conv1d"}),
        ("jamba.modeling_jamba.JambaMambaMixer", {"dt_proj", "conv1d"}),
        ("bamba.modeling_bamba.BambaMixer", {"out_proj", "conv1d"}),
        ("wavlm.modeling_wavlm.WavLMAttention", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("wav2vec2.modeling_wav2vec2.Wav2Vec2Attention", set()),
        ("t5.modeling_t5.T5DenseActDense", set()),  # reads wo.weight.dtype and its class
        ("llama.modeling_llama.LlamaAttention", set()),
    ],
)
def test_other_families(reader, refused):
    """peft#2274 (Mamba2 passes out_proj.weight on), transformers#48773 (WavLM), and neighbours."""
    pytest.importorskip("transformers")
    import importlib

    module, _, name = reader.rpartition(".")
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    children = (
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "in_proj",
        "dt_proj",
        "conv1d",
        "wi",
        "wo",
    )
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    for child in children:
        setattr(model, child, nn.Linear(2, 2))
    found = bypassed(model)
    assert {n for n in children if (b := found.get(id(getattr(model, n)))) and b.refused} == refused


def test_wavlm_trains_what_it_calls():
    """transformers#48773: the adapters of WavLM's attention have grad=None and never train."""
    model = wavlm()
    names, log = caught(lambda: apply_lora(model, rank=2))
    assert "(WavLMAttention reads its weight without calling it)" in log[0]
    assert names
    assert not [name for name in names if name.endswith(("q_proj", "k_proj", "v_proj", "out_proj"))]
    model(torch.randn(2, 400)).last_hidden_state.sum().backward()
    assert_only_lora_gradients(model)


READS = {
    "argument": "F.linear(x, self.inner.weight, self.inner.bias)",
    "product": "x @ self.inner.weight.t()",
    "helper": "self.helper(x)",
    "property": "x @ self.transposed",
    "submodule": "F.linear(x, self.nest.inner.weight)",
    "index": "F.linear(x, self.row[0].weight)",
    "loop": "sum(F.linear(x, part.weight) for part in self.row)",
}
OTHERS = {
    "call": "self.inner(x)",
    "dtype": "self.inner(x.to(self.inner.weight.dtype))",
    "shape": "self.inner(x[..., : self.inner.weight.shape[1]])",
    "none": "self.inner(x) if self.inner.weight is not None else x",
    "isinstance": "self.inner(x) if isinstance(self.inner.weight, torch.Tensor) else x",
    "elsewhere": "self.inner(x) + self.unrelated",
    "rows": "sum(part(x) for part in self.row) + self.row[0](x)",
}
SOURCE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.nest = nn.Module()
        self.nest.inner = self.inner
        self.row = nn.ModuleList([self.inner])
        self.unrelated = self.inner.weight.sum().item()
    def tie(self): return self.inner.weight
    def helper(self, x):
        part = self.inner
        return F.linear(x, part.weight)
    @property
    def transposed(self): return self.inner.weight.t()
    def forward(self, x): return self.called({})
"""


def network(body: str) -> nn.Module:
    """A module whose class has no source file, as in a notebook."""
    names = {"nn": nn, "F": F, "torch": torch}
    exec(SOURCE.format(body), names)
    return names["Net"]()


@pytest.mark.parametrize("body", READS)
def test_a_weight_read_by_any_module_is_found(body):
    """peft#761: nn.MultiheadAttention and others use a weight without calling its layer."""
    model = network(READS[body])
    names, log = caught(apply_lora, model)
    assert names == ["called"]
    assert "inner (Net reads its weight without calling it)" in log[0]
    model(torch.randn(3, 8)).sum().backward()
    assert_only_lora_gradients(model)


@pytest.mark.parametrize("body", OTHERS)
def test_reading_no_values_is_no_bypass(body):
    names, log = caught(apply_lora, network(OTHERS[body]))
    assert names == ["inner", "called"]
    assert not log


def run(model, use_reentrant=None, x=None):
    x = torch.randn(4, 8, requires_grad=True) if x is None else x
    y = model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)
    y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_first_backward_names_the_layers_that_never_ran(use_reentrant):
    """unsloth-zoo#1242: adapters that no forward uses attach, step, and change nothing."""
    model = Chosen()
    apply_lora(model)
    assert check_adapters(model) == {}  # nothing has run yet
    _, log = caught(run, model, use_reentrant)
    assert len(log) == 1
    assert (
        "after the first backward pass, 1 of 2 adapted layers have never run. hidden.part" in log[0]
    )
    assert "leave it out with exclude_modules" in log[0]
    assert "an expert" in log[0]
    assert caught(run, model, use_reentrant)[1] == []
    assert not any(p._post_accumulate_grad_hooks for p in lora_parameters(model.called))
    problems = check_adapters(model)
    assert problems.keys() == {"hidden.part"}
    assert NEVER in problems["hidden.part"]


def test_saving_and_merging_name_them_too(tmp_path):
    """peft#2556: such layers fail silently, or when they are merged."""
    model = Chosen()
    apply_lora(model)
    x = torch.randn(4, 8)
    expected = model(x)
    _, log = caught(save_adapter, model, tmp_path)
    assert len(log) == 1
    assert (
        f"saving, 1 of 2 adapted layers have never run. hidden.part: its forward has {NEVER}"
        in log[0]
    )
    _, log = caught(merge_lora, model)
    assert len(log) == 1
    assert "merging, 1 of 2 adapted layers have never run. hidden.part" in log[0]
    torch.testing.assert_close(model(x), expected)  # B = 0 adds nothing


def test_an_expert_without_tokens_is_merged_exactly():
    model = Chosen(bypass=False)
    apply_lora(model)
    train_like(model, 1.0)
    model(torch.randn(4, 8))
    part = lora_layers(model)["hidden.part"]
    expected = part.weight.double() + part.scaling * part.lora_B.double() @ part.lora_A.double()
    _, log = caught(merge_lora, model)
    assert NEVER in log[0]
    assert relative_rms(part.weight, expected) < 2.0**-23


@pytest.mark.parametrize("name", ["dt_proj", "x_proj"])
def test_a_file_for_such_a_layer_loads_as_in_peft_and_is_not_merged(name, tmp_path):
    """peft#2274: PEFT adapts dt_proj, whose adapter has no effect until it is merged."""
    peft = pytest.importorskip("peft")
    model, ids = mamba(), torch.arange(12)[None]
    config = peft.LoraConfig(target_modules=["in_proj", name], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    _, log = caught(load_adapter, model, tmp_path)
    assert f"{name}: MambaMixer reads its weight" in log[0]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    if name == "x_proj":  # called here, without fused kernels
        merge_lora(model)
        return
    assert check_adapters(model).keys() == {"backbone.layers.0.mixer.dt_proj"}
    before = snapshot(model)
    for merge in (merge_lora, unload_lora):
        with pytest.raises(RuntimeError, match=r"dt_proj, MambaMixer reads .* merge=False"):
            merge(model)
        assert_unchanged(model, before)
    unload_lora(model, merge=False)


def blocks() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model_compiles_once_and_marks_its_layers(checkpointed):
    model, counter = blocks(), CompileCounter()
    apply_lora(model)
    torch._dynamo.reset()
    call = model
    if checkpointed:  # no side effect may be in the graph of a checkpoint

        def call(x):
            return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for _ in range(3):
        assert caught(run, compiled)[1] == []
    assert counter.frame_count == 1
    assert all(layer.has_run for layer in lora_layers(model).values())


def test_blocks_that_share_compiled_code_raise_no_alarm(tmp_path):
    model, counter = blocks(), CompileCounter()
    apply_lora(model)
    torch._dynamo.reset()
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        assert caught(run, model)[1] == []
    assert counter.frame_count == 1
    model.zero_grad()
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []


@swept
def test_compiled_blocks_that_also_read_weights_are_merged(tmp_path):
    """Each block's adapters got gradients, although the compiler traced one block for all."""
    model, ids = mamba(num_hidden_layers=2, use_cache=False), torch.arange(5)[None]
    apply_lora(model, target_modules=["in_proj", "x_proj"])
    torch._dynamo.reset()
    for block in model.backbone.layers:
        block.compile(backend="aot_eager")
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
    train_like(model)
    expected = model(ids).logits
    assert check_adapters(model) == {}
    unload_lora(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_and_traced_models_have_no_side_effect(strict):
    model, x = blocks(), torch.randn(4, 8)
    apply_lora(model)
    train_like(model)
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        program = torch.export.export(model, (x,), strict=strict)
    assert not [w for w in log if "side effect" in str(w.message)]
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


def test_a_gradient_counts_as_a_run():
    """A replica of ``nn.DataParallel`` marks a copy of the layer; its gradient arrives."""
    model = blocks()
    apply_lora(model)
    y = model(torch.randn(4, 8))
    layers = list(lora_layers(model).values())
    for layer in layers[1:]:
        layer.has_run = False
    assert len(check_adapters(model)) == len(layers) - 1
    y.sum().backward()
    assert check_adapters(model) == {}
    model.zero_grad()
    assert check_adapters(model) == {}


def test_a_gradient_from_before_is_no_run(tmp_path):
    model = blocks()
    run(model)
    apply_lora(model)
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []


@pytest.mark.parametrize("case", ["frozen below", "stop gradient", "reentrant"])
def test_compiled_blocks_without_gradients_raise_no_alarm(case, tmp_path):
    model, x = blocks(), torch.randn(4, 8, requires_grad=True)
    apply_lora(model)
    torch._dynamo.reset()
    for block in model:
        block.compile(backend="eager")
    if case == "frozen below":
        for parameter in model[:2].parameters():
            parameter.requires_grad_(False)

    def step():
        h = x
        for index, block in enumerate(model):
            if case == "reentrant":
                h = checkpoint(block, h, use_reentrant=True)
            elif case == "stop gradient" and index < 2:
                h = block(h).detach()
            else:
                h = block(h)
        h.sum().backward()

    assert caught(step)[1] == []
    assert check_adapters(model) == {}
    assert caught(save_adapter, model, tmp_path)[1] == []


def test_compiled_autograd_passes_the_hooks():
    """Dynamo cannot remove a hook in a graph without breaks."""
    model = blocks()
    apply_lora(model)
    torch._dynamo.reset()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        model(torch.randn(4, 8)).sum().backward()
    assert_only_lora_gradients(model)
    run(model)
    assert not any(p._post_accumulate_grad_hooks for p in lora_parameters(model))


def test_copies_and_pickles_are_silent_and_plain_layers_forget():
    model = blocks()
    apply_lora(model)
    copied, log = caught(lambda: (copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
    assert log == []
    for other in copied:
        run(other)
        assert check_adapters(other) == {}
    plain = unload_lora(model)
    assert {"has_run", "_adapted"}.isdisjoint(vars(plain[0][0]).keys() | vars(plain[0]).keys())


def test_a_scripted_part_is_no_obstacle():
    class Relu(nn.Module):
        def forward(self, x):
            return x.relu()

    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(Relu()), nn.Linear(8, 8))
    apply_lora(model)
    model[0](torch.randn(2, 8))
    assert check_adapters(model).keys() == {"2"}
    run(model)
    assert check_adapters(model) == {}
