"""Checks of arguments that the functions on whole models share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def check_model(model: nn.Module) -> None:
    """Check that ``model`` is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, an nn.Module, got {described(model)}")


def described(value: object) -> str:
    """What a value of the wrong type is: a class, None, or an object of some type."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"


def check_without_peft(model: nn.Module) -> None:
    """Check that PEFT has not wrapped ``model`` or put layers into it.

    Raises:
        ValueError: it has; names what does the same there.
    """
    for name, module in model.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            where = f" at {name}" if name else ""
            raise ValueError(
                f"expected a model that fused_lora has adapted or may adapt, got PEFT's"
                f" {type(module).__name__}{where}: patch_peft(model) runs its LoRA layers fused;"
                " its adapters have PEFT's own methods, such as save_pretrained, load_adapter,"
                " add_adapter, set_adapter, merge_adapter and merge_and_unload"
            )


def module_names(argument: str, value: str | Iterable[str]) -> str | list[str]:
    """A selection of modules: a regular expression, or the names in a list.

    Raises:
        TypeError: neither a str nor a list of names.
        ValueError: an empty str.
    """
    if isinstance(value, str) and value:
        return value
    if value == "" and isinstance(value, str):
        raise ValueError(f"expected {argument} to name modules, got ''")
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | nn.Module | dict):
        names = list(value)
        if all(isinstance(name, str) and name for name in names):
            return names
        value = next(name for name in names if not isinstance(name, str) or not name)
        raise TypeError(
            f"expected {argument} to be names of modules as str, got one that is {described(value)}"
        )
    hint = ", or 'all-linear'" if argument == "target_modules" else ""
    raise TypeError(
        f"expected {argument} to be a list of names or a regular expression{hint}, got"
        f" {described(value)}"
    )
