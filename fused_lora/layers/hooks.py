"""What may run beside a module's own forward."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module


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
