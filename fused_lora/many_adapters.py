"""Training many adapters in one batch: the block, the Parameters, the loss, clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed.sharding import check_whole
from .layers.base import LoRALayer
from .layers.config import check_flag
from .layers.segment_route import BASE, Block, SegmentRoute, opened
from .models.arguments import check_model
from .models.named_adapters import adapter_names
from .models.parameters import adapted_layers
from .models.trained_modules import trained_modules
from .models.warn import warn
from .ops.validation import listed


@contextmanager
def adapter_segments(
    model: nn.Module, names: Sequence[str | None], *, zeros: bool = False
) -> Iterator[None]:
    """Run each sample of a batch with its own adapter, around forward *and* backward::

        with adapter_segments(model, ["a", "b", "a", None]):
            losses = cross_entropy(model(ids), labels, reduction="none")
            sum(adapter_losses(losses, names).values()).backward()

    For models that this library adapted (:func:`fused_lora.add_adapter`), and for PEFT's under
    :func:`fused_lora.patch_peft`. Adapters may differ in rank, scale and dropout.
    :func:`adapter_parameters` gives what an optimizer trains.

    A layer's input is ``(batch, ..., in)`` or ``(batch*tokens, in)``, sample by sample. One with
    rows in another order (packed sequences, experts after routing) must not be adapted. Neighbours
    with one adapter form a segment (:class:`fused_lora.Segments`). With one segment per adapter and
    at least four rows in each, a layer's output and gradients are those of one call per adapter bit
    for bit in PyTorch's operators; else, and in whole models, they are equal to rounding. Dropout
    draws other masks than separate runs.

    Layers run one by one in the block: none shares its input's product, no gated MLP is one
    function. Compiled code breaks its graph at every layer. State is per model and thread: other
    models and threads are not affected.

    Args:
        names: the adapter of each sample, in any order; None or "__base__" for none.
        zeros: whether an adapter that no sample has gets zero gradients, as
            ``DistributedDataParallel`` needs them, instead of None.

    Raises:
        RuntimeError: a block of the same model is open in this thread; a layer that cannot run in
            segments (merged, DoRA, a convolution, an embedding), by name; later a layer that is
            merged inside the block, or computed again outside of it by activation checkpointing.
            That is detected for any ``saved_tensors_hooks`` and any autograd Function.
        TypeError: ``model`` is not a module, or names that are no list of str.
        ValueError: no or unknown names; a model without adapters, of PEFT without its patch,
            sharded, in a data-parallel wrapper that would lose gradients, or with
            ``modules_to_save``; in a forward, an input of another batch size.
    """
    check_model(model)
    check_flag("zeros", zeros)
    layers, route = _layers(model)
    layers = {place or type(layer).__name__: layer for place, layer in layers.items()}
    known = _known(layers)
    names = _checked(names, known)
    used = [name for name in dict.fromkeys(names) if name is not None]
    for place, layer in layers.items():
        if reason := route(layer).reason(layer, used):
            raise RuntimeError(f"{place}: expected a layer that can run in segments, got {reason}")
    if torch.is_grad_enabled() and model.training:
        _warn_of_frozen(layers, used)
    absent = [name for name in known if name not in used] if zeros else []
    block = Block(names, {layer: place for place, layer in layers.items()}, absent)
    with opened(block, route):
        yield


def adapter_parameters(
    model: nn.Module, names: Sequence[str] | None = None
) -> dict[str, list[nn.Parameter]]:
    """The Parameters of each adapter, which train from now on, for an optimizer.

    In this library's models the inactive adapters' stay outside ``model.parameters()`` and
    ``state_dict()``: use ``optimizer.zero_grad()``, not the model's. Call it after moving the model
    to its device. :func:`fused_lora.set_adapter` then exchanges the Parameters of two adapters, so
    that the optimizer stays valid; :func:`fused_lora.save_adapter` saves any adapter by its name.
    In PEFT's models those that PEFT froze as inactive require grad again.

    Args:
        names: of adapters; all by default.

    Raises:
        TypeError, ValueError: as for :func:`adapter_segments`.
    """
    check_model(model)
    layers, _ = _layers(model)
    known = _known(layers)
    names = known if names is None else list(dict.fromkeys(_checked(names, known, base=False)))
    found = {}
    for layer in layers.values():
        if isinstance(layer, LoRALayer):
            layer.train_inactive()
    for name in names:
        tensors = {id(t): t for layer in layers.values() for t in _tensors(layer, name)}
        found[name] = list(tensors.values())
        if not isinstance(next(iter(layers.values())), LoRALayer):
            for tensor in found[name]:
                tensor.requires_grad_(True)
    return found


def adapter_losses(
    losses: Tensor,
    names: Sequence[str | None],
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """The mean loss of each adapter's own samples; their *sum* is what to train.

    Each adapter's gradient is then that of a run of its own. The mean over the whole batch would
    scale it by the adapter's share of the tokens.

    Args:
        losses: ``(batch, ...)`` or ``(batch*tokens,)``, as
            ``torch.nn.functional.cross_entropy(..., reduction="none")`` gives them.
        names: the adapter of each sample, as for :func:`adapter_segments`.
        labels: of as many entries; those that equal ``ignore_index`` do not count. By default all
            entries count.

    Returns:
        A 0-d tensor per adapter, in the order of ``names``. Samples without an adapter are left
        out. It is 0 for an adapter of which no entry counts.

    Raises:
        TypeError: ``losses`` is no tensor, or names that are no list of str.
        ValueError: sizes that do not fit, or no names.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"expected losses to be a Tensor, got {type(losses).__name__}")
    names = _checked(names)
    if not losses.dim() or losses.numel() % len(names) or (
        losses.dim() > 1 and losses.shape[0] != len(names)
    ):  # fmt: skip
        raise ValueError(
            f"expected losses of {len(names)} samples, one per name, not reduced, got shape"
            f" {tuple(losses.shape)}"
        )
    if labels is not None and labels.numel() != losses.numel():
        raise ValueError(
            f"expected labels of {losses.numel()} entries, as losses has, got {labels.numel()}"
        )
    rows = losses.reshape(len(names), -1)
    counted = None if labels is None else labels.reshape(len(names), -1) != ignore_index
    found = {}
    for name in dict.fromkeys(names):
        if name is None:
            continue
        own = torch.tensor([n == name for n in names], device=rows.device).unsqueeze(1)
        own = own.expand_as(rows) if counted is None else own & counted
        # Not by multiplying with zero: another adapter's NaN must not come in.
        found[name] = rows.where(own, 0).sum() / own.sum().clamp(min=1)
    return found


