"""Merging an adapter into its weight and back, and what a merged layer saves and loads."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..ops.modes import without_autocast
from .adapter import AdapterLayer

_ROUNDING = 4e-3  # bfloat16's unit round-off
_merged_layers: WeakSet[MergeableLayer] = WeakSet()


def memory(tensor: Tensor) -> tuple[int, int, int]:
    """``(storage, first byte, end)`` of a tensor; Parameters may be views of one storage."""
    local = tensor.to_local() if sharding.is_shard(tensor) else tensor.detach()
    extent = sum((n - 1) * stride for n, stride in zip(local.shape, local.stride(), strict=True))
    start = local.storage_offset() * local.element_size()
    stop = start + (extent + 1) * local.element_size() * bool(local.numel())
    return local.untyped_storage()._cdata, start, stop


def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two results of :func:`memory` have bytes in common."""
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights differ by no more than the rounding of an SVD on two machines."""
    difference = torch.linalg.vector_norm(a.to(b.device, torch.float32) - b.float())
    return bool(difference <= _ROUNDING * torch.linalg.vector_norm(b, dtype=torch.float32))


class MergeableLayer(AdapterLayer):
    """The merging part of :class:`.base.LoRALayer`, which documents the attributes.

    ``_base_weight`` is the base weight while merged; ``_original_weight`` is the weight that a
    PiSSA layer was split from.
    """

    def plain_weight(self) -> Tensor:
        """The weight for a forward without the adapter's branch: merged, or disabled.

        Raises:
            RuntimeError: disabled, and there is no base weight.
        """
        if not self.enabled:
            self.check_base()
        weight = self.weight if self.enabled else self.base_weight
        # A base kept as a shard is gathered while FSDP has gathered the layer.
        return sharding.like(weight, self.weight)

    @property
    def base_weight(self) -> Tensor | None:
        """The weight without the adapter; None if it is lost, see :meth:`check_base`."""
        if self.init == "pissa":
            return self._original_weight
        return self._base_weight if self.merged else self.weight

    def check_base(self) -> None:
        """Check that the weight without the adapter still exists.

        Raises:
            RuntimeError: it does not, after a merge with ``keep_base=False`` or in a PiSSA layer
                that loaded the state of another weight.
        """
        if self.base_weight is None:
            why = (
                "a PiSSA layer that loaded the state of one made from another weight"
                if self.init == "pissa"
                else "a layer merged with keep_base=False"
            )
            raise RuntimeError(f"expected a base weight, got {why}")

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Add the adapter to the weight, in place, computed in float32 (float64 for float64).

        The base weight is kept aside, on the same device, for ``unmerge``; ``keep_base=False``
        frees it and makes the merge final. Other users of the weight (a tied module, another
        adapter) then see the merged weight; :func:`fused_lora.merge_lora` refuses to do that.

        Raises:
            RuntimeError: already merged, or another layer has merged into the same weight.
            TypeError: the weight is not a Parameter, so that it cannot be written.
        """
        self.check_mergeable()
        sharding.reshard(self)
        with torch.inference_mode(False), torch.no_grad():
            base = self.weight.detach().clone()
        self.weight.copy_(self.from_matrix(self._adapted_matrix()))
        self._base_weight = base if keep_base else None
        self.merged = True
        _merged_layers.add(self)

    def _adapted_matrix(self) -> Tensor:
        """``W + s·B A``, with DoRA scaled to its magnitude; ``(out, in)``, at least float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(self.weight):
            matrix = self.lora_B.to(wide).flatten(1) @ self.lora_A.to(wide).flatten(1)
        weight = self.to_matrix(self.weight)
        matrix = sharding.like(matrix, weight).mul_(self._scaling).add_(weight)
        if self.use_dora:
            norm = torch.linalg.vector_norm(matrix, dim=1)
            matrix.mul_((self.lora_magnitude_vector.to(wide) / norm).unsqueeze(1))
        return matrix

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: not merged, or merged with ``keep_base=False``.
        """
        self.check_restorable()
        sharding.reshard(self)
        self.weight.copy_(self._base_weight)
        self._forget_merge()

    def check_restorable(self) -> None:
        """Raise the RuntimeError that ``unmerge`` would."""
        if not self.merged:
            raise RuntimeError("expected a merged layer, got one that is not merged")
        if self._base_weight is None:
            raise RuntimeError(
                "expected a base weight to restore, got a layer merged with keep_base=False"
            )
        sharding.check_gathered(self.weight)

    def check_mergeable(self) -> None:
        """Raise the error that ``merge`` would."""
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got one that is merged already")
        if not isinstance(self.weight, nn.Parameter):
            raise TypeError("expected weight to be a Parameter, got one computed or sharded")
        sharding.check_gathered(self.weight, self.lora_A)
        own = memory(self.weight)
        if any(x.merged and overlap(memory(x.weight), own) for x in _merged_layers):
            raise RuntimeError(
                "expected a weight of this layer alone, got one that another layer has merged into:"
                " unmerge that layer first"
            )

    def _forget_merge(self) -> None:
        self._base_weight = None
        self.merged = False
        self.disown_weight()

    def disown_weight(self) -> None:
        """Allow other layers to merge into the weight."""
        _merged_layers.discard(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # after a copy or unpickling
        if self.merged:
            _merged_layers.add(self)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight
            return
        # The saved weight contains the adapter: B = 0, so that loading does not add it twice.
        destination[prefix + "lora_B"] = torch.zeros_like(self.lora_B)
        if self.use_dora:
            norm = torch.linalg.vector_norm(self.to_matrix(self.weight), dim=1)
            destination[prefix + "lora_magnitude_vector"] = norm.to(self.lora_B.dtype)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        names = ("weight", *self.adapter_parameters())
        state = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if problem := self._state_problem(state, prefix):
            error_msgs.append(problem)
            return
        remerge = False
        if self.merged and state:
            remerge = self._base_weight is not None
            if remerge:
                self.unmerge()
            else:
                self._forget_merge()  # the state replaces weight and adapter
        residual = self.weight.detach().clone() if self._original_weight is not None else None
        first_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if state.keys() == {"weight"}:  # a plain layer's: the adapter keeps its values
            own = {prefix + name for name in names}
            added = missing_keys[first_missing:]
            missing_keys[first_missing:] = [key for key in added if key not in own]
        self._renew_scaling_tensor()
        if residual is not None and not _same(residual, self.weight):
            self.__dict__["_original_weight"] = None  # the state was split from another weight
        if remerge:
            if local_metadata.get("assign_to_params_buffers", False):
                # The weight is now the caller's tensor, which merging must not change.
                self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            self.merge()

    def _state_problem(self, state: dict[str, Tensor], prefix: str) -> str | None:
        """Why these tensors cannot be loaded, by parameter name, or None."""
        parameters = self.adapter_parameters()
        keys = ", ".join(prefix + name for name in ("weight", *parameters))
        if state.keys() == {"weight"} and (self._original_weight is not None or self.use_dora):
            kind = "DoRA" if self.use_dora else "PiSSA"
            return (
                f"expected {keys} together for a {kind} layer, whose adapter belongs to its weight,"
                f" got {prefix}weight alone; load a plain state before adapting"
            )
        if not state or not self.merged or self._base_weight is not None:
            return None
        own = {"weight": self.weight, **parameters}
        if {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in own.items()}:
            return None
        return (
            f"expected the whole state of {prefix[:-1] or 'the layer'}, merged with"
            f" keep_base=False, got {keys} only in part or in other shapes"
        )
