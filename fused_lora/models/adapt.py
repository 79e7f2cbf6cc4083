"""Whole models: adapt, list what trains, check it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..distributed.sharding import check_replaceable
from ..layers.base import LoRALayer
from ..layers.config import AdapterConfig
from ..ops.validation import check_dtype, check_impl
from .targets import ALL_LINEAR, adapter_configs, find_targets, layer_class


def apply_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
    include_head: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
    impl: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> list[str]:
    """Give modules of ``model`` adapters, in place, and freeze everything else.

    ``nn.Linear`` becomes :class:`fused_lora.FusedLoRALinear`, transformers' ``Conv1D``
    :class:`FusedLoRAConv1D`, ``nn.Embedding`` :class:`LoRAEmbedding` and ``nn.Conv2d``
    :class:`LoRAConv2d`, around the same Parameters. A module that stands in several places gets one
    adapter; two modules that share a weight get one each, as in PEFT. On an error the model is as
    it was.

    Args:
        model: any ``nn.Module`` that contains what is to be adapted.
        rank, alpha, dropout, use_rslora, use_dora, init, impl, adapter_dtype: as for
            :class:`fused_lora.FusedLoRALinear`; convolutions and embeddings take the
            initialisations "default" and "gaussian", no DoRA, and embeddings no dropout.
        target_modules: "all-linear" (every Linear and Conv1D but the output embeddings of a
            transformers model), a list of names or of their endings from a dot on, or a regular
            expression that must match a name in full.
        exclude_modules: names to leave out, as a list or a regular expression.
        include_head: whether "all-linear" includes the output embeddings.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions that match the
            end of a name from a dot on; the first that matches counts.

    Returns:
        The names of the adapted modules.

    Raises:
        TypeError: a target that cannot be adapted, or an argument of the wrong type.
        ValueError: nothing matches, an argument out of range, a projection of
            ``nn.MultiheadAttention``, or a model that has adapters already, is sharded or in
            ``DistributedDataParallel``.
    """
    check_impl(impl)
    check_dtype("adapter_dtype", adapter_dtype)
    check_contains_layers(model)
    _check_unadapted(model)
    found = find_targets(model, target_modules, exclude_modules, include_head)
    config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
    configs = adapter_configs(found, config, rank_pattern, alpha_pattern)
    adapt(model, found, configs, impl, adapter_dtype)
    return list(found)


def adapt(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    configs: Mapping[str, AdapterConfig],
    impl: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> None:
    """Replace the modules ``found`` by adapted ones and freeze the rest; all or nothing."""
    check_replaceable(model, "adapt")
    compiled = {id(getattr(module, "_orig_mod", None)) for module in model.modules()}
    for name, module in found.items():
        if id(module) in compiled:
            raise ValueError(
                f"expected layers that are not compiled themselves, got {name}, whose compiled"
                " forward would not see the adapter: adapt it first, then compile it"
            )
    required = [(p, p.requires_grad) for p in model.parameters()]
    replaced = {}
    try:
        for name, module in found.items():
            replaced[module] = layer_class(module).from_plain(
                module, configs[name], impl, adapter_dtype
            )
    except BaseException as error:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        if type(error) in (TypeError, ValueError):
            raise type(error)(f"{name}: {error}") from error
        raise
    for parameter, _ in required:
        parameter.requires_grad_(False)
    replace_modules(model, replaced)
    _leave_fast_path(model)


def check_contains_layers(model: nn.Module) -> None:
    """Check that ``model`` is not a layer itself, which nothing can replace.

    Raises:
        ValueError: it is.
    """
    layer = getattr(model, "_orig_mod", model)
    if isinstance(layer, LoRALayer) or layer_class(layer) is not None:
        raise ValueError(
            f"expected a model that contains layers, got a {type(layer).__name__} itself: see"
            " FusedLoRALinear.from_linear, its like, and plain()"
        )


def _check_unadapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            raise ValueError(
                f"expected a model without adapters, got one at {name}: add_adapter or load_adapter"
                " gives it another, unload_lora takes them off"
            )
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            raise ValueError(
                f"expected a model without adapters, got PEFT's at {name}: merge_and_unload or"
                " unload takes them off"
            )


def replace_modules(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put each module's replacement in every place where it stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips repeats
            if child in replaced:
                setattr(parent, name, replaced[child])


def _no_fast_path(module: nn.Module, args) -> None:
    """A hook that does nothing: its presence keeps ``nn.TransformerEncoderLayer`` in Python."""


def _leave_fast_path(model: nn.Module) -> None:
    """Make encoder layers call their adapted linears, whose weights their fast path reads."""
    slow = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.modules():
                if isinstance(child, LoRALayer):
                    child.register_forward_pre_hook(_no_fast_path)
                    slow.add(module)
    for module in model.modules():
        # A stack with a padding mask hands its layers nested tensors, for the fast path alone.
        if isinstance(module, nn.TransformerEncoder) and slow & set(module.layers):
            module._nested_before_lora = module.use_nested_tensor
            module.use_nested_tensor = False


def restore_fast_path(model: nn.Module) -> None:
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _no_fast_path]:
            del hooks[key]
        if "_nested_before_lora" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_nested_before_lora")
