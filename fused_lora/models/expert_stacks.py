"""Experts' Parameters ``(E, out, in)``, and those of a model that no adapter reaches.

Experts that are slices of one Parameter are no linear layers. PEFT's "all-linear" leaves those of
many models out, this library's omits those that would not run fused, and a list of names takes
none: most of a mixture's weights may stay frozen without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from weakref import WeakSet

from torch import nn

from ..layers.base import LoRALayer
from ..layers.parameter import LoRAParameter
from ..layers.wrapping import BASE
from ..ops.validation import listed
from .targets import excluder, is_conv1d
from .warn import warn
from .wrappers import clean

_PEFT_PREFIX = "base_model.model."  # of names in PEFT's models
_named: WeakSet[nn.Module] = WeakSet()  # a module of experts of each model that was warned of


class Unadapted(NamedTuple):
    """Experts' Parameters that have no adapter and do not train.

    Attributes:
        names: of the Parameters, those of the unadapted model.
        share: of the model's weights that they are, 0 to 1.
        targets: the shortest entries of ``target_parameters`` that select them and no other
            Parameters.
    """

    names: list[str]
    share: float
    targets: list[str]

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.0f} % of the model's weights"


def stacks_of(place: str, module: nn.Module) -> list[str]:
    """The names of a module's own Parameters that hold the matrices of several experts.

    Such a Parameter is floating, ``(E, out, in)`` with no dimension of 1, and no quantisation
    scale. Its module is no layer of PyTorch's (a convolution, ``nn.Bilinear``) and is called one of
    experts: by its class, by its name in the model, or by an attribute such as ``num_experts`` that
    equals ``E``. All of transformers' classes of experts have one. Without that condition position
    tables, kernels per head and codebooks would count.
    """
    kinds = (kind for kind in type(module).__mro__ if kind is not nn.Module)
    if any(kind.__module__.startswith("torch.nn.") for kind in kinds):
        return []
    kind = type(module).__name__.lower()
    called = "expert" in kind or kind.endswith("moe") or "expert" in place.lower()
    counts = {n for key, n in vars(module).items() if type(n) is int and "expert" in key}
    return [
        name
        for name, p in module._parameters.items()
        if p is not None and p.dim() == 3 and min(p.shape) > 1 and p.is_floating_point()
        if (called or len(p) in counts) and "scale" not in name
    ]


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's adapter on a Parameter; works without PEFT installed."""
    return "parameter_name" in vars(module) and "lora_B" in module._modules


def plain_name(place: str) -> str:
    """A module's or Parameter's name without the parts that wrappers and PEFT's layers add."""
    return ".".join(part for part in clean(place).split(".") if part != BASE)


def has_children(module: nn.Module, *names: str) -> bool:
    """Whether a module has children of these names, scripted modules included."""
    return all(name in module._modules for name in names)


class _Stack(NamedTuple):
    name: str
    module: nn.Module
    parameter: nn.Parameter


def _stacks(model: nn.Module) -> Iterator[_Stack]:
    for place, module in model.named_modules():
        for name in stacks_of(plain_name(place), module):
            yield _Stack(plain_name(f"{place}.{name}"), module, module._parameters[name])