def clip_adapter_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """``torch.nn.utils.clip_grad_norm_`` for each adapter on its own, as in runs of their own.

    Returns:
        The norm of each adapter's gradients before clipping; adapters without gradients are left
        out.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``.
        TypeError, ValueError: as for :func:`adapter_segments`.
    """
    check_model(model)
    layers, _ = _layers(model)
    norms = {}
    for name in _known(layers):
        tensors = {id(t): t for layer in layers.values() for t in _tensors(layer, name)}
        if grads := [t for t in tensors.values() if t.grad is not None]:
            norms[name] = nn.utils.clip_grad_norm_(grads, max_norm, norm_type, error_if_nonfinite)
    return norms


def _layers(model: nn.Module) -> tuple[Mapping[str, nn.Module], type[SegmentRoute]]:
    """The adapted layers, this library's or PEFT's, and the kind of their routes."""
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(
            "expected a model without wrapper, got one in DataParallel, whose replicas get other"
            " samples: use DistributedDataParallel"
        )
    if _of_peft(model):
        from .peft.segment_route import PeftSegmentRoute, peft_layers

        return peft_layers(model), PeftSegmentRoute
    layers = adapted_layers(model)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "expected a model without wrapper, got one in DistributedDataParallel, which reduces no"
            " gradients of inactive adapters: it does so for PEFT's models under patch_peft"
        )
    check_whole(model, "train many adapters")
    if trained := trained_modules(model):
        raise ValueError(
            f"expected a model without modules_to_save, got {listed(list(trained))}, of which each"
            " adapter has a copy of its own"
        )
    return layers, SegmentRoute


def _of_peft(model: nn.Module) -> bool:
    own = any(isinstance(module, LoRALayer) for module in model.modules())
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return not own and any(kind.__module__.partition(".")[0] == "peft" for kind in kinds)


def _known(layers: Mapping[str, nn.Module]) -> list[str]:
    first = next(iter(layers.values()))
    if isinstance(first, LoRALayer):
        return adapter_names(nn.ModuleList(layers.values()))
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.lora_A))


def _tensors(layer: nn.Module, name: str) -> Iterator[nn.Parameter]:
    if not isinstance(layer, LoRALayer):
        for half in (layer.lora_A, layer.lora_B):
            if name in half:
                yield half[name].weight
    elif name == layer.adapter_name:
        yield from layer.adapter_parameters().values()
    else:
        yield from layer.inactive_adapters[name].tensors.values()


def _checked(names, known: Sequence[str] | None = None, base: bool = True) -> list[str | None]:
    """The names, None for no adapter."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"expected names to be a list, one per sample, got {names!r:.60}")
    for name in names:
        if not isinstance(name, str) and not (base and name is None):
            raise TypeError(f"expected a name of an adapter, got {name!r:.60}")
    found = [None if base and name == BASE else name for name in names]
    if not found:
        raise ValueError("expected a name per sample, got none")
    unknown = {name: None for name in found if name is not None and known and name not in known}
    if unknown:
        got = ", ".join(map(repr, unknown))
        raise ValueError(f"expected names of the adapters {', '.join(known)}, got {got}")
    return found


def _warn_of_frozen(layers: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    frozen = [
        name
        for name in names
        if not any(t.requires_grad for layer in layers.values() for t in _tensors(layer, name))
    ]
    if frozen:
        warn(
            f"{', '.join(map(repr, frozen))} will not train, although the model is in training"
            " mode: call adapter_parameters(model) and give the result to an optimizer"
        )
