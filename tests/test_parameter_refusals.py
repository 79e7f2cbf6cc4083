"""What adapters on Parameters refuse, name or leave alone: ``apply_lora(target_parameters=)``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_lora import (
    adapter_segments,
    add_adapter,
    apply_lora,
    merge_lora,
    unload_lora,
)
from support import relative_rms

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")
from expert_nets import FP32, causal, routed
from parameter_nets import Table, on_table, own

pytestmark = pytest.mark.filterwarnings('ignore:fused_lora. "all-linear" has no adapter for')


class Indexed(Table):
    def __len__(self):
        return 6


class Container(nn.Module):
    table = Table.forward

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(6, 6)])

    def forward(self, x):
        return x @ self.parts[0]


class Outer(nn.Module):
    """Reads the Parameter of a module that it does not call."""

    def __init__(self):
        super().__init__()
        self.inner = Table()

    def forward(self, x):
        return x @ self.inner.table


REFUSED = [
    (lambda: nn.Sequential(Indexed()), ["table"], TypeError, "a Indexed, whose __len__"),
    (Container, ["parts.0"], TypeError, "a ParameterList"),
    (lambda: nn.Sequential(Table(weight=1.0)), ["table"], TypeError, "with weight beside table"),
    (Outer, ["table"], ValueError, "Outer reads its weight without calling it"),
    (
        lambda: nn.MultiheadAttention(8, 2),
        ["in_proj_weight"],
        ValueError,
        "of a module within the mod",
    ),
    (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        ["in_proj_weight"],
        TypeError,
        "name the layer",
    ),
    (
        lambda: nn.Sequential(Table(inner=Table())),
        ["table"],
        ValueError,
        "contains an adapted Table",
    ),
]


@pytest.mark.parametrize(
    ("make", "names", "error", "message"), REFUSED, ids=[r[3] for r in REFUSED]
)
def test_modules_whose_adapter_would_not_act_are_refused(make, names, error, message):
    model = make()
    with pytest.raises(error, match=message):
        apply_lora(model, target_modules=[], target_parameters=names)
    assert not any("lora" in name for name, _ in model.named_parameters())


class Project(Table):
    def project(self, x):
        return x @ self.table.t()


def test_methods_that_read_the_parameter_are_named():
    with pytest.warns(UserWarning, match=r"0: project of a Project read table: called from outs"):
        on_table(nn.Sequential(Project()))


def test_what_is_assigned_reaches_the_module():
    model = on_table(nn.Sequential(Table()))
    x, before = torch.randn(2, 6), model(torch.zeros(2, 6))
    assert not before.any()
    model[0].shift = torch.ones(6)
    assert torch.equal(model(torch.zeros(2, 6)), torch.ones(2, 6))
    assert model[0].base_layer.shift.all()
    both = nn.Sequential(Table(other=nn.Parameter(torch.randn(4, 4)), gain=1.0))
    apply_lora(both, target_modules=[], target_parameters=["table", "other"])
    both[0].gain = 100.0
    assert both[0].holder.gain == 100.0
    assert both(x).shape == (2, 6)


def test_hooks_that_the_module_got_since_stay():
    model, seen = on_table(nn.Sequential(Table())), []
    model[0].base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    y = model(torch.randn(2, 6))
    assert len(seen) == 1
    plain = unload_lora(model)
    plain(torch.randn(2, 6))
    assert len(seen) == 2
    assert y.shape == (2, 6)


def test_a_state_that_is_assigned_is_not_merged_into():
    model = own()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    expected = model(*routed())
    merge_lora(model)
    model.load_state_dict(state, assign=True)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert relative_rms(model(*routed()), expected) <= 1e-12


def test_a_state_that_does_not_fit_leaves_a_final_merge_alone():
    model, key = own(), "experts.base_layer.base_layer.down_proj"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["experts.lora_A"] = state["experts.lora_A"][:-1]
    expected = model(*routed())
    merge_lora(model, keep_base=False)
    with pytest.raises(RuntimeError, match="only in part or in other shapes"):
        model.load_state_dict(state)
    assert model.experts.merged
    merged = model.get_parameter(key)
    assert not torch.equal(merged, state[key])
    first = model.experts.base_layer  # its own state fitted
    first.merge()
    assert relative_rms(model(*routed()), expected) <= 1e-12


def test_an_overflow_while_loading_is_told_with_the_name():
    model = own(dtype=torch.float16, adapter_dtype=FP32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model)
    state["experts.base_layer.lora_B"].fill_(6e4)
    with pytest.raises(RuntimeError, match=r"experts\.base_layer, now unmerged: expected a merged"):
        model.load_state_dict(state)
    assert [layer.merged for layer in model.experts.chain()] == [True, False]


def test_all_linear_names_experts_that_do_not_run_fused():
    model = causal("Qwen3Moe")
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="no adapter for the experts .* 49 % of the model's w"):
        names = apply_lora(model)
    assert not any("experts" in name for name in names)


def test_overlapping_and_shared_parameters_of_one_module_are_not_merged():
    model = nn.Sequential(Table())
    model[0].rows = nn.Parameter(model[0].table.detach()[:2])
    with pytest.raises(ValueError, match="used by 0 alone"):
        merge_lora(on_table(model))


def test_segments_of_many_adapters_are_refused():
    model = own()
    add_adapter(model, "b")
    with (
        pytest.raises(RuntimeError, match="can run in segments, got an adapter on a Parameter"),
        adapter_segments(model, ["default", "b"]),
    ):
        pass


def test_parametrized_and_checkpointed_parameters_are_refused():
    model = on_table(nn.Sequential(Table()))
    model[0].base_layer.gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="without activation checkpointing of its own"):
        model(torch.randn(2, 6))
    model.eval()(torch.randn(2, 6))
    nn.utils.parametrize.register_parametrization(model[0].base_layer, "table", nn.Identity())
    with pytest.raises(RuntimeError, match="a parametrization computes"):
        model(torch.randn(2, 6))


def test_compiled_routers_are_one_graph(nothing_compiled):
    model, x = on_table(nn.Sequential(Table())), torch.randn(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_rms(compiled(x), model(x)) < 1e-6
