"""Heads outside a pretrained base, and poolers: ``from_pretrained`` may have made them fresh.

``LlamaForSequenceClassification.score`` is in no file: neither the base model's nor an adapter's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator

from torch import nn

from ..ops.validation import listed
from .modules_to_save import CONTAINERS
from .warn import warn
from .wrappers import clean

# Classes whose heads belong to the pretraining, so that a checkpoint has them.
_OBJECTIVE = re.compile(
    r".*(For(Pre[Tt]raining|NextSentencePrediction|CausalLM|ConditionalGeneration|Masked\w+)"
    r"|LMHeadModel)"
)
# Only transformers' own classes.
_MODEL = re.compile(r".*((?<!DoubleHeads)Model|Backbone|WithProjection)")
_TASK = re.compile(r".*For\w*(Classification|Answering|Choice|Regression)")


def fresh_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules with parameters that no checkpoint may hold, by name.

    In a transformers model they are outside ``model.base_model``; its output embeddings and the
    heads of a class for pretraining belong to it, and so does all of a checkpoint of the same
    class. Within the base they are parts that ``from_pretrained`` did not find, such as a pooler.
    Of other modules nothing is known, so a head of one's own beside a transformers model is none.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return {}
    heads = {}
    for place, pretrained in _outermost(model, transformers.PreTrainedModel):
        prefix = f"{place}." if place else ""
        inside = _pretrained_parts(pretrained, transformers.PreTrainedModel)
        for name, head in _outside(pretrained, inside) if inside else ():
            if not _was_loaded(head, pretrained):
                heads[prefix + name] = head
        base = pretrained.base_model
        base_name = next(name for name, module in pretrained.named_modules() if module is base)
        for name, part in _not_found(base):
            heads[prefix + f"{base_name}.{name}".lstrip(".")] = part
    return heads


def _not_found(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The direct parts of a pretrained base that ``from_pretrained`` did not find.

    It marks the Parameters that it found. Other code makes new Parameters of them, as quantising
    does, but hardly of all in such a part, and all in float.
    """
    if not any(map(_is_marked, base.parameters())):
        return
    for name, part in base.named_children():
        own = list(part.parameters())
        if any(isinstance(m, nn.Linear) for m in part.modules()) and all(map(_is_fresh, own)):
            yield name, part


def _is_fresh(parameter: nn.Parameter) -> bool:
    plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
    return plain and not (parameter.is_meta or _is_marked(parameter))


def _pretrained_parts(model: nn.Module, cls: type) -> list[nn.Module | None]:
    """What a checkpoint of the base model holds; empty if nothing is known to be outside."""
    kind, own = type(model).__name__, type(model).__module__.startswith("transformers.")
    if _OBJECTIVE.fullmatch(kind) or (own and _MODEL.fullmatch(kind)):
        return []
    # With the output embeddings comes all of their head, such as BERT's ``cls``.
    output = model.get_output_embeddings()
    head = next((child for child in model.children() if output in set(child.modules())), None)
    if model.base_model is not model:
        return [model.base_model, head]
    if own and not _TASK.fullmatch(kind):
        return []
    # No attribute is called base_model_prefix: the base is the models among the children.
    parts = [child for child in model.children() if isinstance(child, cls)]
    if parts:
        return [*parts, _input_embeddings(model), head]
    return [child for child in model.children() if own and type(child) is not nn.Linear]


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # a class that has none, or does not say
        return None


def _outermost(module: nn.Module, cls: type, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, cls):
        yield place, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, cls, f"{place}.{name}" if place else name)


def _outside(
    module: nn.Module, inside: list[nn.Module | None], place: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        where = f"{place}.{name}" if place else name
        if any(child is base for base in inside):
            continue
        parts = set(child.modules())
        if isinstance(child, CONTAINERS) or any(base in parts for base in inside):
            yield from _outside(child, inside, where)
        elif next(child.parameters(), None) is not None:
            yield where, child


def warn_of_heads(
    model: nn.Module,
    heads: dict[str, nn.Module],
    targets: Collection[nn.Module],
    trained: Collection[nn.Module],
    excluded: Callable[[str], object],
) -> None:
    """Warn of heads that stay frozen, or have an adapter, though no file may hold them.

    Args:
        targets: the modules that get adapters.
        trained: the modules in ``modules_to_save`` and their parts.
        excluded: whether ``exclude_modules`` has a name: such heads stay frozen on purpose.
    """
    left = {clean(name): head for name, head in heads.items() if head not in trained}
    adapted = [n for n, head in left.items() if not set(head.modules()).isdisjoint(targets)]
    frozen = [n for n, head in left.items() if n not in adapted and not _named(n, head, excluded)]
    if not adapted and not frozen:
        return
    parts = []
    if frozen:
        parts.append(f"no adapter for {listed(frozen)}, frozen")
    if adapted:
        parts.append(f"an adapter on {listed(adapted)}, whose own weights its file lacks")
    silence = ", or name them in exclude_modules to silence this warning" if frozen else ""
    warn(
        f"{'; '.join(parts)}. {type(model).__name__} initialised them afresh, unless a checkpoint"
        f" had them: train and save them whole with modules_to_save={[*frozen, *adapted]}{silence}"
    )


def _was_loaded(head: nn.Module, model: nn.Module) -> bool:
    """Whether ``from_pretrained`` found a head's Parameters.

    transformers 5 marks those that it found. Before, the configuration names the class that the
    checkpoint was saved from, and None for a model that was made from a configuration.
    """
    if any(map(_is_marked, model.base_model.parameters())):
        return all(map(_is_marked, head.parameters()))
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def _is_marked(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _named(name: str, head: nn.Module, excluded: Callable[[str], object]) -> bool:
    """Whether ``exclude_modules`` has a head, or every part of it that owns Parameters."""
    places = {f"{name}.{key}".rpartition(".")[0] for key, _ in head.named_parameters()}
    return bool(excluded(name)) or all(map(excluded, places))
