"""Find and fuse the layers of a model that share an input, and its gated MLPs."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from ..layers import gated_block
from ..layers.gated_block import GatedBlock
from ..layers.hooks import may_change_input
from ..layers.linear import FusedLoRALinear
from ..layers.shared_input import SharedInput
from .arguments import check_model, check_without_peft
from .probe import shared_inputs
from .symbolic import NotGatedError, prove
from .untrained import expert_notes
from .warn import warn


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse_projections` found; prints as its summary and a list.

    It describes the model as it was then; every call decides anew.

    Attributes:
        groups: names of the layers that share an input, in the order of their calls. Those of a
            gated MLP that is one block are not listed.
        blocks: names of the gated MLPs, each with the reason why it runs layer by layer, or None if
            it is one block. Also of modules that have such layers but compute something else.
        alone: names of layers of a group that run alone, with the reason.
        experts: of a mixture, what is known to be untrained: experts' Parameters without an
            adapter, and by Parameter the experts that got no gradient yet.
    """

    groups: list[tuple[str, ...]] = field(default_factory=list)
    blocks: dict[str, str | None] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line."""
        groups, blocks = len(self.groups), sum(why is None for why in self.blocks.values())
        parts = [
            f"{groups} {'group shares' if groups == 1 else 'groups share'} an input",
            f"{blocks} gated {'MLP is' if blocks == 1 else 'MLPs are'} one block",
        ]
        kept = [why for why in self.blocks.values() if why is not None]
        if kept:
            parts.append(f"{len(kept)} not: {counted(kept)}")
        if self.alone:
            parts.append(f"{len(self.alone)} of the groups' layers run alone: ")
            parts[-1] += counted(self.alone.values())
        if self.experts:
            parts.append(noted(self.experts))
        return "; ".join(parts)

    def rows(self) -> Iterable[tuple[str, str]]:
        """Names and what runs, line by line."""
        for names in self.groups:
            yield ", ".join(names), "share an input"
        for name, why in self.blocks.items():
            yield name, "one block" if why is None else f"layer by layer: {why}"
        for name, why in self.alone.items():
            yield name, f"alone: {why}"
        yield from self.experts.items()

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {name}: {what}" for name, what in self.rows())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(what)}</td></tr>"
            for name, what in self.rows()
        )
        return f"<p>{html.escape(self.summary)}</p><table>{rows}</table>"


def counted(reasons: Iterable[str]) -> str:
    """Each reason with its number, the most frequent one first."""
    return ", ".join(f"{reason} ({n})" for reason, n in Counter(reasons).most_common())


def noted(experts: Mapping[str, str]) -> str:
    """The notes on a mixture's experts as a part of one line."""
    notes = [f"{name}: {note}" for name, note in experts.items()]
    rest = f"; {len(notes) - 2} more Parameters of experts" if len(notes) > 2 else ""
    return "; ".join(notes[:2]) + rest


@dataclass(frozen=True)
class Kind:
    """A kind of adapted linear layers: this library's, or PEFT's.

    Attributes:
        is_layer: whether a module is one.
        attribute: where a layer holds its :class:`SharedInput`.
        shared_input, block: the classes that read its operands.
    """

    is_layer: Callable[[nn.Module], bool]
    attribute: str
    shared_input: type[SharedInput]
    block: type[GatedBlock]


OWN = Kind(
    lambda module: isinstance(module, FusedLoRALinear), "shared_input", SharedInput, GatedBlock
)


def fuse_projections(
    model: nn.Module,
    groups: Iterable[Iterable[str]] | None = None,
    *,
    projections: bool = True,
    mlp: bool = True,
) -> FusionReport:
    """Compute layers of one input, such as q, k and v, and gated MLPs together, in place.

    Values, parameters and files stay as they are; so do dropout masks, unless other random numbers
    are drawn between the calls of layers that share an input, or one of them never runs.

    Layers that share an input compute their thin products at once and add up the gradient of ``x``
    in place (:func:`fused_lora.fused_lora_projections`); a gated MLP keeps half as much for
    backward (:func:`fused_lora.fused_lora_gated_mlp`). Every call checks that it may: otherwise
    each layer runs alone. :func:`apply_lora` calls this; call it again after layers were added or
    replaced.

    Args:
        model: a model adapted by this library; :func:`patch_peft` does the same for PEFT's.
        groups: names of layers that share an input, in the order of their calls, such as
            ``[["q_proj", "k_proj", "v_proj"]]``, for modules whose forward does not show it. By
            default the forwards of all modules with two or more adapted layers are tried on the
            meta device, without values.
        projections, mlp: whether to fuse layers that share an input, and gated MLPs.

    Raises:
        TypeError: ``model`` is not a module, or ``groups`` is not names of layers.
        ValueError: a model adapted by PEFT, or a group that no module has.
    """
    check_model(model)
    check_without_peft(model)
    report = fuse(model, OWN, _checked(groups), projections=projections, mlp=mlp)
    return replace(report, experts=expert_notes(model))


