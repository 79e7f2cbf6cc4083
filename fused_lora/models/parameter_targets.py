"""Which Parameters get an adapter: those that no layer holds, such as the experts of a mixture."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from ..layers.experts import first_matrix, is_experts, is_gated
from ..layers.parameter import ParameterTarget
from ..layers.parameter_forward import unfused_reason
from ..layers.wrapping import BASE
from ..ops.validation import listed
from .arguments import described
from .bypass import Bypass, bypassed
from .targets import pattern_name
from .warn import warn

_NEAR_NAMES = 6  # suggested when nothing matched


def find_parameters(
    model: nn.Module,
    target_parameters: Iterable[str],
    excluded: Callable[[str], object],
    trained: Collection[nn.Module] = (),
) -> dict[str, ParameterTarget]:
    """The Parameters to adapt, by the names of their layers; see :func:`fused_lora.apply_lora`.

    Of several Parameters of one module the last one is outermost and has the module's name; each
    further one inward has ``.base_layer`` added. The innermost comes first.

    Args:
        excluded: whether a module or a Parameter of this name gets no adapter.
        trained: modules that train whole.

    Raises:
        TypeError: not names in a list, or a Parameter that cannot be adapted.
        ValueError: no match, or a Parameter of the model itself.
    """
    if isinstance(target_parameters, str) or not isinstance(target_parameters, Iterable):
        raise TypeError(
            "expected target_parameters to be a list of names such as 'experts.gate_up_proj', got"
            f" {described(target_parameters)}"
        )
    wanted = list(target_parameters)
    if not all(isinstance(name, str) and name for name in wanted):
        raise TypeError(f"expected target_parameters to be names, got {wanted!r}")
    found: dict[str, ParameterTarget] = {}
    unmatched, every = set(wanted), []
    for place, module in model.named_modules():
        names = []
        for name, _ in module.named_parameters(recurse=False):
            full = f"{place}.{name}" if place else name
            every.append(full)
            matched = {want for want in wanted if full == want or full.endswith(f".{want}")}
            unmatched -= matched
            if matched and module not in trained and not excluded(place) and not excluded(full):
                names.append(name)
        if names and not place:
            raise ValueError(
                f"expected Parameters of a module within the model, got {names[0]} of the model"
                " itself: move it into a submodule"
            )
        new = nested(place, module, names)
        if taken := new.keys() & found.keys():
            raise ValueError(
                f"expected one adapter of each name, got two that would be called"
                f" {sorted(taken)[0]}, since a module is named base_layer: rename that module"
            )
        found |= new
    if wanted and not found:
        raise ValueError(_no_match(wanted, unmatched, every))
    if unmatched:
        warn(f"target_parameters has {listed(sorted(unmatched))}, which names no Parameter")
    return found


def nested(place: str, module: nn.Module, names: list[str]) -> dict[str, ParameterTarget]:
    """The targets of one module, by the names of their layers, the innermost first."""
    depths = reversed(range(len(names)))
    return {
        place + f".{BASE}" * depth: ParameterTarget(module, name)
        for depth, name in zip(depths, names, strict=True)
    }


def all_experts(
    model: nn.Module, excluded: Callable[[str], object], trained: Collection[nn.Module]
) -> dict[str, ParameterTarget]:
    """Both matrices of all experts that run fused; warns of the routers that get none.

    As in PEFT, ``gate_up_proj``, of two linear layers, gets twice the rank and alpha:
    :func:`doubled`.
    """
    found: dict[str, ParameterTarget] = {}
    routers: list[nn.Parameter] = []
    names: list[str] = []
    for place, module in model.named_modules():
        if not place or not is_experts(module) or excluded(place) or module in trained:
            continue
        if unfused_reason(module, frozen=False):
            continue  # warn_of_experts names them
        matrices = (first_matrix(module), "down_proj")
        order = [name for name, _ in module.named_parameters(recurse=False) if name in matrices]
        found |= nested(place, module, [n for n in order if not excluded(f"{place}.{n}")])
        for name, weight in _routers(model, place):
            if not excluded(name.rpartition(".")[0]) and not excluded(name):
                names.append(name)
                routers.append(weight)
    if routers:
        total = max(1, sum(p.numel() for p in model.parameters()))
        share = 100 * sum(p.numel() for p in routers) / total
        full = [pattern_name(place, target) for place, target in found.items()] + names
        ends = sorted({".".join(name.split(".")[-2:]) for name in full})
        owners = sorted({name.split(".")[-2] for name in names})
        warn(
            f'"all-linear" has no adapter for the routers {listed(names)} ({share:.2g} % of the'
            f" weights); target_parameters={ends!r} adapts them too, exclude_modules={owners!r}"
            " silences this warning"
        )
    return found


def _routers(model: nn.Module, place: str) -> Iterator[tuple[str, nn.Parameter]]:
    """2-D Parameters of the modules beside the experts, except layers."""
    parent = place.rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        known = isinstance(module, nn.Linear | nn.Embedding) or place == f"{parent}.{name}"
        for key, parameter in () if known else module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                yield ".".join(part for part in (parent, name, key) if part), parameter


def doubled(found: dict[str, ParameterTarget]) -> set[str]:
    """The layers of Parameters that are two linear layers in one."""
    return {
        place
        for place, target in found.items()
        if is_gated(target.holder) and target.name == first_matrix(target.holder)
    }


def _no_match(wanted: list[str], unmatched: set[str], every: list[str]) -> str:
    if not unmatched:
        return (
            f"expected a Parameter to adapt, got target_parameters {wanted!r}, all of which"
            " exclude_modules or modules_to_save leave out"
        )
    endings = {name.rpartition(".")[2] for name in every}
    near = [
        match
        for want in wanted
        for match in difflib.get_close_matches(want.rpartition(".")[2], endings, n=_NEAR_NAMES)
    ]
    hint = f"; similar: {', '.join(dict.fromkeys(near))}" if near else ""
    return f"expected target_parameters to match a Parameter, got {wanted!r}{hint}"


def check_outside(parameters: dict[str, ParameterTarget], layers: Iterable[nn.Module]) -> None:
    """Check that no module of these Parameters contains another that is adapted too.

    Raises:
        ValueError: one does: PEFT's files would name that one by another place.
    """
    adapted = {*layers, *(target.holder for target in parameters.values())}
    for place, target in parameters.items():
        if inside := adapted.intersection(target.holder.modules()) - {target.holder}:
            kind = type(next(iter(inside))).__name__
            raise ValueError(
                f"expected Parameters of modules without adapted layers, got {place}, which"
                f" contains an adapted {kind}: adapt one of them"
            )


def read_elsewhere(model: nn.Module, parameters: dict[str, ParameterTarget]) -> dict[int, Bypass]:
    """The targets whose Parameter a module other than its own reads, by ``id``.

    Raises:
        ValueError: no module calls the one that holds it, so that an adapter has no effect.
    """
    found = {}
    readers = {name: bypassed(model, name) for name in {t.name for t in parameters.values()}}
    for place, target in parameters.items():
        reader = readers[target.name].get(id(target.holder))
        if reader is not None and reader.refused:
            raise ValueError(
                f"expected a module that is called, got {place}: {reader.reason}, so an adapter"
                " there would have no effect: leave it out"
            )
        if reader is not None:
            found[id(target)] = reader
        methods = sorted(_readers_in(type(target.holder), target.name))
        if methods:
            warn(
                f"{place}: {' and '.join(methods)} of a {type(target.holder).__name__} read"
                f" {target.name}: called from outside, they compute without the adapter"
            )
    return found


def _readers_in(cls: type[nn.Module], name: str) -> set[str]:
    """The public methods of a module, other than forward, whose code reads a Parameter."""
    found = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method, value in vars(base).items():
            code = getattr(value, "__code__", None)
            if not method.startswith("_") and method != "forward" and code is not None:
                found |= {method} if name in code.co_names else set()
    return found
