"""Whole models: replace chosen modules by adapted layers, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..distributed.sharding import check_replaceable
from ..layers.base import LoRALayer
from ..layers.config import AdapterConfig, check_flag
from ..layers.parameter import ParameterTarget
from ..layers.wrapping import WrappingLayer
from ..ops.validation import check_dtype, check_impl, listed
from .arguments import check_model, check_without_peft, module_names
from .bypass import warn_of_readers
from .check import watch_first_backward
from .expert_stacks import warn_of_experts
from .fusion import fuse_new_layers
from .heads import fresh_heads, warn_of_heads
from .modules_to_save import find_modules, with_tied
from .parameter_targets import (
    all_experts,
    check_outside,
    doubled,
    find_parameters,
    read_elsewhere,
)
from .record import remember
from .targets import (
    ALL_LINEAR,
    adapter_configs,
    excluder,
    find_targets,
    layer_class,
    warn_of_zero_scales,
)
from .trained_modules import copy_tensors, train_copies


def apply_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
    target_parameters: Iterable[str] | None = None,
    modules_to_save: Iterable[str] | None = None,
    ensure_weight_tying: bool = False,
    include_head: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
    impl: str = "auto",
    adapter_dtype: torch.dtype | None = None,
    fuse_projections: bool = True,
    fuse_mlp: bool = True,
) -> list[str]:
    """Add adapters to modules of ``model``, in place, and freeze everything else.

    ``nn.Linear`` becomes :class:`fused_lora.FusedLoRALinear`, transformers' ``Conv1D``
    :class:`FusedLoRAConv1D`, ``nn.Embedding`` :class:`LoRAEmbedding` and ``nn.Conv2d``
    :class:`LoRAConv2d`; the new layers keep the same Parameters. A linear layer that computes its
    own product (bitsandbytes, another subclass of ``nn.Linear``, a replaced ``forward``) becomes
    the child ``base_layer`` of a new layer, which adds the adapter to its output. A module
    registered in several places gets one adapter; two modules that share a weight get one each, as
    in PEFT. On an error the model is unchanged.

    Args:
        model: any ``nn.Module`` that contains the layers to adapt.
        rank, alpha, dropout, use_rslora, use_dora, init, impl, adapter_dtype: as for
            :class:`fused_lora.FusedLoRALinear`. Convolutions and embeddings support the
            initialisations "default" and "gaussian" and no DoRA; embeddings ignore ``dropout``.
        target_modules: "all-linear" (every Linear, also of a subclass, and Conv1D but the output
            embeddings of a transformers model and heads outside its pretrained base, such as the
            "score" of a classifier), a list of module names or of their last dotted parts
            ("q_proj", "self_attn.q_proj"), or a regular expression that must match a whole name.
        exclude_modules: modules to leave out: a list or a regular expression as above.
        target_parameters: Parameters that belong to no layer, by the ends of their names, as in
            PEFT: the matrices of experts ("experts.gate_up_proj", "experts.down_proj") or of a
            router ("gate.weight"). By default "all-linear" includes the experts that transformers
            holds as one Parameter, with twice the rank and alpha for ``gate_up_proj``, as in PEFT,
            and a list of modules includes none. ``target_modules=[]`` adapts Parameters alone.
            Such a layer is called by the name of the Parameter's module; see
            :class:`fused_lora.LoRAParameter`.
        modules_to_save: modules to train whole and to save with the adapter, such as a new head, by
            the ends of their names, as in PEFT. They get no adapter: a copy of their Parameters and
            buffers trains in their place. The originals are kept for :func:`disable_lora` and
            :func:`unload_lora`.
        ensure_weight_tying: whether modules that share a Parameter with one in ``modules_to_save``
            (tied embeddings) share its copy; by default they are no longer tied, as in PEFT.
        include_head: whether "all-linear" includes the output embeddings.
        rank_pattern, alpha_pattern: ranks and alphas that replace ``rank`` and ``alpha``, by
            regular expression. A key must match a whole name or its last dotted parts, for a
            Parameter its own ("gate_up_proj"); the first match counts.
        fuse_projections, fuse_mlp: whether layers that share an input, such as q, k and v, and
            gated MLPs are computed together (:func:`fused_lora.fuse_projections`, which also
            reports what was found).

    Returns:
        The names of the adapted modules.

    Raises:
        TypeError: a target that cannot be adapted, a module in ``modules_to_save`` that cannot be
            trained whole, or an argument of the wrong type.
        ValueError: nothing matches, an argument is out of range, a target's weight is read by
            another module that does not call it (as in ``nn.MultiheadAttention`` and Mamba), a
            target was compiled on its own, or the model already has adapters, is sharded or is
            wrapped in ``DistributedDataParallel``.
    """
    check_model(model)
    check_impl(impl)
    check_dtype("adapter_dtype", adapter_dtype)
    check_flag("include_head", include_head)
    check_flag("fuse_projections", fuse_projections)
    check_flag("fuse_mlp", fuse_mlp)
    if target_parameters is None or target_modules != []:
        target_modules = module_names("target_modules", target_modules)
    if exclude_modules is not None:
        exclude_modules = module_names("exclude_modules", exclude_modules)
    check_flag("ensure_weight_tying", ensure_weight_tying)
    check_contains_layers(model)
    _check_unadapted(model)
    check_without_peft(model)
    everywhere = dict(model.named_modules(remove_duplicate=False))
    saved = find_modules(everywhere, modules_to_save)
    if ensure_weight_tying:
        saved = with_tied(model, saved)
    trained = {part for module in saved.values() for part in module.modules()}
    heads = fresh_heads(model)
    parts = {part for head in heads.values() for part in head.modules()}
    excluded = excluder(exclude_modules)
    if target_parameters is not None:
        parameters = find_parameters(model, target_parameters, excluded, trained)
        twice = set()
    else:
        every = target_modules == ALL_LINEAR
        parameters = all_experts(model, excluded, trained) if every else {}
        twice = doubled(parameters)
    found = find_targets(
        model, target_modules, exclude_modules, include_head, trained, parts, bool(parameters)
    )
    check_outside(parameters, found.values())
    warn_of_readers(parameters, read_elsewhere(model, parameters))
    found |= parameters
    config = AdapterConfig(rank, alpha, dropout, use_rslora, use_dora, init)
    configs = adapter_configs(found, config, rank_pattern, alpha_pattern, twice)
    warn_of_heads(model, heads, found.values(), trained, excluded)
    copies = copy_tensors(model, saved, ensure_weight_tying)
    adapt(model, found, configs, impl, adapter_dtype)
    train_copies(saved, copies)
    fuse_new_layers(model, projections=fuse_projections, mlp=fuse_mlp)
    remember(model)
    watch_first_backward(model)
    warn_of_zero_scales({name: configs[name].scaling for name in found})
    if target_parameters is None:
        warn_of_experts(model, target_modules, exclude_modules)
    return list(found)


def adapt(
    model: nn.Module,
    found: Mapping[str, nn.Module | ParameterTarget],
    configs: Mapping[str, AdapterConfig],
    impl: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> None:
    """Replace the modules ``found`` by adapted ones and freeze the rest; all or nothing.

    :func:`remember` follows, after the modules that train whole have their copies.
    """
    check_replaceable(model, "adapt")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(
            f"expected initialised parameters, got lazy ones ({listed(lazy)}): call the model once"
            " before adapting it"
        )
    # torch.compile(layer) is a wrapper: the layer is its child ``_orig_mod``.
    compiled = {id(getattr(module, "_orig_mod", None)) for module in model.modules()}
    for name, module in found.items():
        if id(getattr(module, "holder", module)) in compiled:
            raise ValueError(
                f"expected layers that are not compiled themselves, got {name}, whose compiled"
                " forward would not see the adapter: adapt it first, then compile it"
            )
    required = [(p, p.requires_grad) for p in model.parameters()]
    replaced = {}
    # from_plain freezes weights as it goes: on an error the flags are restored.
    try:
        for name, module in found.items():
            cls = layer_class(module)
            if isinstance(module, ParameterTarget):  # around the layers of those before
                holder, name_in_it = module.holder, module.name
                module = ParameterTarget(replaced.get(holder, holder), name_in_it)
            replaced[getattr(module, "holder", module)] = cls.from_plain(
                module, configs[name], impl, adapter_dtype
            )
    except BaseException as error:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        for layer in replaced.values():
            while isinstance(layer, WrappingLayer):
                layer = layer.plain()  # the base gets its hooks back
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
    check_model(model)
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
                f"expected a model without adapters, got PEFT's at {name}: patch_peft(model) runs"
                " them fused, PEFT's merge_and_unload or unload removes them"
            )


def replace_modules(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Register each replacement in every place of the module that it replaces."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips repeats
            new = child
            while new in replaced:  # a module within nested layers
                new = replaced[new]
            if new is not child:
                setattr(parent, name, new)


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
