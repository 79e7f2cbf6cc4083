"""The patch on PEFT models that route, gate or place adapters, and in third-party trainers."""

from __future__ import annotations

import copy

import pytest
import torch
from models import llama, tokens
from torch import nn

from fused_lora import patch_peft
from support import watch_patch

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.fixture
def calls(monkeypatch):
    return watch_patch(monkeypatch.setattr)


def noisy(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.2)
    return model


def adapter_files(base: nn.Module, directory, count: int) -> list[str]:
    paths = []
    for index in range(count):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        model = noisy(peft.get_peft_model(copy.deepcopy(base), config))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.mul_(index + 1)
        paths.append(str(directory / str(index)))
        model.save_pretrained(paths[-1])
    return paths


def outcome(model: nn.Module, **inputs) -> dict:
    """Logits and every gradient."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    return {"logits": logits.detach()} | grads


def assert_unchanged(model: nn.Module, **inputs):
    """PEFT's own forward runs, so logits and gradients are bit-identical."""
    expected = outcome(model, **inputs)
    report = patch_peft(model)
    got = outcome(model, **inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    return report


def test_alora(calls):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", alora_invocation_tokens=[5, 6]
    )
    model = noisy(peft.get_peft_model(llama(), config))
    ids = tokens(2, 9)
    ids[0, 3:5] = torch.tensor([5, 6])
    ids[1, 5:7] = torch.tensor([5, 6])
    report = assert_unchanged(model, input_ids=ids)
    assert set(report.layers.values()) == {"the variant ALora"}
    assert not calls


def test_arrow(tmp_path, calls):
    from peft import ArrowConfig, create_arrow_model

    base = llama()
    paths = adapter_files(base, tmp_path, 3)
    model = create_arrow_model(base, paths, ArrowConfig(top_k=2)).eval()
    ids = tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        report = patch_peft(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert None not in report.layers.values()
    assert not calls


def test_xlora(tmp_path, calls):
    base = llama()
    paths = adapter_files(base, tmp_path, 2)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=1,
        adapters={str(i): path for i, path in enumerate(paths)},
    )
    base.config.use_cache = False
    model = peft.get_peft_model(base, config).eval()
    report = assert_unchanged(model, input_ids=tokens())
    assert set(report.layers.values()) == {"a forward replaced on the instance"}
    assert not calls


def test_zero_3(calls):
    """DeepSpeed marks a partitioned parameter with ``ds_id``; a hook on the module gathers it."""
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = noisy(peft.get_peft_model(llama(), config))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.ds_id = 1
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    layer.base_layer.weight.ds_id = 2
    report = patch_peft(model)
    prefix = "base_model.model.model.layers.0.self_attn."
    assert report.layers[prefix + "q_proj"] == "lora_A: partitioned by DeepSpeed's ZeRO-3"
    assert report.beside == {prefix + "k_proj": "base_layer: partitioned by DeepSpeed's ZeRO-3"}
    outcome(model, input_ids=tokens())
    assert calls.count("_added") == 1
    assert calls.count("_fused") == len(report.layers) - 2


@pytest.mark.parametrize("kind", ["gptq", "awq", "aqlm", "te", "tp_layer"])
def test_peft_classes_with_their_own_forward_keep_it(kind):
    import importlib

    module = importlib.import_module(f"peft.tuners.lora.{kind}")
    classes = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and "forward" in vars(cls)
        and cls.__module__ == module.__name__
    ]
    assert classes
    before = [cls.forward for cls in classes]
    patch_peft()
    assert [cls.forward for cls in classes] == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_transformers(reentrant, calls):
    """The recomputed forward has the same mask, so gradients equal those without checkpointing."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
    model = noisy(peft.get_peft_model(llama(), config)).train()
    model.enable_input_require_grads()
    patch_peft(model)
    ids = tokens()
    expected = outcome(model, input_ids=ids)
    once = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = outcome(model, input_ids=ids)
    assert len(calls) == 3 * once  # one more forward, recomputed in backward
    torch.testing.assert_close(got, expected)


def test_sft_by_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = small_tokenizer()
    data = datasets.Dataset.from_list(
        [{"text": "the quick brown fox"}, {"text": "jumps over the lazy dog"}] * 4
    )
    curves = {}
    for patched in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
        if patched:
            assert set(patch_peft(model).layers.values()) == {None}
        arguments = trl.SFTConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
            learning_rate=1e-2, max_length=16,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        curves[patched] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(curves[True]) == 4
    assert curves[True] == pytest.approx(curves[False], abs=1e-4)
    assert curves[True][-1] < curves[True][0]


def small_tokenizer():
    """A tokenizer for this file's words, built here to avoid a download."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
