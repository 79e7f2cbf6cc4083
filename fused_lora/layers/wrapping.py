"""Adapted layers that contain the plain one, as the child ``base_layer``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adapter import ADAPTER_NAMES
from .base import ADDED, LoRALayer
from .config import AdapterConfig
from .offload import onloaded

BASE = "base_layer"
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _follow_base(layer: WrappingLayer, incompatible_keys) -> None:
    """Initialise an adapter on meta after ``load_state_dict`` has loaded its base."""
    with onloaded(layer):
        layer._leave_meta()
    layer._write_scale(layer.scaling)


def _has(module: nn.Module, name: str) -> bool:
    """Whether an assignment to ``name`` changes what ``module`` has."""
    registered = module._parameters, module._buffers, module._modules, vars(module)
    return any(name in known for known in registered)


class WrappingLayer(LoRALayer):
    """An adapted layer whose child ``base_layer`` is the plain one, unchanged.

    The base's public attributes can also be read and assigned here. Its forward and backward hooks
    move here while it is adapted, so they see the adapted output.
    """

    @classmethod
    def wrap(
        cls, base: nn.Module, config: AdapterConfig, impl: str, adapter_dtype, **attributes: Any
    ):
        """A new layer around ``base``, which the caller freezes.

        Args:
            attributes: set on the layer before its adapter is made.
        """
        layer = cls()
        layer.training = base.training
        vars(layer).update(attributes)
        layer._modules[BASE] = base
        with torch.inference_mode(False):  # inference tensors could not be trained
            layer._add_adapter(config, impl, adapter_dtype)
        layer.register_load_state_dict_post_hook(_follow_base)
        return layer

    def __getattr__(self, name: str):
        """Attributes of the base: other code reads ``layer.weight`` and ``in_features``.

        Private ones are not forwarded: tools such as accelerate keep their state there. Nor are the
        adapter's, since the base may be an adapted layer too.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get(BASE)
            if base is None or name.startswith("_") or name in ADDED:
                raise
        return getattr(base, name)

    def __setattr__(self, name: str, value) -> None:
        base = self.__dict__.get("_modules", {}).get(BASE)
        while isinstance(base, WrappingLayer):
            base = base._modules[BASE]
        # As in __getattr__: what tools set on this layer, such as a hook's forward, is its own.
        own = name.startswith("_") or name in self.__dict__ or name in {"forward", BASE, *ADDED}
        if base is not None and not own and _has(base, name):
            setattr(base, name, value)  # tying weights, for example
        else:
            super().__setattr__(name, value)

    def _exchange_hooks(self) -> None:
        """Exchange the hooks with the base's; existing handles can still remove them."""
        own, base = vars(self), vars(self._modules[BASE])
        for name in _HOOKS:
            own[name], base[name] = base[name], own[name]

    def plain(self) -> nn.Module:
        """The base itself, still frozen, with its hooks and those that it got since."""
        base = self._modules[BASE]
        since = {name: dict(getattr(base, name) or {}) for name in _HOOKS[:-1]}
        self._exchange_hooks()
        for name, hooks in since.items():
            getattr(base, name).update(hooks)
        return base

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Accept the base's keys without ``base_layer.``: an unadapted model's state."""
        adapter = [f"{prefix}{name}" for name in ADAPTER_NAMES]
        inner = f"{prefix}{BASE}."
        keys = [key for key in state_dict if key.startswith(prefix) and key not in adapter]
        plain = keys and not any(key.startswith(inner) for key in keys)
        if plain:
            for key in keys:
                state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)
        first_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if plain and not any(key in state_dict for key in adapter):  # the adapter keeps its values
            missing_keys[first_missing:] = []
