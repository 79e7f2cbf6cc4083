"""A model's adapted layers, their parameters, and what trains."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

from torch import Tensor, nn

from ..distributed.sharding import check_original_parameters
from ..layers.base import LoRALayer
from ..layers.embedding import LoRAEmbedding
from ..layers.offload import has_offloaded_adapter
from ..ops.validation import listed
from .arguments import check_model, check_without_peft, described
from .record import Gone, gone_layers
from .trained_modules import trained_parameters
from .warn import warn

_CURE = "resize, quantise or convert before apply_lora, or call unload_lora first"
_ADAPTERS = "their adapters are not trained, merged or saved"
_COPIES = "their trained copies are gone and not saved"
OFFLOADED = "offloaded by accelerate and gets no gradient: to train, offload before apply_lora"


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of ``model``, by their first name in ``named_modules()``.

    Warns if layers that were adapted, or modules in ``modules_to_save``, have since been replaced
    or removed.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there are none, PEFT's are there instead, or FSDP1 wraps them with
            ``use_orig_params=False``.
    """
    check_model(model)
    modules = list(model.named_modules())
    layers = _adapted(model, modules)
    if gone := gone_layers(modules):
        parts = []
        if lost := _described(gone, whole=False):
            parts.append(f"adapted layers were {lost}; {_ADAPTERS}")
        if lost := _described(gone, whole=True):
            parts.append(f"modules in modules_to_save were {lost}; {_COPIES}")
        warn(f"{'; '.join(parts)}: {_CURE}")
    return layers


def _described(gone: dict[str, Gone], whole: bool) -> str:
    names: dict[str, list[str]] = {}
    for name, state in gone.items():
        if state.whole == whole:
            names.setdefault(state.now, []).append(name)
    return "; ".join(f"{now} at {listed(places)}" for now, places in names.items())


def check_kept(model: nn.Module) -> None:
    """Check that every module in ``modules_to_save`` is still in the model.

    Raises:
        RuntimeError: one was replaced or removed, so that its values cannot be switched.
    """
    if lost := _described(gone_layers(model.named_modules()), whole=True):
        raise RuntimeError(
            f"expected the modules in modules_to_save, got one {lost}, whose trained and original"
            f" values are gone: {_CURE}"
        )


def adapted_layers(model: nn.Module, missing_ok: bool = False) -> dict[str, LoRALayer]:
    """As :func:`lora_layers`, without its warning.

    Args:
        missing_ok: whether there may be none.
    """
    check_model(model)
    return _adapted(model, list(model.named_modules()), missing_ok)


def _adapted(
    model: nn.Module, modules: list[tuple[str, nn.Module]], missing_ok: bool = False
) -> dict[str, LoRALayer]:
    layers = {name: module for name, module in modules if isinstance(module, LoRALayer)}
    for name, layer in layers.items():
        check_original_parameters(name, layer)
    if not layers and not missing_ok and (lost := _described(gone_layers(modules), whole=False)):
        raise ValueError(
            f"expected a model with adapters, got a {type(model).__name__} whose adapted"
            f" layers were all {lost}; {_ADAPTERS}: {_CURE}"
        )
    if not layers and not missing_ok:
        check_without_peft(model)
        raise ValueError(
            f"expected a model with adapters, got a {type(model).__name__} without: apply_lora or"
            " load_adapter adds them"
        )
    return layers


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The Parameters of the active adapters: ``lora_A``, ``lora_B``, DoRA's magnitudes."""
    yield from _parameters(_trainable(model))


def _parameters(layers: Mapping[str, LoRALayer]) -> Iterator[nn.Parameter]:
    for layer in layers.values():
        yield from layer.adapter_parameters().values()


