"""Whole models: replace chosen modules by adapted layers, all or nothing."""

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
    """Add adapters to modules of ``model``, in place, and freeze everything else.

    ``nn.Linear`` becomes :class:`fused_lora.FusedLoRALinear`, transformers' ``Conv1D``
    :class:`FusedLoRAConv1D`, ``nn.Embedding`` :class:`LoRAEmbedding` and ``nn.Conv2d``
    :class:`LoRAConv2d`; the new layers keep the same Parameters. A module registered in several
    places gets one adapter; two modules that share a weight get one each, as in PEFT. On an error
    the model is unchanged.

    Args:
        model: any ``nn.Module`` that contains the layers to adapt.
        rank, alpha, dropout, use_rslora, use_dora, init, impl, adapter_dtype: as for
            :class:`fused_lora.FusedLoRALinear`. Convolutions and embeddings support the
            initialisations "default" and "gaussian" and no DoRA; embeddings ignore ``dropout``.
        target_modules: "all-linear" (every Linear and Conv1D but the output embeddings of a
            transformers model), a list of module names or of their last dotted parts ("q_proj",
            "self_attn.q_proj"), or a regular expression that must match a whole name.
        exclude_modules: modules to leave out: a list or a regular expression as above.
        include_head: whether "all-linear" includes the output embeddings.
        rank_pattern, alpha_pattern: ranks and alphas that replace ``rank`` and ``alpha``, by
            regular expression. A key must match a whole name or its last dotted parts; the first
            match counts.

    Returns:
        The names of the adapted modules.

    Raises:
        TypeError: a target that cannot be adapted, or an argument of the wrong type.
        ValueError: nothing matches, an argument is out of range, a target is a projection of
            ``nn.MultiheadAttention`` or was compiled on its own, or the model already has adapters,
            is sharded or is wrapped in ``DistributedDataParallel``.
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
    # torch.compile(layer) is a wrapper: the layer is its child ``_orig_mod``.
    compiled = {id(getattr(module, "_orig_mod", None)) for module in model.modules()}
    for name, module in found.items():
        if id(module) in compiled:
            raise ValueError(
                f"expected layers that are not compiled themselves, got {name}, whose compiled"
                " forward would not see the adapter: adapt it first, then compile it"
            )
    required = [(p, p.requires_grad) for p in model.parameters()]
    replaced = {}
    # from_plain freezes weights as it goes: on an error the flags are restored.
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
    """Check that ``model`` is not itself a layer: without a parent it cannot be replaced.

    Raises:
        ValueError: it is one.
    """
    layer = getattr(model, "_orig_mod", model)
    if isinstance(layer, LoRALayer) or layer_class(layer) is not None:
        raise ValueError(
            f"expected a model that contains layers, got a {type(layer).__name__} itself: adapt"
            " a single layer with FusedLoRALinear.from_linear or its counterpart, undo with plain()"
        )


def _check_unadapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            raise ValueError(
                f"expected a model without adapters, got one at {name}: add_adapter or load_adapter"
                " adds another, unload_lora removes them"
            )
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            raise ValueError(
                f"expected a model without adapters, got PEFT's at {name}: merge_and_unload or"
                " unload removes them"
            )


def replace_modules(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Register each replacement in every place of the module that it replaces."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips repeats
            if child in replaced:
                setattr(parent, name, replaced[child])


def _no_fast_path(module: nn.Module, args) -> None:
    """A no-op hook: ``nn.TransformerEncoderLayer`` skips its fast path if it has any hook."""


def _leave_fast_path(model: nn.Module) -> None:
    """Make encoder layers call their adapted linears: the fast path only reads the weights."""
    slow = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.modules():
                if isinstance(child, LoRALayer):
                    child.register_forward_pre_hook(_no_fast_path)
                    slow.add(module)
    for module in model.modules():
        # With a padding mask, an encoder passes nested tensors, which need the fast path.
        if isinstance(module, nn.TransformerEncoder) and slow & set(module.layers):
            module._nested_before_lora = module.use_nested_tensor
            module.use_nested_tensor = False


def restore_fast_path(model: nn.Module) -> None:
    """Undo :func:`_leave_fast_path`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _no_fast_path]:
            del hooks[key]
        if "_nested_before_lora" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_nested_before_lora")
