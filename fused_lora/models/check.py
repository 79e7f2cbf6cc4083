"""Adapters without effect: of layers that never run, that vanished, or that were resized."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..distributed.sharding import is_shard
from ..layers.base import LoRALayer
from ..layers.offload import has_offloaded_adapter
from ..ops.validation import listed
from .arguments import check_model
from .bypass import Bypass, bypassed, warn_of_readers
from .parameters import OFFLOADED, adapted_layers
from .record import gone_layers
from .trained_modules import stopped_copies, trained_parameters
from .untrained import watch_gradients
from .warn import warn

_NEVER_RUN = (
    "another module may read its weight without calling it, and then the adapter has no effect"
    " (leave it out with exclude_modules); or it has not been used so far (an expert, an unused"
    " branch)"
)


def check_adapters(model: nn.Module) -> dict[str, str]:
    """The problems of a model's adapted layers. Call it after a forward or a backward pass.

    >>> import torch
    >>> from fused_lora import apply_lora, check_adapters
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> names = apply_lora(model, rank=2)
    >>> model[1] = torch.nn.Linear(8, 8)
    >>> check_adapters(model)
    {'1': 'its adapter is gone: the layer was replaced by an nn.Linear'}

    A layer has a problem if

    * it never ran while others have: another module reads its weight without calling it, so that
      the adapter has no effect, or the layer has not been used so far;
    * it was adapted, or trained whole (``modules_to_save``), and has since been replaced or
      removed, so that its adapter or trained copy is lost;
    * it trains whole, and a Parameter of it no longer trains: it was quantised or frozen;
    * its adapter no longer fits its weight, for example after ``resize_token_embeddings``;
    * accelerate offloads its adapter, and the layer is in training mode: it gets no gradient.

    A gradient counts as having run. Layers of one class share compiled code, which marks only one
    of them: the others are not named, since they may have run.

    Returns:
        What is wrong, by the name of the layer; empty if nothing is.

    Raises:
        ValueError: the model never had adapters.
    """
    check_model(model)
    gone = gone_layers(model.named_modules())
    problems = {name: state.problem for name, state in gone.items()}
    layers = adapted_layers(model, missing_ok=bool(gone))
    idle, _ = _idle(model, layers)
    for name, layer in layers.items():
        if problem := layer.misfit() or idle.get(name):
            problems[name] = problem
    return problems | _stopped(model, layers)


def _stopped(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, str]:
    """What should train and does not, each with the reason and the cure."""
    adapters = (p for layer in layers.values() for p in layer.adapter_parameters().values())
    training = any(p.requires_grad for p in adapters)  # else all is frozen on purpose
    offloaded = {
        name: f"its adapter is {OFFLOADED}"
        for name, layer in layers.items()
        if training and layer.training and layer.has_run and has_offloaded_adapter(layer)
    }
    copies = stopped_copies(model, frozen=training)
    return offloaded | {name: f"its {state}" for name, state in copies.items()}


def _idle(
    model: nn.Module, layers: Mapping[str, LoRALayer]
) -> tuple[dict[str, str], dict[int, Bypass]]:
    """The layers that never ran, each with the likely reason; and what :func:`bypassed` finds."""
    readers = bypassed(model)
    waiting = {name: layer for name, layer in layers.items() if not _ran(layer)}
    if not waiting:
        return {}, readers
    others_ran = len(waiting) < len(layers) or any(
        p.requires_grad and p.grad is not None for p in model.parameters()
    )
    # The code that a compiler traced for one layer may have run others of its class.
    traced = {type(layer) for layer in layers.values() if layer.was_traced}
    found = {}
    for name, layer in waiting.items():
        reader = readers.get(id(layer))
        known = others_ran and type(layer) not in traced
        if reader is not None and (reader.refused or known):
            found[name] = f"{reader.reason}, so its adapter has no effect: leave it out"
        elif known:
            found[name] = f"its forward has never run while others have: {_NEVER_RUN}"
    return found, readers


def _ran(layer: LoRALayer) -> bool:
    # The hooks of watch_first_backward miss a Parameter that replaced theirs: look at .grad too.
    parameters = layer.adapter_parameters().values()
    return layer.has_run or any(p.grad is not None for p in parameters)


def warn_of_idle(model: nn.Module, when: str, skipped_ok: bool = False) -> None:
    """Warn of the layers that never ran while others have, and of what should train and does not.

    Args:
        skipped_ok: be silent about whole blocks that have not run while equal ones have: they are
            skipped at random (LayerDrop), or experts that no token has reached yet.
    """
    layers = adapted_layers(model, missing_ok=True)
    if stopped := _stopped(model, layers):
        warn(f"{when}, {_by_reason(stopped)}")
    idle, _ = _idle(model, layers)
    if idle and skipped_ok:
        skipped = _skipped(model, {id(layers[name]) for name in idle})
        idle = {name: reason for name, reason in idle.items() if id(layers[name]) not in skipped}
    _warn_of_idle(idle, len(layers), when)


def _skipped(model: nn.Module, idle: set[int]) -> set[int]:
    """Ids of the layers in blocks of which none ran, where a block of the same class did."""
    skipped: set[int] = set()
    for container in model.modules():
        if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            continue
        parts = {
            block: {id(m) for m in block.modules() if isinstance(m, LoRALayer)}
            for block in container.children()
            if not isinstance(block, LoRALayer)
        }
        running = {type(block) for block, layers in parts.items() if layers - idle}
        for block, layers in parts.items():
            if layers <= idle and type(block) in running:
                skipped |= layers
    return skipped


def _warn_of_idle(idle: Mapping[str, str], total: int, when: str) -> None:
    if idle:
        warn(f"{when}, {len(idle)} of {total} adapted layers have never run. {_by_reason(idle)}")


def _by_reason(problems: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in problems.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{listed(places)}: {reason}" for reason, places in names.items())


def check_effective(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Check that merging ``layers`` changes no output: each adapter has had its effect.

    A layer that has never run, and whose weight no module reads, may be an expert that no token has
    reached: it is merged, with a warning. So is one that ran, and whose weight a module also reads.

    Raises:
        RuntimeError: an adapter that is not zero has no effect until it is merged.
    """
    everywhere = adapted_layers(model)
    idle, readers = _idle(model, everywhere)
    read = {n: x for n, x in layers.items() if id(x) in readers and not _is_zero(x)}
    if wrong := [name for name in read if name in idle]:
        raise RuntimeError(
            f"expected adapters that have an effect, got {listed(wrong)}, {idle[wrong[0]]}."
            " Merging would change the outputs by what the adapter never did: remove the adapters"
            " with unload_lora(model, merge=False), and adapt without these layers"
        )
    _warn_of_idle(idle, len(everywhere), "merging")
    warn_of_readers(read, readers)