def unfuse_projections(model: nn.Module) -> None:
    """Undo :func:`fuse_projections`: every layer runs alone again.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model adapted by PEFT; :func:`unpatch_peft` undoes the same there.
    """
    check_model(model)
    check_without_peft(model)
    unfuse(model, OWN)


def fuse_new_layers(model: nn.Module, *, projections: bool = True, mlp: bool = True) -> None:
    """:func:`fuse_projections` after layers were adapted; if it fails they run alone."""
    try:
        fuse(model, OWN, projections=projections, mlp=mlp)
    except Exception as error:
        unfuse(model, OWN)
        warn(f"no layers are computed together ({type(error).__name__}: {error})")


def fuse(
    model: nn.Module,
    kind: Kind,
    groups: list[tuple[str, ...]] | None = None,
    *,
    projections: bool = True,
    mlp: bool = True,
) -> FusionReport:
    """:func:`fuse_projections` for one kind of layers."""
    unfuse(model, kind)
    report, missing = FusionReport(), list(groups or ())
    for name, module in model.named_modules():
        layers = {n: m for n, m in module._modules.items() if m is not None and kind.is_layer(m)}
        if len(layers) < 2:
            continue
        in_block: tuple[str, ...] = ()
        if mlp and len(layers) >= 3:
            in_block = _fuse_block(name, module, kind, report)
        if not projections:
            continue
        if groups is None:
            found = shared_inputs(module, gated_block.original_forward(module), kind.is_layer)
        else:
            found = [names for names in groups if all(n in layers for n in names)]
            missing = [names for names in missing if names not in found]
        for names in found:
            for index, layer in enumerate(names):
                shared = kind.shared_input(module, names, index)
                vars(module._modules[layer])[kind.attribute] = shared
            if not set(names) <= set(in_block):
                _report_group(name, module, kind, names, report)
    if missing:
        unfuse(model, kind)
        raise ValueError(
            f"expected names of adapted layers of one module, got {missing[0]}, which no module has"
        )
    return report


def _report_group(name: str, module: nn.Module, kind: Kind, names, report: FusionReport) -> None:
    prefix = f"{name}." if name else ""
    together = []
    for layer in names:
        child = module._modules[layer]
        place = getattr(child, kind.attribute)
        read, impl = place.read(child, None), place.impl(child)
        if isinstance(read, str):
            report.alone[prefix + layer] = read
        elif impl in ("reference", "triton:single_pass"):
            report.alone[prefix + layer] = f"impl={impl!r}"
        elif read.weight.requires_grad:
            report.alone[prefix + layer] = "a trainable base weight"
        elif may_change_input(child):
            report.alone[prefix + layer] = "a hook that may change its input"
        else:
            together.append(prefix + layer)
    if len(together) > 1:
        report.groups.append(tuple(together))


def _looks_gated(layers: Iterable[nn.Module]) -> bool:
    """Whether two of three layers widen one size to another, which the third narrows."""
    shapes = Counter((layer.in_features, layer.out_features) for layer in layers)
    if shapes.total() != 3 or len(shapes) != 2:
        return False
    (wide, n), (narrow, _) = shapes.most_common()
    return n == 2 and wide[1] == narrow[0] and wide[0] != wide[1]


def _fuse_block(name: str, module: nn.Module, kind: Kind, report: FusionReport) -> tuple[str, ...]:
    """Attach a block to a gated MLP; the names of its layers, or none."""
    try:
        found = prove(module, gated_block.original_forward(module), kind.is_layer)
    except NotGatedError as error:
        if _looks_gated(m for m in module._modules.values() if m is not None and kind.is_layer(m)):
            report.blocks[name] = str(error)
        return ()
    layers = found.gate, found.up, found.down
    order = (0, 1) if found.order[0] == found.gate else (1, 0)
    function = found.function
    if function is not None:
        value = module._modules.get(function)
        function = function, vars(module)[function] if value is None else value
    owner = gated_block.forward_owner(module)
    block = kind.block(owner, layers, order, found.activation, function, found.settings)
    report.blocks[name] = block.reason(module)
    gated_block.attach(module, block)
    return layers if report.blocks[name] is None else ()


def unfuse(model: nn.Module, kind: Kind) -> None:
    """Undo :func:`fuse`."""
    for module in model.modules():
        if kind.is_layer(module) and vars(module).get(kind.attribute) is not None:
            vars(module)[kind.attribute] = None
        gated_block.detach(module)


def _checked(groups: Iterable[Iterable[str]] | None) -> list[tuple[str, ...]] | None:
    if groups is None:
        return None
    found = []
    for names in groups:
        names = names if isinstance(names, str) else tuple(names)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"expected groups of names, such as [['q', 'k']], got {names!r}")
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"expected groups of two or more different names, got {names!r}")
        found.append(names)
    return found