def _trainable(model: nn.Module) -> dict[str, LoRALayer]:
    """As :func:`lora_layers`; also warns of adapters that an optimizer cannot train."""
    layers = lora_layers(model)
    if offloaded := [name for name, layer in layers.items() if has_offloaded_adapter(layer)]:
        warn(f"{listed(offloaded)}: the adapter is {OFFLOADED}")
    return layers


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
            "lora_B", "lora_magnitude_vector" or "bias". A warning names those that match none.

    Raises:
        TypeError: ``no_decay`` is not a list of names, or another argument is not a number.
        ValueError: the model has no adapters, or a number is negative.
    """
    if isinstance(no_decay, str):
        raise TypeError(f"expected no_decay to be a list of names, got the str {no_decay!r}")
    if not isinstance(no_decay, Iterable) or isinstance(no_decay, nn.Module):
        raise TypeError(f"expected no_decay to be a list of names, got {described(no_decay)}")
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("weight_decay", weight_decay)):
        # A Tensor is allowed: capturable optimizers have such learning rates.
        number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
        if not number or isinstance(value, bool):
            raise TypeError(f"expected {name} to be a number, got {described(value)}")
        if not value >= 0:
            raise ValueError(f"expected {name} >= 0, got {value}")
    fast = {
        id(layer.lora_B)
        for layer in _trainable(model).values()
        if not isinstance(layer, LoRAEmbedding)
    }
    no_decay = set(no_decay)
    if not all(isinstance(name, str) for name in no_decay):
        raise TypeError(f"expected no_decay to be a list of names, got {sorted(no_decay, key=str)}")
    _warn_of_unmatched(model, no_decay)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * lr_ratio if id(parameter) in fast else lr
        decay = 0.0 if name.rpartition(".")[2] in no_decay else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _warn_of_unmatched(model: nn.Module, no_decay: set[str]) -> None:
    """Warn of names in ``no_decay`` that no trainable parameter has."""
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    if idle := sorted(no_decay - names):
        near = difflib.get_close_matches(idle[0], sorted(names)) or sorted(names)
        warn(
            f"no_decay has {', '.join(map(repr, idle))}, which names no parameter that"
            f" trains; such names are {listed(near)}",
        )


@dataclass(frozen=True)
class ParameterSummary:
    """Parameter counts; prints as one line.

    Attributes:
        trainable: parameters that require grad.
        adapters: parameters of the active adapters.
        total: all parameters, active adapters included.
        modules_to_save: parameters of modules that train whole.
    """

    trainable: int
    adapters: int
    total: int
    modules_to_save: int = 0

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        whole = f", {self.modules_to_save:,} in modules_to_save" if self.modules_to_save else ""
        return (
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %);"
            f" {self.adapters:,} are adapters{whole}"
        )


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Count the parameters of ``model``, shared ones once.

    Raises:
        ValueError: the model has no adapters.
    """
    adapters = sum(p.numel() for p in _parameters(lora_layers(model)))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterSummary(
        sum(size for size, trains in sizes if trains),
        adapters,
        sum(size for size, _ in sizes),
        sum({id(p): p.numel() for p in trained_parameters(model)}.values()),
    )


def unsaved_parameters(model: nn.Module) -> list[str]:
    """The names of Parameters that train but that :func:`fused_lora.save_adapter` does not save.

    They are neither an adapter's nor in ``modules_to_save``: a head unfrozen by hand, a bias.

    Raises:
        ValueError: the model has no adapters.
    """
    saved = {id(parameter) for parameter in trained_parameters(model)}
    for layer in adapted_layers(model).values():
        saved |= {id(parameter) for parameter in layer.adapter_parameters().values()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in saved]


def assert_only_lora_gradients(model: nn.Module) -> None:
    """Check, after a backward pass, that the active adapters have gradients and nothing else has.

    Modules in ``modules_to_save`` count as part of the active adapters.

    Raises:
        RuntimeError: lists adapter parameters without a gradient, and other parameters that have
            one or require grad.
        TypeError: ``model`` is not a module.
        ValueError: the model has no adapters.
    """
    check_model(model)
    whole = {id(parameter) for parameter in trained_parameters(model)}
    adapters = {*whole, *map(id, _parameters(lora_layers(model)))}
    strays, missing = [], []
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            if parameter.requires_grad or parameter.grad is not None:
                strays.append(name)
        elif parameter.grad is None:
            missing.append(name)
    parts = []
    also = " and modules_to_save" if whole else ""
    if strays:
        parts.append(f"expected gradients in adapters{also} only, got one at {listed(strays)}")
    if missing:
        parts.append(f"expected a gradient in every adapter{also}, got none at {listed(missing)}")
    if parts:
        raise RuntimeError("; ".join(parts))
