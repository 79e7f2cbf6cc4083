"""Replacing a layer by one of another class: copying its state, and checking that this suffices."""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType

from torch import nn


def copy_module(source: nn.Module, target: nn.Module, without: Collection[str] = ()) -> None:
    """Give ``target`` the attributes of ``source``, except those named in ``without``.

    The dictionaries of hooks are shared, so that existing handles can still remove their hooks.
    Methods set on the instance, such as torchao's ``extra_repr``, are bound to ``target``.
    """
    for name, value in vars(source).items():
        if name in ("_parameters", "_buffers", "_modules"):
            value = {key: kept for key, kept in value.items() if key not in without}
        elif name == "_non_persistent_buffers_set":
            value = value.difference(without)
        elif name in without or name in ("_compiled_call_impl", "forward"):  # bound to source
            continue
        elif isinstance(value, MethodType) and value.__self__ is source:
            value = MethodType(value.__func__, target)
        target.__dict__[name] = value


def check_own_forward(module: nn.Module) -> None:
    """Check that ``forward`` is the class's own, not another one set on the instance.

    Raises:
        TypeError: another one is set on the instance.
    """
    forward = vars(module).get("forward")
    if forward is not None and not is_own_forward(module, forward):
        raise TypeError(
            f"expected the forward of {type(module).__name__}, got one replaced on the instance (as"
            " accelerate's hooks do), which the new layer would not call: remove it first"
            " (accelerate.hooks.remove_hook_from_module(model, recurse=True)) and add it again"
            " afterwards"
        )


def is_own_forward(module: nn.Module, forward) -> bool:
    """Whether it is the class's: removing accelerate's hook sets that on the instance."""
    own = type(module).forward
    return getattr(forward, "__func__", None) is own and forward.__self__ is module


def class_name(cls: type) -> str:
    """A class's name as users write it: ``nn.`` before PyTorch's own."""
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__
