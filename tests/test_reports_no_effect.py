"""Reports of users about arguments without an effect, and about warnings that nobody sees.

Every test names its source.
"""

import sys
import textwrap
import warnings
from subprocess import run

import pytest
import torch
from models import assert_unchanged, snapshot, stack, train_like
from torch import nn

from fused_lora import (
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    disable_lora,
    lora_layers,
    lora_param_groups,
)

SAVE_TWICE = """
import sys
import tempfile
sys.path.insert(0, sys.argv[1])
from models import llama
from fused_lora import apply_lora, merge_lora
models = [llama(), llama()]
for model in models:
    apply_lora(model, rank=2)
    merge_lora(model)
first, second = models
first.save_pretrained(tempfile.mkdtemp())
second.save_pretrained(tempfile.mkdtemp())
"""


@pytest.mark.sweep
def test_the_warning_of_a_merged_state_is_the_callers(request):
    """peft#868, cpython#69403: Python's default filter shows a warning once per place."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", textwrap.dedent(SAVE_TWICE), str(request.path.parent)]
    done = run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("the state_dict() of a merged model") == 2


@pytest.mark.parametrize("library", ["transformers", "accelerate", "safetensors", "peft"])
def test_a_warning_from_within_a_library_is_its_callers(library):
    """cpython#69403: frames to skip; transformers' save_pretrained takes the state in its file."""
    from fused_lora import merge_lora

    model = stack()
    apply_lora(model, rank=2)
    merge_lora(model)
    scope = {"__name__": f"{library}.somewhere", "model": model}
    exec("def save():\n    return model.state_dict()", scope)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope["save"]()
    assert [w.filename for w in caught] == [__file__]


def test_a_warning_from_a_with_statement_is_its_lines():
    """cpython#69403: contextlib's own frame lies between."""
    model = stack()
    apply_lora(model, rank=2)
    model[0] = nn.Linear(8, 8)
    with (
        pytest.warns(UserWarning, match="adapted layers were replaced") as caught,
        disable_lora(model),
    ):
        pass
    assert [w.filename for w in caught] == [__file__]


def said(function, *arguments, **keywords) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **keywords)
    assert {w.filename for w in caught} <= {__file__}
    return [str(w.message) for w in caught]


def test_names_without_weight_decay_that_match_nothing():
    """DeepSpeedExamples#755: names of no_decay that a model's parameters do not have."""
    model = stack()
    apply_lora(model, rank=2)
    (text,) = said(lora_param_groups, model, 1e-3, no_decay=["loraB", "lora_A"])
    assert text.startswith("fused_lora: no_decay has 'loraB', which names no parameter that trains")
    assert "lora_B" in text
    (text,) = said(lora_param_groups, model, 1e-3, no_decay=["bias"])  # frozen here
    assert "'bias'" in text
    for right in ([], ["lora_A"], {"lora_A", "lora_B"}):
        assert not said(lora_param_groups, model, 1e-3, no_decay=right)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.requires_grad_(True)
    assert not said(lora_param_groups, model, 1e-3, no_decay=["bias"])


@pytest.mark.parametrize("alpha", [0, 0.0, 1e-60])
def test_an_alpha_of_zero(alpha):
    """invergent-ai/surogate#173: with a scale of 0 an adapter loads and does nothing."""
    model = stack()
    (text,) = said(apply_lora, model, rank=2, alpha=alpha)
    assert "alpha gives a scale of 0 at 0" in text
    (text,) = said(add_adapter, model, "b", alpha=alpha)
    assert "scale of 0" in text
    train_like(model)
    x = torch.randn(3, 8)
    model(x).sum().backward()
    layers = lora_layers(model)
    assert all(not layer.lora_B.grad.any() for layer in layers.values())
    name = next(iter(layers))
    (text,) = said(add_adapter, model, "c", alpha_pattern={f"^{name}": alpha})
    assert text.startswith(f"fused_lora: alpha gives a scale of 0 at {name}: ")
    assert not said(add_adapter, model, "d", alpha=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 10**30}, "expected rank <= 2147483647, got 1000"),
        ({"rank": 2**31}, "expected rank <= 2147483647, got 2147483648"),
        ({"alpha": 10**400}, "expected a finite alpha"),
        ({"rank_pattern": {"0": 10**30}}, "expected rank <="),
    ],
    ids=str,
)
def test_numbers_that_are_too_large(arguments, message):
    """peft#1206: the message says what was expected and given, not what failed inside torch."""
    model = stack()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **arguments)
    assert_unchanged(model, before)
    apply_lora(model)
    with pytest.raises(ValueError, match="expected a finite weight"):
        add_weighted_adapter(model, "b", {"default": 10**400})
    with pytest.raises(ValueError, match="expected a finite scaling"):
        next(iter(lora_layers(model).values())).scaling = 10**400
