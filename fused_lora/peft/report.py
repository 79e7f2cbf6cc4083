"""A readable report of what ``patch_peft`` does to each layer of a model."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from ..models.fusion import FusionReport, counted, noted


@dataclass(frozen=True)
class PatchReport:
    """What :func:`fused_lora.patch_peft` does to each layer; prints as its summary and a list.

    It describes the model at the time of patching; every call decides anew.

    Attributes:
        layers: each layer's name and the reason why it keeps PEFT's forward, or None if it runs
            fused; for adapters on a Parameter (``target_parameters``), the Parameter's name.
        beside: fused layers whose base runs its own forward, with the fused adapter added to its
            output: name and reason.
        narrowed: fused layers whose float32 adapters are computed in the half precision of their
            input; their gradients are as accurate as that.
        everywhere: whether PEFT's layers are patched in all models.
        fusion: layers that share an input and gated MLPs, with their reasons; None without a model.
        experts: as in :class:`fused_lora.FusionReport`.
    """

    layers: dict[str, str | None]
    beside: dict[str, str]
    narrowed: list[str]
    everywhere: bool = False
    fusion: FusionReport | None = None
    experts: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line."""
        if self.everywhere:
            return "PEFT's LoRA layers run fused where they are plain, in every model"
        kept = [reason for reason in self.layers.values() if reason is not None]
        fused = len(self.layers) - len(kept)
        line = f"{fused} of {len(self.layers)} LoRA layers fused"
        if self.beside:
            line += f", {len(self.beside)} of them beside their base layer's own forward: "
            line += counted(self.beside.values())
        if kept:
            line += f"; {len(kept)} keep PEFT's forward: {counted(kept)}"
        if self.narrowed:
            line += (
                f"; {len(self.narrowed)} with float32 adapters compute in half precision, with its"
                " accuracy, for inputs in half precision"
            )
        if self.fusion is not None and (self.fusion.groups or self.fusion.blocks):
            line += f"; {self.fusion.summary}"
        if self.experts:
            line += f"; {noted(self.experts)}"
        return line

    def _rows(self):
        for name, reason in self.layers.items():
            if name in self.beside:
                yield name, f"fused beside its base: {self.beside[name]}"
            else:
                yield name, "fused" if reason is None else f"PEFT's forward: {reason}"
        if self.fusion is not None:
            yield from self.fusion.rows()
        yield from self.experts.items()

    def __str__(self) -> str:
        lines = [f"  {name}: {what}" for name, what in self._rows()]
        return "\n".join([self.summary, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(what)}</td></tr>"
            for name, what in self._rows()
        )
        return f"<p>{html.escape(self.summary)}</p><table>{rows}</table>"
