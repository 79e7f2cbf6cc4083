"""A layer that takes another's place: all it takes over, and what it could not."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def copy_module(source: nn.Module, target: nn.Module, without: Collection[str] = ()) -> None:
    """Give ``target`` all that ``source`` has: the hooks' handles stay valid."""
    for name, value in vars(source).items():
        if name in ("_parameters", "_buffers", "_modules"):
            value = {key: kept for key, kept in value.items() if key not in without}
        elif name == "_non_persistent_buffers_set":
            value = value.difference(without)
        elif name in without or name == "_compiled_call_impl":  # which calls the source
            continue
        target.__dict__[name] = value


def check_own_forward(module: nn.Module) -> None:
    """Check that no other forward stands on the instance.

    Raises:
        TypeError: one does.
    """
    if "forward" in vars(module):
        raise TypeError(
            f"expected the forward of {type(module).__name__}, got one replaced on the instance (as"
            " accelerate's hooks do), which the layer in its place would not call; take it off"
            " first (accelerate.hooks.remove_hook_from_module) and put it on again after"
        )


def class_name(cls: type) -> str:
    """A class as its users write it."""
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__
