"""Adapters on Parameters in PEFT's files: both ways, of older versions, and damaged."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import tokens
from torch import nn

from fused_lora import (
    adapter_names,
    apply_lora,
    load_adapter,
    lora_layers,
    save_adapter,
    set_adapter,
)
from support import by_default, relative_rms

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")
from expert_nets import (  # noqa: E402
    BOTH,
    FAMILIES,
    FP32,
    FP64,
    E,
    Holder,
    adapted,
    causal,
    experts_of,
    routed,
)

pytestmark = pytest.mark.filterwarnings('ignore:fused_lora. "all-linear" has no adapter for')
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def router_of(family: str) -> str:
    return "router.weight" if family in ("GraniteMoe", "GptOss") else "gate.weight"


def logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    return model.eval()(tokens(2, 9)).logits.detach()


def change(folder: Path, tensors=None, **config) -> Path:
    """A copy of an adapter with other settings, and tensors from a function of the saved ones."""
    new = folder.with_name(f"{folder.name}-changed")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder, new)
    settings = json.loads((new / CONFIG).read_text()) | config
    (new / CONFIG).write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
    if tensors is not None:
        found = safetensors.torch.load_file(new / WEIGHTS)
        made = {key: tensor.clone() for key, tensor in tensors(found).items()}
        safetensors.torch.save_file(made, new / WEIGHTS)
    return new


def assert_same_tensors(a: Path, b: Path) -> None:
    a, b = (safetensors.torch.load_file(folder / WEIGHTS) for folder in (a, b))
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor, b[key]), key


TARGETS = [BOTH, BOTH[:1], BOTH[1:], [*BOTH, "router"]]
DRAWN = [(family, targets) for family in FAMILIES for targets in TARGETS]
BY_DEFAULT = [("Qwen3Moe", TARGETS[0]), ("GptOss", TARGETS[3]), ("Mixtral", TARGETS[1])]


@pytest.mark.parametrize("case", by_default(BY_DEFAULT, DRAWN), ids=str)
def test_files_cross_bit_for_bit(case, tmp_path):
    family, targets = case
    targets = [router_of(family) if name == "router" else name for name in targets]
    base = causal(family)
    theirs = adapted(copy.deepcopy(base), targets=targets, target_modules=["o_proj"], cast=False)
    theirs.save_pretrained(tmp_path / "peft")
    model = copy.deepcopy(base)
    names = load_adapter(model, tmp_path / "peft", adapter_dtype=FP64)
    assert len(names) == len(targets) + 1
    expected = logits(theirs)
    assert relative_rms(logits(model), expected) <= 1e-12
    assert relative_rms(logits(base), expected) > 0.01
    save_adapter(model, tmp_path / "own")
    assert_same_tensors(tmp_path / "own", tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own")
    assert relative_rms(logits(again), expected) <= 1e-12


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "Mixtral"])
def test_peft_reads_what_all_linear_saved(family, tmp_path):
    """``gate_up_proj`` has another rank than the others."""
    base = causal(family)
    model = copy.deepcopy(base)
    apply_lora(model, rank=2, alpha=6, adapter_dtype=FP64)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * 0.3)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert list(config["rank_pattern"].values()) == [4]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_rms(logits(theirs), logits(model)) <= 1e-12
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path, adapter_dtype=FP64)
    assert torch.equal(logits(again), logits(model))
    assert [x.rank for x in lora_layers(again).values()] == [
        x.rank for x in lora_layers(model).values()
    ]


def holder(dtype=FP64, width=24) -> nn.Module:
    return Holder(experts_of(dtype=dtype))


def saved(folder: Path, targets=BOTH, **config) -> Path:
    """An adapter of PEFT for ``holder()``, in float64."""
    adapted(holder(), targets=targets, cast=False, **config).save_pretrained(folder)
    return folder


def test_dropout_is_restored_and_peft_reads_zero(tmp_path):
    model = holder()
    apply_lora(model, target_modules=[], target_parameters=BOTH, dropout=0.25)
    with pytest.warns(
        UserWarning, match="saved lora_dropout 0 in adapter_config.json, since PEFT refuses"
    ):
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0
    peft.PeftModel.from_pretrained(holder(), tmp_path)
    again = holder()
    load_adapter(again, tmp_path)
    assert [layer.dropout for layer in lora_layers(again).values()] == [0.25, 0.25]
    data = (tmp_path / WEIGHTS).read_bytes()
    for text in (b"0.95", b"nan "[:4], b"+1.5", b"abcd"):
        wrong = change(tmp_path)
        (wrong / WEIGHTS).write_bytes(data.replace(b'"0.25"', b'"' + text + b'"'))
        if text == b"0.95":
            load_adapter(holder(), wrong)
            continue
        with pytest.raises(ValueError, match=r"fused_lora_dropout in \[0, 1\)"):
            load_adapter(holder(), wrong)


def exchanged(tensors: dict) -> dict:
    """The tensors that PEFT before 0.19.1 would have saved for the same updates."""
    found = {}
    for key, A in tensors.items():
        if "lora_A" not in key:
            continue
        B = tensors[key.replace("lora_A", "lora_B")]
        rank = len(A) // E
        A_e = [A[e * rank : (e + 1) * rank] for e in range(E)]  # (rank, in)
        B_e = [B[:, e::E] for e in range(E)]  # (out, rank)
        found[key] = torch.cat([b.T for b in B_e])
        last = torch.stack([a.T for a in A_e], dim=2).flatten(1)  # (in, rank·E)
        found[key.replace("lora_A", "lora_B")] = last.contiguous()
    return found


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2", ...])
def test_roles_of_before_0_19_1_are_seen_in_the_shapes(version, tmp_path):
    """Whatever the version says: 48 x 32 and 32 x 24 are not square."""
    folder = saved(tmp_path / "new")
    model, other = holder(), holder()
    load_adapter(model, folder, adapter_dtype=FP64)
    load_adapter(other, change(folder, exchanged, peft_version=version), adapter_dtype=FP64)
    assert torch.equal(other(*routed()), model(*routed()))


def square() -> nn.Module:
    experts = experts_of()
    experts.gate_up_proj = nn.Parameter(torch.randn(E, 64, 32, dtype=FP64) * 0.3)
    experts.down_proj = nn.Parameter(torch.randn(E, 32, 32, dtype=FP64) * 0.3)
    torch.manual_seed(0)
    return Holder(experts)


def test_roles_of_square_experts_are_told_by_the_version_or_refused(tmp_path):
    torch.manual_seed(5)
    base = square()
    adapted(copy.deepcopy(base), targets=BOTH[1:], cast=False).save_pretrained(tmp_path / "new")
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    load_adapter(model, tmp_path / "new", adapter_dtype=FP64)
    expected = model(*routed())
    old = change(tmp_path / "new", exchanged, peft_version="0.19.0")
    load_adapter(other, old, adapter_dtype=FP64)
    assert torch.equal(other(*routed()), expected)
    wrong = copy.deepcopy(base)
    load_adapter(wrong, change(tmp_path / "new", exchanged, peft_version="0.19.1"))
    assert relative_rms(wrong(*routed()), expected) > 0.01
    for version in (..., "soon", None):
        new = copy.deepcopy(base)
        with pytest.raises(ValueError, match="expected peft_version, got none: PEFT before"):
            load_adapter(new, change(tmp_path / "new", peft_version=version))
        assert not lora_layers_of(new)
    save_adapter(other, tmp_path / "own")  # names no version; the digest tells
    load_adapter(copy.deepcopy(base), tmp_path / "own")


def lora_layers_of(model: nn.Module) -> list:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


NAMES = {"Qwen3Moe": ("gate_proj", "up_proj", "down_proj"), "Mixtral": ("w1", "w3", "w2")}


def separate(folder: Path, family: str, leave_out=(), rslora=False, router=True) -> dict:
    """An adapter as transformers 4 and PEFT saved it; returns each update ``s·B A``, by its key."""
    names = [name for name in NAMES[family] if name not in leave_out]
    mlp = "block_sparse_moe" if family == "Mixtral" else "mlp"
    start = f"base_model.model.model.layers.0.{mlp}"
    inner, rank = 24, 3
    torch.manual_seed(8)
    tensors, updates = {}, {}
    places = [(f"{start}.experts.{e}.{name}", name) for e in range(E) for name in names]
    for place, name in [*places, (f"{start}.gate", "gate")] if router else places:
        N, K = (32, inner) if name in ("down_proj", "w2") else (inner, 32)
        N = E if name == "gate" else N
        A, B = torch.randn(rank, K, dtype=FP64) * 0.3, torch.randn(N, rank, dtype=FP64) * 0.3
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = A, B
        updates[place] = 6 / (rank**0.5 if rslora else rank) * B @ A
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "use_rslora": rslora}
    config |= {"target_modules": [*names, "gate"], "lora_dropout": 0.1, "peft_version": "0.15.0"}
    (folder / CONFIG).write_text(json.dumps(config))
    return updates


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("leave_out", [(), (0,), (1,), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_experts_that_were_linear_layers(family, leave_out, rslora, tmp_path):
    leave_out = [NAMES[family][i] for i in leave_out]
    updates = separate(tmp_path / "old", family, leave_out, rslora)
    model = causal(family)
    folded = copy.deepcopy(model)
    mlp = folded.model.layers[0].mlp
    with torch.no_grad():
        for place, delta in updates.items():
            *_, number, name = place.split(".")
            if name == "gate":
                mlp.gate.weight += delta
                continue
            i = NAMES[family].index(name)
            if i == 2:
                mlp.experts.down_proj[int(number)] += delta
            else:
                mlp.experts.gate_up_proj[int(number), 24 * i : 24 * (i + 1)] += delta
    load_adapter(model, tmp_path / "old", adapter_dtype=FP64)
    assert relative_rms(logits(model), logits(folded)) <= 1e-7  # the norms are in float32
    assert relative_rms(logits(causal(family)), logits(folded)) > 0.01
    assert {layer.dropout for layer in lora_layers(model).values()} == {0.1}
    again = causal(family)
    with pytest.warns(UserWarning, match="lora_dropout 0"):
        save_adapter(model, tmp_path / "own")
    load_adapter(again, tmp_path / "own", adapter_dtype=FP64)
    assert torch.equal(logits(again), logits(model))
    theirs = peft.PeftModel.from_pretrained(causal(family), tmp_path / "own")
    assert relative_rms(logits(theirs), logits(model)) <= 1e-7


def without(pattern: str):
    return lambda tensors: {k: v for k, v in tensors.items() if not re.search(pattern, k)}


def one(pattern: str, make):
    def apply(tensors):
        key = next(k for k in tensors if re.search(pattern, k))
        return tensors | {key: make(tensors[key]).contiguous()}

    return apply


OLD = [
    (without(r"experts\.2\.up"), {}, "adapter of up_proj for each of 4 experts, got none for 2"),
    (without(r"experts\.2\.up_proj\.lora_B"), {}, "expected lora_B beside"),
    (one(r"1\.up_proj\.lora_A", lambda t: t[:2]), {}, r"of shape \(3, 32\), got \(2, 32\)"),
    (one(r"1\.up_proj\.lora_B", lambda t: t[:5]), {}, r"of shape \(24, 3\), got \(5, 3\)"),
    (None, {"rank_pattern": {"experts.1.up_proj": 2}}, "one rank and scale of all experts"),
    (None, {"rank_pattern": {"up_proj": 2}}, r"of shape \(2, 32\)"),
    (None, {"alpha_pattern": {"up_proj": 2}}, "gate and up to have one rank and scale"),
    (None, {"target_modules": ["up_proj"]}, "expected adapters for adapter_config.json's target"),
    (
        lambda t: t | {k.replace("experts.1.", "experts.7."): v for k, v in t.items()},
        {},
        "expected 4 experts, got gate_proj of expert 7",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "message"), OLD, ids=[row[2] for row in OLD])
def test_damaged_files_of_linear_layers(tensors, config, message, tmp_path):
    separate(tmp_path / "old", "Qwen3Moe")
    model = causal("Qwen3Moe")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, change(tmp_path / "old", tensors, **config))
    assert not lora_layers_of(model)


DAMAGED = [
    (without(r"base_layer"), {}, "an adapter of each Parameter of target_parameters, got none for"),
    (one("lora_A", lambda t: t[:-1]), {}, "of shape"),
    (one(r"base_layer\.lora_B", lambda t: t[:, :-1]), {}, "of shape"),
    (one("lora_A", lambda t: t.long()), {}, "float dtype"),
    (None, {"target_parameters": "experts.down_proj"}, "target_parameters as a list of names"),
    (None, {"target_parameters": [1]}, "target_parameters as a list of names"),
    (None, {"target_parameters": ["experts.down_proj"]}, "expected a module experts.base_layer"),
    (None, {"target_parameters": []}, "target_modules|expected"),
    (None, {"r": 2}, "of shape"),
    (None, {"use_dora": True}, "DoRA|use_dora|lora_magnitude"),
]


@pytest.mark.parametrize(("tensors", "config", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files(tensors, config, message, tmp_path):
    model = holder()
    folder = change(saved(tmp_path / "new"), tensors, **config)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert not lora_layers_of(model)


def test_another_parameter_of_the_same_shape_is_refused(tmp_path):
    """The only layer of a module has the same key, whichever Parameter it is of."""
    base = square()
    base.experts.gate_up_proj = nn.Parameter(base.experts.gate_up_proj[:, :32].detach())
    base.experts.up_proj = base.experts.gate_up_proj
    model = square()
    apply_lora(model, target_modules=[], target_parameters=["down_proj"], rank=3)
    other = square()
    apply_lora(other, target_modules=[], target_parameters=["gate_up_proj"], rank=3)
    save_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"of experts\.down_proj, got one of gate_up_proj"):
        load_adapter(model, tmp_path)


def test_a_second_adapter_and_the_same_again(tmp_path):
    model = holder(FP32)
    load_adapter(model, saved(tmp_path / "a"))
    torch.manual_seed(99)
    both = change(tmp_path / "a", lambda t: {k: torch.randn_like(v) for k, v in t.items()})
    load_adapter(model, both, "b")
    assert adapter_names(model) == ["default", "b"]
    x, index, shares = (t.detach() for t in routed())
    inputs = x.float(), index, shares.float()
    first = model(*inputs)
    set_adapter(model, "b")
    second = model(*inputs)
    assert relative_rms(second, first) > 0.01
    load_adapter(model, tmp_path / "a", "b")
    assert torch.equal(model(*inputs), first)
    fresh = holder(FP32)
    load_adapter(fresh, both)
    assert torch.equal(fresh(*inputs), second)
