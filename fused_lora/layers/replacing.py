"""Replacing a layer by one of another class: copying its state, and checking that this suffices."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def copy_module(source: nn.Module, target: nn.Module, without: Collection[str] = ()) -> None:
    """Give ``target`` the attributes of ``source``, except those named in ``without``.

    The dictionaries of hooks are shared, so that existing handles can still remove their hooks.
    """
    for name, value in vars(source).items():
        if name in ("_parameters", "_buffers", "_modules"):
            value = {key: kept for key, kept in value.items() if key not in without}
        elif name == "_non_persistent_buffers_set":
            value = value.difference(without)
        elif name in without or name == "_compiled_call_impl":  # bound to source
            continue
        target.__dict__[name] = value


def check_own_forward(module: nn.Module) -> None:
    """Check that ``forward`` is the class's own, not one set on the instance.

    Raises:
        TypeError: it is set on the instance.
    """
    if "forward" in vars(module):
        raise TypeError(
            f"expected the forward of {type(module).__name__}, got one replaced on the instance (as"
            " accelerate's hooks do), which the new layer would not call: remove it first"
            " (accelerate.hooks.remove_hook_from_module) and add it again afterwards"
        )


def class_name(cls: type) -> str:
    """A class's name as users write it: ``nn.`` before PyTorch's own."""
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__
