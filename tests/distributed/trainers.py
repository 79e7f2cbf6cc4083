"""accelerate and transformers' Trainer, unmodified, have the losses of a hand-written loop."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from models import llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fused_lora import apply_lora, load_adapter, lora_parameters, save_adapter

ROWS = 8  # of a global batch
TEXTS = torch.arange(6 * ROWS * 12).view(-1, 12) % 89 + 1
RATE = 1e-2


def start() -> nn.Module:
    torch.manual_seed(0)
    model = llama(initializer_range=0.1)
    apply_lora(model, rank=2)
    return model


def losses_by_hand(model: nn.Module, passes: int = 1) -> list[float]:
    """AdamW on whole batches with clipped gradients, in one process."""
    parameters = list(lora_parameters(model))
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    losses = []
    for ids in TEXTS.split(ROWS) * passes:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1  # it learns
    return losses


def assert_saved(model: nn.Module, folder: str) -> None:
    """The adapter in ``folder`` gives a new model the logits of ``model``."""
    torch.manual_seed(0)
    loaded = llama(initializer_range=0.1)
    load_adapter(loaded, folder)
    ids = TEXTS[:2]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, copy.deepcopy(model).eval()(ids).logits)


def check_accelerate():
    """Two micro-batches per step, with clipped gradients."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = start()
    rows = ROWS // accelerator.num_processes // 2
    loader = torch.utils.data.DataLoader(TEXTS, batch_size=rows)
    optimizer = torch.optim.AdamW(list(lora_parameters(model)), RATE, weight_decay=0.0)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[Tensor] = []
    for ids in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    steps = torch.stack(losses).view(-1, 2).mean(1)
    torch.testing.assert_close(steps, torch.tensor(losses_by_hand(start())))
    if accelerator.is_main_process:
        save_adapter(wrapped, "accelerate")
    accelerator.wait_for_everyone()
    assert_saved(accelerator.unwrap_model(wrapped), "accelerate")
    accelerator.free_memory()


def trainer() -> Trainer:
    arguments = TrainingArguments(
        output_dir="trainer",
        use_cpu=True,
        num_train_epochs=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        report_to=[],
        disable_tqdm=True,
    )
    rows = ROWS // arguments.world_size
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = rows
    texts = [{"input_ids": ids, "labels": ids} for ids in TEXTS]
    return Trainer(start(), arguments, train_dataset=texts, eval_dataset=texts[:ROWS])


def logged(trainer: Trainer) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def check_trainer():
    """Train, load the best checkpoint, resume from the first one, and save."""
    whole = trainer()
    whole.train()
    expected = torch.tensor(losses_by_hand(start(), passes=2))
    torch.testing.assert_close(logged(whole), expected)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"trainer/checkpoint-{len(TEXTS) // ROWS}")
    assert torch.equal(logged(resumed), logged(whole))
    for one, two in zip(lora_parameters(whole.model), lora_parameters(resumed.model), strict=True):
        assert torch.equal(one, two)
    if whole.is_world_process_zero():
        save_adapter(whole.model_wrapped, "adapter")
    whole.accelerator.wait_for_everyone()
    assert_saved(whole.model, "adapter")