def _is_zero(layer: LoRALayer) -> bool:
    """Whether merging the adapter is known to add nothing."""
    factors: list[Tensor] = [layer.lora_A, layer.lora_B]
    if layer.init == "pissa" or is_shard(*factors) or any(f.is_meta for f in factors):
        return False
    return not all(bool(factor.any()) for factor in factors)


def watch_first_backward(model: nn.Module) -> None:
    """Note the adapters that get gradients; after the first backward pass, warn of idle layers.

    Call it after :func:`train_copies`: if no adapter runs, only ``modules_to_save`` get gradients.
    The hooks of a layer remove themselves at its first gradient. Parameters that are replaced
    before, as by FSDP, lose them; a copy of the model has none.
    """
    watch_gradients(model)
    watched = weakref.ref(model)
    is_first = [True]

    def at_end() -> None:
        if (model := watched()) is not None:
            warn_of_idle(model, "after the first backward pass", skipped_ok=True)

    def watch(parameters: Iterable[Tensor], layer: LoRALayer | None = None) -> None:
        owner = None if layer is None else weakref.ref(layer)

        def at_gradient(_: Tensor) -> None:
            if is_dynamo_compiling():  # compiled autograd traces hooks, and cannot remove them
                return
            for handle in handles:
                handle.remove()
            if owner is not None and (layer := owner()) is not None:
                layer.has_run = True
            if is_first:
                is_first.clear()
                torch.autograd.Variable._execution_engine.queue_callback(at_end)

        handles = [p.register_post_accumulate_grad_hook(at_gradient) for p in parameters]

    watch(trained_parameters(model))
    for layer in adapted_layers(model).values():
        watch(layer.adapter_parameters().values(), layer)