def _reached(model: nn.Module) -> set[int]:
    """Ids of the Parameters that have an adapter, or that train whole as a copy."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, LoRAParameter):
            found.add(id(module.weight))
        elif is_wrapper(module):
            base = module
            while is_wrapper(base):
                base = base._modules[BASE]
            found.add(id(getattr(base, module.parameter_name, None)))
        elif has_children(module, "original_module", "modules_to_save"):  # PEFT's copies
            found |= set(map(id, module._modules["original_module"].parameters()))
    return found


def unadapted_experts(
    model: nn.Module, exclude: str | Iterable[str] | None = None
) -> Unadapted | None:
    """The experts of an adapted model that have no adapter, or None.

    Args:
        exclude: what the user left out on purpose, as ``exclude_modules``.
    """
    reached, excluded = _reached(model), excluder(exclude)
    left = [
        stack
        for stack in _stacks(model)
        if id(stack.parameter) not in reached and not stack.parameter.requires_grad
        if not any(map(excluded, _names_of(stack)))
    ]
    if not left:
        return None
    names = [plain_name(n) for n, _ in model.named_parameters()]
    total = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    size = sum({id(s.parameter): s.parameter.numel() for s in left}.values())
    own = {stack.name for stack in left}
    return Unadapted([stack.name for stack in left], size / total, _targets(own, names))


def _names_of(stack: _Stack) -> list[str]:
    name = stack.name.removeprefix(_PEFT_PREFIX)
    return [name.rpartition(".")[0], name]


def _targets(own: set[str], names: Iterable[str]) -> list[str]:
    """The shortest endings of two parts or more that select the Parameters ``own`` alone."""
    others, found = set(names) - own, {}
    for name in sorted(own):
        parts = name.removeprefix(_PEFT_PREFIX).split(".")
        for start in range(max(0, len(parts) - 2), -1, -1):
            ending = ".".join(parts[start:])
            if parts[start].isdecimal() and start:
                continue
            if not any(n == ending or n.endswith(f".{ending}") for n in others):
                break
        found[ending] = None
    return list(found)


def warn_of_experts(
    model: nn.Module,
    targets: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None = None,
    *,
    resolved: bool = False,
    cure: str = "apply_lora",
) -> None:
    """Warn, once per model, of experts that stay frozen though the user may expect them to train.

    They may if

    * ``targets`` is "all-linear" or a pattern;
    * an entry of a list matches no module: "gate_proj" names no expert of transformers 5;
    * the list reaches the mixture's other parts, such as a shared expert;
    * ``resolved``: every linear layer has an adapter. PEFT and files hold "all-linear" as names.

    A list that names attention alone leaves experts out on purpose, and so do adapters on some of
    them: the report of :func:`fused_lora.patch_peft` and of
    :func:`fused_lora.fuse_projections` has a line, and no warning is given. None is either if
    ``exclude`` names the experts, or if nothing trains.

    Args:
        model: adapted.
        targets, exclude: ``target_modules`` and ``exclude_modules``.
        resolved: whether ``targets`` may be what "all-linear" became.
        cure: the function or class that the warning names.
    """
    left = unadapted_experts(model, exclude)
    if left is None or not any(p.requires_grad for p in model.parameters()):
        return
    stacks, reached = list(_stacks(model)), _reached(model)
    if any(id(stack.parameter) in reached or stack.module in _named for stack in stacks):
        return
    if not isinstance(targets, str) and not (
        _unmatched(model, targets or ())
        or _within_mixture(model, left.names)
        or (resolved and _every_linear(model))
    ):
        return
    _named.add(stacks[0].module)
    arguments = f"target_parameters={left.targets}"
    if cure == "LoraConfig":
        arguments += ", lora_dropout=0"  # PEFT refuses another
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in left.names})
    warn(
        f"no adapter for the experts {listed(left.names)}, {left.percent}: they are Parameters,"
        f" not linear layers, and stay frozen. {cure}(..., {arguments}) adapts them;"
        f" exclude_modules={modules} silences this warning"
    )


def stated(config: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """What a file says of ``target_modules`` and ``exclude_modules``, if they are lists.

    A pattern may be what :func:`fused_lora.save_adapter` made of names, or no valid one.
    """
    values = (config.get("target_modules"), config.get("exclude_modules"))
    lists = (value if isinstance(value, list) else [] for value in values)
    targets, exclude = ([name for name in names if isinstance(name, str)] for names in lists)
    return targets, [name for name in exclude if name]


def _unmatched(model: nn.Module, targets: Iterable[str]) -> bool:
    """Whether an entry of a list names no module."""
    names = [plain_name(place).removeprefix(_PEFT_PREFIX) for place, _ in model.named_modules()]
    known = set(names)
    return not all(t in known or any(n.endswith(f".{t}") for n in names) for t in targets)


def _within_mixture(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether an adapter is beside the experts, in the module that holds them."""
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in names} - {""}
    for place, module in model.named_modules():
        if not _is_adapted(module) or isinstance(module, LoRAParameter) or is_wrapper(module):
            continue
        place = plain_name(place)
        for owner in owners:
            inner = place.removeprefix(f"{owner}.")
            if inner != place and "att" not in inner.partition(".")[0].lower():
                return True
    return False


def _is_adapted(module: nn.Module) -> bool:
    """Whether a module is an adapted layer of this library or of PEFT."""
    return isinstance(module, LoRALayer) or has_children(module, BASE, "lora_A", "lora_B")


def _every_linear(model: nn.Module) -> bool:
    """Whether each linear layer but the head has an adapter or trains."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {id(head)}
    for module in model.modules():
        if _is_adapted(module) or "original_module" in module._modules:
            inside |= set(map(id, module.modules()))
    return all(
        id(module) in inside or module.weight.requires_grad
        for module in model.modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    )
