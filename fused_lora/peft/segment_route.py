"""Many adapters in one batch of one of PEFT's models: its layers' way through ``adapter_segments``.

PEFT's own ``adapter_names`` does so for inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.segment_route import NamedAdapter, SegmentRoute
from ..ops.validation import listed
from .eligibility import Parts, input_reason
from .patch import SEGMENTS, is_patched, named_parts, peft_classes


class PeftSegmentRoute(SegmentRoute):
    """Reads PEFT's layers."""

    attribute = SEGMENTS

    def is_disabled(self, layer: nn.Module) -> bool:
        return layer.disable_adapters and not layer.merged

    def reason(self, layer: nn.Module, names: Sequence[str]) -> str | None:
        if not is_patched(layer):
            return f"a lora.{type(layer).__name__} layer"
        if layer.merged:
            return "a merged layer"
        if "forward" in vars(layer):
            return "a replaced forward"
        for name in names:
            if name in layer.lora_A and isinstance(parts := named_parts(layer, name), str):
                return f"{parts} (adapter {name!r})"
        return None

    def adapter(self, layer: nn.Module, x: Tensor, name: str) -> NamedAdapter | None:
        if name not in layer.lora_A:
            return None
        parts = self._parts(layer, name)
        if reason := input_reason(layer, x, parts):
            raise ValueError(f"expected an input that the fused layer computes, got {reason}")
        return NamedAdapter(parts.lora_A, parts.lora_B, parts.scaling, parts.dropout)

    def plain_base(
        self, layer: nn.Module, names: Sequence[str]
    ) -> tuple[Tensor, Tensor | None] | None:
        parts = self._parts(layer, next(name for name in names if name in layer.lora_A))
        return None if parts.beside is not None else (parts.weight, parts.bias)

    def base_output(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer.base_layer(x)

    def impl(self, layer: nn.Module) -> str:
        return "auto"

    def _parts(self, layer: nn.Module, name: str) -> Parts:
        parts = named_parts(layer, name)
        if isinstance(parts, str):
            raise ValueError(f"expected a plain adapter {name!r}, got {parts}")
        return parts


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers of one of PEFT's models, by name.

    Raises:
        ValueError: there are none, one is not patched, or the model has other modules of adapters.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise ValueError(
            f"expected a model with LoRA layers of PEFT, got a {type(model).__name__} without"
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"expected a model without modules_to_save, got a {kind} at {name}, of which each"
                " adapter has a copy of its own"
            )
        if isinstance(module, BaseTunerLayer) and name not in layers:
            raise ValueError(f"expected LoRA layers only, got a {kind} at {name}")
    kinds = tuple(peft_classes())
    unpatched = [n for n, m in layers.items() if isinstance(m, kinds) and not is_patched(m)]
    if unpatched:
        raise ValueError(
            f"expected a model under patch_peft, got PEFT's own forward at {listed(unpatched)}:"
            " call patch_peft(model) first"
        )
    return layers
