"""Merging an adapter into its weight and back, and what a merged layer saves and loads."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..ops.modes import is_differentiated, without_autocast
from ..ops.validation import multiplies_itself
from .adapter import AdapterLayer
from .offload import offload_hook, stored, with_values

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


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``tensor`` is finite after a cast to ``dtype``; alike on all ranks of a mesh."""
    local = tensor.to_local() if sharding.is_shard(tensor) else tensor
    # Rounding is monotonic, so the extremes decide; they contain NaN if the tensor does.
    extremes = torch.stack(local.aminmax()).to(dtype) if local.numel() else local.new_zeros(1)
    return not sharding.anywhere(not extremes.isfinite().all(), tensor)


class MergeableLayer(AdapterLayer):
    """The merging part of :class:`.base.LoRALayer`, which documents the attributes.

    ``_base_weight`` is the base weight while merged; ``_original_weight`` is the weight that a
    PiSSA layer was split from.
    """

    def plain_weight(self) -> Tensor:
        """The weight for a forward without the adapter's branch: merged, or disabled.

        Raises:
            RuntimeError: disabled, and there is no base weight, it has another shape, or a weight
                that a caller gives and differentiates would not be used.
        """
        if not self.enabled:
            self.check_base()
            if self.merged or self.init == "pissa":
                self._check_same_shape()
                self._check_constant()
        weight = self.weight if self.enabled else self.base_weight
        if weight.device != self.weight.device:
            weight = weight.to(self.weight.device)  # the base of an offloaded layer
        # A base kept as a shard is gathered while FSDP has gathered the layer.
        return sharding.like(weight, self.weight)

    def _check_constant(self) -> None:
        """Check that nobody differentiates ``weight``, on which the base weight does not depend.

        Raises:
            RuntimeError: it is computed from tensors that are differentiated.
        """
        weight = self.weight
        if isinstance(weight, nn.Parameter) and not weight.requires_grad:
            return
        if is_differentiated(weight) and not sharding.is_flat_view(self, weight):
            kind = "merged" if self.merged else "PiSSA"
            raise RuntimeError(
                f"expected a weight without gradient for a disabled {kind} layer, which computes"
                " with the base weight kept aside and would drop the gradient, got one that"
                " requires it (from torch.func.functional_call or a parametrization): enable the"
                " adapter, or detach the weight"
            )

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
    @with_values
    def merge(self, keep_base: bool = True) -> None:
        """Add the adapter to the weight, in place, computed in float32 (float64 for float64).

        The base weight is kept aside, on the same device, for ``unmerge``; ``keep_base=False``
        frees it and makes the merge final. Other users of the weight (a tied module, another
        adapter) then see the merged weight; :func:`fused_lora.merge_lora` refuses to do that.

        Raises:
            RuntimeError: already merged, or another layer has merged into the same weight.
            TypeError: the weight is not a Parameter, so that it cannot be written, or is quantised.
            ValueError: weight or adapter have no values (meta), or the merged weight would contain
                NaN or infinity, because it overflows or because they do. The layer is then
                unchanged.
        """
        self.check_mergeable()
        sharding.reshard(self)
        matrix = self._adapted_matrix()
        self._check_finite(matrix)
        with torch.inference_mode(False), torch.no_grad():
            base = self.weight.detach().clone()
            if offload_hook(self) is not None:
                base = base.cpu()  # the device has room for the loaded layer only
        self.weight.copy_(self.from_matrix(matrix))
        self._base_weight = base if keep_base else None
        self.merged = True
        _merged_layers.add(self)

    def _adapted_matrix(self) -> Tensor:
        """``W + s·B A``, with DoRA scaled to its magnitude; ``(out, in)``, at least float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(self.weight):
            matrix = self.lora_B.to(wide).flatten(1) @ self.lora_A.to(wide).flatten(1)
        weight = self.to_matrix(self.weight)
        matrix = sharding.like(matrix, weight).mul_(self.scaling).add_(weight)
        if self.use_dora:
            norm = torch.linalg.vector_norm(matrix, dim=1)
            matrix.mul_((self.lora_magnitude_vector.to(wide) / norm).unsqueeze(1))
        return matrix

    @torch.no_grad()
    @with_values
    def check_finite(self) -> None:
        """Raise the ValueError that ``merge`` would; cheaper than merging in most cases."""
        sharding.reshard(self)
        weight = self.weight
        if not (weight.is_meta or self.use_dora or sharding.is_shard(weight)) and weight.numel():
            wide = torch.promote_types(weight.dtype, torch.float32)
            A, B = self.lora_A.to(wide).flatten(1), self.lora_B.to(wide).flatten(1)
            columns = torch.linalg.vector_norm(A, dim=0).amax()
            rows = torch.linalg.vector_norm(B, dim=1).amax()
            low, high = weight.aminmax()
            # By Cauchy-Schwarz; NaN compares as False.
            bound = torch.maximum(high, -low).to(wide) + abs(self.scaling) * columns * rows
            if bound < 0.99 * torch.finfo(weight.dtype).max:
                return
        self._check_finite(self._adapted_matrix())

    def _check_finite(self, matrix: Tensor) -> None:
        """Check that ``matrix`` is finite in the weight's dtype.

        Raises:
            ValueError: it is not; with the reason.
        """
        dtype = self.weight.dtype
        if matrix.is_meta or _is_finite(matrix, dtype):
            return
        for name, tensor in {"weight": self.weight, **self.adapter_parameters()}.items():
            if not _is_finite(tensor, tensor.dtype):
                raise ValueError(
                    f"expected finite values to merge, got NaN or infinity in {name}: restore it,"
                    " or keep the adapter unmerged"
                )
        zero = " (or that DoRA computes of a row of zeros)" if self.use_dora else ""
        wider = "model.float() or model.bfloat16()" if dtype == torch.float16 else "model.double()"
        raise ValueError(
            f"expected a merged weight within the range of {str(dtype).removeprefix('torch.')},"
            f" ±{torch.finfo(dtype).max:g}, got one that exceeds it{zero}: call {wider} before"
            " merging, or keep the adapter unmerged"
        )

    @torch.no_grad()
    @with_values
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises:
            RuntimeError: not merged, merged with ``keep_base=False``, or resized since.
            TypeError: the weight was quantised since.
        """
        self.check_restorable()
        sharding.reshard(self)
        self.weight.copy_(self._base_weight)
        self._forget_merge()

    def check_restorable(self) -> None:
        """Raise the error that ``unmerge`` would."""
        if not self.merged:
            raise RuntimeError("expected a merged layer, got one that is not merged")
        if self._base_weight is None:
            raise RuntimeError(
                "expected a base weight to restore, got a layer merged with keep_base=False"
            )
        if multiplies_itself(self.weight):
            raise TypeError(
                f"expected a plain weight to restore, got a {type(self.weight).__name__}: the"
                " merged layer was quantised; unload_lora keeps it as it is, and unmerging before"
                " quantising keeps the adapter beside it"
            )
        sharding.check_gathered(self.weight)
        self._check_same_shape()

    def _check_same_shape(self) -> None:
        """Check that other code did not resize the weight while its base was kept aside.

        Raises:
            RuntimeError: it did.
        """
        base, weight = self.base_weight, self.weight
        if base.shape != weight.shape and base.dim() == weight.dim():  # FSDP1's pieces are 1-D
            kind = "merged" if self.merged else "PiSSA"
            cure = (
                "unload_lora keeps it as it is"
                if self.merged
                else "resize the layer before it is adapted"
            )
            raise RuntimeError(
                f"expected a base weight of shape {tuple(weight.shape)} to restore, got"
                f" {tuple(base.shape)}: the {kind} layer was resized; {cure}"
            )

    def check_mergeable(self) -> None:
        """Raise the error that ``merge`` would."""
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got one that is merged already")
        if not isinstance(self.weight, nn.Parameter):
            raise TypeError("expected weight to be a Parameter, got one computed or sharded")
        if multiplies_itself(self.weight):
            raise TypeError(
                f"expected a plain weight to merge into, got a {type(self.weight).__name__}, which"
                " cannot hold the sum exactly: save_adapter, then load_adapter and merge in a model"
                " with plain weights; or keep the adapter beside it"
            )
        self.check_values()
        sharding.check_gathered(self.weight, self.lora_A)
        own = memory(stored(self, "weight"))
        if any(x.merged and overlap(memory(stored(x, "weight")), own) for x in _merged_layers):
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
            try:
                self._check_same_shape()
            except RuntimeError as error:
                raise RuntimeError(f"{prefix[:-1] or 'the layer'}: {error}") from error
            destination[prefix + "weight"] = self._base_weight
            return
        # The saved weight contains the adapter: B = 0, so that loading does not add it twice.
        destination[prefix + "lora_B"] = torch.zeros_like(self.lora_B)
        if self.use_dora:
            norm = torch.linalg.vector_norm(self.to_matrix(self.weight), dim=1)
            destination[prefix + "lora_magnitude_vector"] = norm.to(self.lora_B.dtype)

    @with_values
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        self._leave_meta()
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
        self._leave_meta()  # an adapter that the state does not hold
        self._write_scale(self.scaling)  # on the device of a weight that was assigned
        if residual is not None and not _same(residual, self.weight):
            self.__dict__["_original_weight"] = None  # the state was split from another weight
        if remerge:
            if local_metadata.get("assign_to_params_buffers", False):
                # The weight is now the caller's tensor, which merging must not change.
                self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            try:
                self.merge()
            except ValueError as error:  # the loaded values overflow
                error_msgs.append(f"{prefix[:-1] or 'the layer'}, now unmerged: {error}")

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
        if not state:
            return None
        if self._original_weight is not None and multiplies_itself(self.weight):
            return (
                f"expected a plain weight of {prefix[:-1] or 'the layer'}, whose PiSSA adapter"
                f" belongs to it, got a {type(self.weight).__name__}: load the state before the"
                " model is quantised"
            )
        if not self.merged:
            return None
        if self._base_weight is not None:
            try:
                self.check_restorable()
            except (RuntimeError, TypeError) as error:
                return f"{prefix[:-1] or 'the layer'}: {error}"
            return None
        own = {"weight": self.weight, **parameters}
        if {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in own.items()}:
            return None
        return (
            f"expected the whole state of {prefix[:-1] or 'the layer'}, merged with"
            f" keep_base=False, got {keys} only in part or in other shapes"
        )
