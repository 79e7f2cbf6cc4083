"""Adapters without effect: of layers that never run, that vanished, or that were resized."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..distributed.sharding import is_shard
from ..layers.base import LoRALayer
from ..ops.validation import listed
from .arguments import check_model
from .bypass import Bypass, bypassed, warn_of_readers
from .parameters import adapted_layers
from .record import gone_layers
from .trained_modules import stopped_copies, trained_parameters
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
    * its adapter no longer fits its weight, for example after ``resize_token_embeddings``.

    A gradient counts as having run. Where several modules of a model are compiled each on their own
    (``block.compile()``), they share code, and whether a single one ran is not known.

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
    """The parts of ``modules_to_save`` that do not train, each with the reason and the cure."""
    adapters = (p for layer in layers.values() for p in layer.adapter_parameters().values())
    training = any(p.requires_grad for p in adapters)  # else all is frozen on purpose
    return {n: f"its {state}" for n, state in stopped_copies(model, frozen=training).items()}


def _idle(
    model: nn.Module, layers: Mapping[str, LoRALayer]
) -> tuple[dict[str, str], dict[int, Bypass]]:
    """The layers that never ran, each with the likely reason; and what :func:`bypassed` finds."""
    readers = bypassed(model)
    waiting = {name: layer for name, layer in layers.items() if not _ran(layer)}
    if not waiting:
        return {}, readers
    others_ran = len(waiting) < len(layers) or any(
        parameter.grad is not None for parameter in trained_parameters(model)
    )
    unknown = _share_compiled_code(model)
    found = {}
    for name, layer in waiting.items():
        reader = readers.get(id(layer))
        if reader is not None and (reader.refused or others_ran):
            found[name] = f"{reader.reason}, so its adapter has no effect: leave it out"
        elif others_ran and id(layer) not in unknown:
            found[name] = f"its forward has never run while others have: {_NEVER_RUN}"
    return found, readers


def _ran(layer: LoRALayer) -> bool:
    # A replica of DataParallel marks a copy, but its gradient arrives.
    parameters = layer.adapter_parameters().values()
    return bool(layer.__dict__.get("has_run")) or any(p.grad is not None for p in parameters)


def _share_compiled_code(model: nn.Module) -> set[int]:
    """Ids of the modules in blocks compiled one by one: one block's code also runs the others."""
    blocks = [module for module in model.modules() if _is_compiled(module)]
    kinds = Counter(_kind(block) for block in blocks)
    shared = [block for block in blocks if kinds[_kind(block)] > 1]
    shared += [module for module in model.modules() if _has_region(type(module))]
    return {id(part) for block in shared for part in block.modules()}


@functools.lru_cache(maxsize=1 << 12)
def _has_region(cls: type[nn.Module]) -> bool:
    """Whether a method is a ``torch.compiler.nested_compile_region``: traced once for all."""
    methods = [value for base in cls.__mro__ for value in vars(base).values()]
    return any("__marked_compile_region_fn__" in getattr(m, "__dict__", ()) for m in methods)


def _is_compiled(module: nn.Module) -> bool:
    # Not getattr: torch.jit's forward is a descriptor that only instances have.
    forward = module.__dict__.get("forward", inspect.getattr_static(type(module), "forward", None))
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    return compiled or module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _kind(module: nn.Module) -> type[nn.Module]:
    return type(module._modules.get("_orig_mod", module))


def warn_of_idle(model: nn.Module, when: str) -> None:
    """Warn of the layers that never ran while others have, and of copies that do not train."""
    layers = adapted_layers(model, missing_ok=True)
    if stopped := _stopped(model, layers):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in stopped.items())
        warn(f"{when}, {reasons}")
    idle, _ = _idle(model, layers)
    _warn_of_idle(idle, len(layers), when)


def _warn_of_idle(idle: Mapping[str, str], total: int, when: str) -> None:
    if idle:
        reasons = Counter(idle.values())
        parts = [
            f"{listed([name for name, its in idle.items() if its == reason])}: {reason}"
            for reason in reasons
        ]
        warn(f"{when}, {len(idle)} of {total} adapted layers have never run. {'; '.join(parts)}")


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
    """At the end of the first backward pass, warn once of the layers that never ran.

    Call it after :func:`train_copies`: if no adapter runs, only ``modules_to_save`` get gradients.
    The hooks remove themselves. Parameters that are replaced before, as by FSDP, lose them; a copy
    of the model has none.
    """
    reference = weakref.ref(model)
    handles: list = []

    def at_end() -> None:
        watched = reference()
        if watched is not None:
            warn_of_idle(watched, "after the first backward pass")

    def at_first(parameter: Tensor) -> None:
        if handles:
            for handle in handles:
                handle.remove()
            handles.clear()
            torch.autograd.Variable._execution_engine.queue_callback(at_end)

    watched = list(trained_parameters(model))
    for layer in adapted_layers(model).values():
        watched += layer.adapter_parameters().values()
    for parameter in watched:
        handles.append(parameter.register_post_accumulate_grad_hook(at_first))
