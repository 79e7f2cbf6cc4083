"""Fused LoRA layers: ``y = x Wᵀ + bias + s·D(x) Aᵀ Bᵀ`` in Triton, with a pure-PyTorch path.

``W`` and ``bias`` are frozen, the factors ``A`` and ``B`` are trained, ``s`` is the adapter's scale
and ``D`` its dropout.

>>> import torch
>>> from fused_lora import FusedLoRALinear
>>> layer = FusedLoRALinear.from_linear(torch.nn.Linear(64, 32), rank=4)
>>> layer(torch.randn(8, 64)).shape
torch.Size([8, 32])
"""

from .explain import explain
from .layers.conv import LoRAConv2d
from .layers.embedding import LoRAEmbedding
from .layers.linear import FusedLoRAConv1D, FusedLoRALinear
from .layers.parameter import LoRAParameter
from .many_adapters import (
    adapter_losses,
    adapter_parameters,
    adapter_segments,
    clip_adapter_grad_norm_,
)
from .models.adapt import apply_lora
from .models.check import check_adapters
from .models.fusion import FusionReport, fuse_projections, unfuse_projections
from .models.lifecycle import disable_lora, merge_lora, unload_lora, unmerge_lora
from .models.named_adapters import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    set_adapter,
)
from .models.parameters import (
    ParameterSummary,
    assert_only_lora_gradients,
    lora_layers,
    lora_param_groups,
    lora_parameters,
    parameter_summary,
)
from .models.untrained import untrained_adapters
from .ops.dispatch import Decision
from .ops.functional import fused_lora_add, fused_lora_linear
from .ops.operands import Projection
from .ops.projections import fused_lora_gated_mlp, fused_lora_projections
from .ops.segments import Segments
from .peft.checkpoint import load_adapter, save_adapter
from .peft.patch import patch_peft, unpatch_peft
from .peft.report import PatchReport

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "FusedLoRAConv1D",
    "FusedLoRALinear",
    "FusionReport",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRAParameter",
    "ParameterSummary",
    "PatchReport",
    "Projection",
    "Segments",
    "adapter_losses",
    "adapter_names",
    "adapter_parameters",
    "adapter_segments",
    "add_adapter",
    "add_weighted_adapter",
    "apply_lora",
    "assert_only_lora_gradients",
    "check_adapters",
    "clip_adapter_grad_norm_",
    "delete_adapter",
    "disable_lora",
    "explain",
    "fuse_projections",
    "fused_lora_add",
    "fused_lora_gated_mlp",
    "fused_lora_linear",
    "fused_lora_projections",
    "load_adapter",
    "lora_layers",
    "lora_param_groups",
    "lora_parameters",
    "merge_lora",
    "parameter_summary",
    "patch_peft",
    "save_adapter",
    "set_adapter",
    "unfuse_projections",
    "unload_lora",
    "unmerge_lora",
    "unpatch_peft",
    "untrained_adapters",
]
