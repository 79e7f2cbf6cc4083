"""A model's adapted layers, their parameters, and what trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from ..distributed.sharding import check_original_parameters
from ..layers.base import LoRALayer
from ..layers.embedding import LoRAEmbedding
from ..ops.validation import listed


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of ``model``, by their first name in ``named_modules()``.

    Raises:
        ValueError: there are none, or FSDP1 wraps them with ``use_orig_params=False``.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}
    for name, layer in layers.items():
        check_original_parameters(name, layer)
    if not layers:
        raise ValueError(
            f"expected a model with adapters, got a {type(model).__name__} without: apply_lora or"
            " load_adapter adds them"
        )
    return layers


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The Parameters of the active adapters: ``lora_A``, ``lora_B``, DoRA's magnitudes."""
    for layer in lora_layers(model).values():
        yield from layer.adapter_parameters().values()


def lora_param_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Iterable[str] = (),
) -> list[dict]:
    """Optimizer parameter groups that cover every trainable parameter of ``model`` once.

    LoRA+ (Hayou et al., 2024): the learning rate of ``lora_B`` is ``lr·lr_ratio``. Everything else
    that trains has ``lr``, and so have embeddings' adapters, where ``lora_A`` starts at zero
    instead of ``lora_B``.

    Args:
        lr, lr_ratio, weight_decay: numbers of at least 0.
        no_decay: parameters without weight decay, by the last part of their names, such as
            "lora_B", "lora_magnitude_vector" or "bias".

    Raises:
        TypeError: ``no_decay`` is a single str.
        ValueError: the model has no adapters, or a number is negative.
    """
    if isinstance(no_decay, str):
        raise TypeError(f"expected no_decay to be a list of names, got the str {no_decay!r}")
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"expected {name} >= 0, got {value}")
    fast = {
        id(layer.lora_B)
        for layer in lora_layers(model).values()
        if not isinstance(layer, LoRAEmbedding)
    }
    no_decay = set(no_decay)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * lr_ratio if id(parameter) in fast else lr
        decay = 0.0 if name.rpartition(".")[2] in no_decay else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


@dataclass(frozen=True)
class ParameterSummary:
    """Parameter counts; prints as one line.

    Attributes:
        trainable: parameters that require grad.
        adapters: parameters of the active adapters.
        total: all parameters, active adapters included.
    """

    trainable: int
    adapters: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %);"
            f" {self.adapters:,} are adapters"
        )


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Count the parameters of ``model``, shared ones once.

    Raises:
        ValueError: the model has no adapters.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterSummary(
        sum(size for size, trains in sizes if trains),
        sum(p.numel() for p in lora_parameters(model)),
        sum(size for size, _ in sizes),
    )


def assert_only_lora_gradients(model: nn.Module) -> None:
    """Check, after a backward pass, that the active adapters have gradients and nothing else has.

    Raises:
        RuntimeError: lists adapter parameters without a gradient, and other parameters that have
            one or require grad.
        ValueError: the model has no adapters.
    """
    adapters = {id(parameter) for parameter in lora_parameters(model)}
    strays, missing = [], []
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            if parameter.requires_grad or parameter.grad is not None:
                strays.append(name)
        elif parameter.grad is None:
            missing.append(name)
    parts = []
    if strays:
        parts.append(f"expected gradients in adapters only, got one at {listed(strays)}")
    if missing:
        parts.append(f"expected a gradient in every adapter, got none at {listed(missing)}")
    if parts:
        raise RuntimeError("; ".join(parts))
