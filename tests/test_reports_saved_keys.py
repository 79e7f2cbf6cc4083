"""Reports of users about adapter files whose keys or settings are read for others.

Every test names its source. Right is what PEFT, or the model before saving, computes.
"""

import copy
import json
import math

import peft
import pytest
import torch
from models import llama, tokens, train_like
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import apply_lora, load_adapter, lora_layers, save_adapter
from fused_lora.peft.files import layer_config

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PATTERNS = {
    "none": {"target_modules": ["q_proj"]},
    "whole name": {"target_modules": r"model\.layers\.\d\.self_attn\.q_proj"},
    "rank": {"target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.1.*q_proj": 3}},
    "alpha": {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
    "head": {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 2}},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No look-ups on the Hub, which PEFT makes for local directories too."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def compile_inside(model: nn.Module, ending: str) -> None:
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if f"{name}.{child_name}".endswith(ending):
                setattr(module, child_name, torch.compile(child, backend="eager"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", PATTERNS)
def test_layers_that_were_compiled_after_peft_adapted_them(case, tmp_path):
    """peft#2957, MakazhanAlpamys/Soup#335: the keys have ``_orig_mod``, the patterns do not."""
    base, ids = llama(), tokens()
    config = peft.LoraConfig(r=4, init_lora_weights=False, **PATTERNS[case])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    if case == "saved whole":
        with torch.no_grad():
            theirs.base_model.model.lm_head.modules_to_save.default.weight.add_(1)
    right = theirs(ids).logits
    compile_inside(theirs, "q_proj")
    compile_inside(theirs, "lm_head")
    theirs.save_pretrained(tmp_path)
    assert any("_orig_mod.lora_A" in key for key in load_file(tmp_path / WEIGHTS))
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(ids).logits, right, rtol=1e-6, atol=1e-6)


def test_layers_that_were_compiled_before_peft_adapted_them(tmp_path):
    """peft#2957: then PEFT's targets and patterns have ``_orig_mod`` too."""
    base, ids = llama(), tokens()
    compiled = copy.deepcopy(base)
    compile_inside(compiled, "q_proj")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj._orig_mod"],
        alpha_pattern={r".*layers\.1.*q_proj\._orig_mod": 3},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(compiled, config).eval()
    theirs.save_pretrained(tmp_path)
    for layer in theirs.base_model.model.model.layers:  # its compiled forward has no adapter
        layer.self_attn.q_proj = layer.self_attn.q_proj._orig_mod
    right = theirs(ids).logits
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(ids).logits, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", [r"^module\.body", r"^body", "body"])
def test_a_pattern_matches_a_name_with_some_of_its_wrappers(pattern, tmp_path):
    """peft#2957, apex#647: "module." of a wrapper from before PEFT, ``_orig_mod`` from after."""
    config = {"target_modules": ["body"], "r": 4, "rank_pattern": {pattern: 2}}
    assert layer_config(tmp_path, config, "body", "module.body._orig_mod").rank == 2


def test_a_file_with_a_layers_key_twice_is_refused(tmp_path):
    """peft#3433: keys of ``modules_to_save`` that collide; which value counts would be chance."""
    model = llama()
    apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.lm_head.weight"
    tensors[key.replace("lm_head", "lm_head._orig_mod")] = tensors[key] + 1
    metadata = {"format": "pt"}
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(ValueError, match="expected one weight for lm_head, got two: "):
        load_adapter(llama(), tmp_path)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)


class Nested(nn.Module):
    """A model that has a child "module", and another head of the same name."""

    def __init__(self, first: bool):
        super().__init__()
        if first:
            self.module = Inner()
        self.head, self.body = nn.Linear(4, 4), nn.Linear(4, 4)
        if not first:
            self.module = Inner()

    def forward(self, x):
        x = self.head(self.body(x))
        return self.module.head(self.module.body(x))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("library", ["ours", "peft"])
def test_a_child_called_module_is_no_wrapper(library, first, tmp_path):
    """peft#3433: a name in ``modules_to_save`` is read for another; apex#647: "module."."""
    base, x = Nested(first), torch.randn(3, 4)
    if library == "ours":
        model = copy.deepcopy(base)
        apply_lora(model, target_modules=["body"], modules_to_save=["head"])
        train_like(model)
        with torch.no_grad():
            for i, head in enumerate((model.head, model.module.head)):
                head.weight.add_(i + 1)
        right = model(x)
        save_adapter(model, tmp_path)
    else:
        config = peft.LoraConfig(
            target_modules=["body"], modules_to_save=["head"], init_lora_weights=False
        )
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    parameter.add_(i)
        right = model(x)
        model.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), right)


EMPTY = ["arrow_config", "kasa_config", "monteclora_config", "use_bdlora"]
UNSET = {"layer_replication": [], "target_parameters": [], "lora_bias": False, "use_qalora": False}
UNSET |= {"loftq_config": {}, "trainable_token_indices": {}, "kasa_config": None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [*EMPTY, *UNSET])
def test_an_empty_setting_is_what_peft_takes_it_for(key, tmp_path):
    """peft#3446: KaSA is on where ``kasa_config`` is not None, and changes the base weights."""
    base, ids = llama(), tokens()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    right, saved = theirs(ids).logits, json.loads((tmp_path / CONFIG).read_text())
    for value in ([{}] if key in EMPTY else []) + ([UNSET[key]] if key in UNSET else []):
        (tmp_path / CONFIG).write_text(json.dumps(saved | {key: value}))
        if value == {} and key in EMPTY:
            with pytest.raises(ValueError, match=f"{key} = {{}} is not supported"):
                load_adapter(copy.deepcopy(base), tmp_path)
            if key == "kasa_config" and key in saved:
                other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
                assert (other(ids).logits - right).abs().max() > 1e-4
        else:
            ours = copy.deepcopy(base)
            load_adapter(ours, tmp_path)
            torch.testing.assert_close(ours(ids).logits, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_assigned_scale_survives_a_file_bit_for_bit(use_rslora, tmp_path):
    """diffusers#6087: a file with another ``lora_alpha`` than the model trained with."""
    generator = torch.Generator().manual_seed(0)
    numbers = [0.1, 0.3, 1 / 3, *torch.rand(5, generator=generator).double().tolist()]
    lost = 0
    for rank in (3, 7):
        for scaling in numbers:
            model = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64))
            apply_lora(model, rank=rank, use_rslora=use_rslora)
            model[0].scaling = scaling
            save_adapter(model, tmp_path)
            loaded = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64))
            load_adapter(loaded, tmp_path)
            (layer,) = lora_layers(loaded).values()
            if layer.scaling != scaling:  # no float64 has that quotient
                divisor = math.sqrt(rank) if use_rslora else rank
                alpha = scaling * divisor
                near = [math.nextafter(alpha, end) for end in (-math.inf, math.inf)]
                assert all(number / divisor != scaling for number in (alpha, *near))
                lost += 1
    assert lost < len(numbers)
