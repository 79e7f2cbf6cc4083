"""Merging an adapter into its weight and back, and what a merged layer saves and loads."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..ops.modes import without_autocast

_ROUNDING = 4e-3  # of bfloat16
_merged_layers: WeakSet[MergeableLayer] = WeakSet()


def memory(tensor: Tensor) -> tuple[int, int, int]:
    """Which storage ``tensor`` lies in, and from where to where: Parameters may share one."""
    local = tensor.to_local() if sharding.is_shard(tensor) else tensor.detach()
    extent = sum((n - 1) * stride for n, stride in zip(local.shape, local.stride(), strict=True))
    start = local.storage_offset() * local.element_size()
    stop = start + (extent + 1) * local.element_size() * bool(local.numel())
    return local.untyped_storage()._cdata, start, stop


def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two places of :func:`memory` have bytes in common."""
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights differ by no more than two machines' rounding of one SVD."""
    difference = torch.linalg.vector_norm(a.to(b.device, torch.float32) - b.float())
    return bool(difference <= _ROUNDING * torch.linalg.vector_norm(b, dtype=torch.float32))


class MergeableLayer(nn.Module):
    """The merging half of :class:`fused_lora.layers.base.LoRALayer`, which has the attributes.

    ``_base_weight`` keeps the base while merged; ``_original_weight`` is what a PiSSA layer was
    made from.
    """

    def plain_weight(self) -> Tensor:
        """The weight of a forward without the adapter's branch: merged, or disabled.

        Raises:
            RuntimeError: disabled, and there is no base weight.
        """
        if not self.enabled:
            self.check_base()
        weight = self.weight if self.enabled else self.base_weight
        return sharding.like(weight, self.weight)  # a base kept as a shard, in a gathered layer

    @property
    def base_weight(self) -> Tensor | None:
        """The weight without the adapter; None where it is gone, see :meth:`check_base`."""
        if self.init == "pissa":
            return self._original_weight
        return self._base_weight if self.merged else self.weight

    def check_base(self) -> None:
        """Check that the weight without the adapter is there.

        Raises:
            RuntimeError: it is not, after a final merge or in a PiSSA layer with another's state.
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
        """Make the adapter part of the weight, in place, computed in float32 (float64 for float64).

        The base weight is kept aside, on the same device, for ``unmerge``; ``keep_base=False``
        frees it and makes the merge final. Whatever else uses the weight (a tied module, another
        adapter) sees it merged too; :func:`fused_lora.merge_lora` refuses that.

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
        """Let other layers merge into the weight again."""
        _merged_layers.discard(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a copy, or one unpickled
        if self.merged:
            _merged_layers.add(self)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight
            return
        # The adapter is part of the weight for good: saved beside it, it would count twice.
        destination[prefix + "lora_B"] = torch.zeros_like(self.lora_B)
        if self.use_dora:
            norm = torch.linalg.vector_norm(self.to_matrix(self.weight), dim=1)
            destination[prefix + "lora_magnitude_vector"] = norm.to(self.lora_B.dtype)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        keys = [prefix + name for name in ("weight", *self.adapter_parameters())]
        given = [key in state_dict for key in keys]
        plain = given[0] and not any(given[1:])
        if plain and (self._original_weight is not None or self.use_dora):
            kind = "DoRA" if self.use_dora else "PiSSA"
            error_msgs.append(
                f"expected {', '.join(keys)} together for a {kind} layer, whose adapter belongs to"
                f" its weight, got {keys[0]} alone; load a plain state before adapting"
            )
            return
        remerge = self.merged and any(given)
        if remerge and self._base_weight is None:
            own = {**self.adapter_parameters(), "weight": self.weight}
            fits = all(
                state_dict[prefix + name].shape == parameter.shape
                for name, parameter in own.items()
                if prefix + name in state_dict
            )
            if not all(given) or not fits:
                error_msgs.append(
                    f"expected the whole state of {prefix[:-1] or 'the layer'}, merged with"
                    f" keep_base=False, got {', '.join(keys)} only in part or in other shapes"
                )
                return
            self._forget_merge()
            remerge = False
        if remerge:
            self.unmerge()
        residual = self.weight.detach().clone() if self._original_weight is not None else None
        first_missing = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if plain:
            # The state of a plain layer: the adapter stays as it is.
            added = missing_keys[first_missing:]
            missing_keys[first_missing:] = [key for key in added if key not in keys]
        self._renew_scaling_tensor()
        if residual is not None and not _same(residual, self.weight):
            self.__dict__["_original_weight"] = None  # the state's base is another
        if remerge:
            if local_metadata.get("assign_to_params_buffers", False):
                # The weight is now the caller's tensor, which merging must not change.
                self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            self.merge()
