"""What may run beside a module's own forward, or instead of its formula."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as every_module

from ..distributed.sharding import is_shard


def changed(module: nn.Module) -> str | None:
    """What replaces or accompanies a module's forward; None if it runs as its class defines it."""
    if "forward" in module.__dict__:
        return "a replaced forward (such as accelerate's)"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "a hook"
    return None


def may_change_input(module: nn.Module) -> bool:
    """Whether a hook or a replaced forward may give a module's forward another input."""
    return bool(
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def on_every_module() -> bool:
    """Whether there are hooks that run for every module."""
    return bool(
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def unusual(module: nn.Module) -> str | None:
    """Why a module of a plain class does not compute just its formula; None if it does."""
    if reason := changed(module):
        return reason
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            if is_shard(parameter):
                return "sharded, unless FSDP2 gathers it for the call"
            return f"a {name} of class {type(parameter).__name__}"
        if parameter is not None and hasattr(parameter, "ds_id"):
            return "partitioned by DeepSpeed's ZeRO-3"
    if type(module) is nn.Linear and "weight" not in module._parameters:
        return "a computed weight"
    return None


def mode_reason() -> str | None:
    """Why a transform or a hook on every module lets no layer run fused."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "a hook on every module" if on_every_module() else None
