"""How code that runs several layers together reads each of them."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.operands import Projection


class LayerReader:
    """Reads this library's layers; a subclass may read others."""

    def read(self, layer: nn.Module, x: Tensor | None) -> Projection | str:
        """The operands of a layer as it is now, or why it runs its own forward.

        Args:
            x: its input, or one like it without rows; None if it is not known.
        """
        read = getattr(type(layer), "lora_projection", None)
        return f"a {type(layer).__name__}" if read is None else read(layer)

    def impl(self, layer: nn.Module) -> str:
        """The layer's implementation."""
        return layer.impl

    def note_call(self, layer: nn.Module) -> None:
        """Tell a layer that it ran."""
        layer.note_call()
