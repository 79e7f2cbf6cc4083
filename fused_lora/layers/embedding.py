"""``nn.Embedding`` with a LoRA adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.sharding import is_shard
from ..ops.reference import add_scaled
from .base import LoRALayer
from .config import AdapterConfig


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """A frozen ``nn.Embedding`` with an adapter: ``y = W[i] + s·(A[:, i])ᵀ Bᵀ``.

    Indices ``(...)`` give ``(..., embedding_dim)``.
    Computed in plain PyTorch: a look-up of ``rank`` numbers per index and a thin product. As in
    PEFT there is no dropout; ``lora_A`` starts at zero and ``lora_B`` with normal random values.
    The sum is computed in the wider of the weight's and the adapter's dtypes and returned in the
    weight's.

    Created by :meth:`from_embedding`. Attributes as in :class:`fused_lora.FusedLoRALinear`, with
    ``lora_A (rank, num_embeddings)`` and ``lora_B (embedding_dim, rank)``.
    """

    no_kernel = "an embedding's adapter is a look-up and a thin product"

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        return nn.Embedding

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        adapter_dtype: torch.dtype | None = None,
        **hyperparameters,
    ) -> LoRAEmbedding:
        """Adapt ``embedding``; hyper-parameters as in ``FusedLoRALinear.from_linear``.

        Raises:
            TypeError: not exactly an ``nn.Embedding``.
            ValueError: an argument out of range, or ``max_norm``, with which forward rewrites the
                weight.
        """
        config = AdapterConfig(**hyperparameters)
        return cls.from_plain(embedding, config, adapter_dtype=adapter_dtype)

    @classmethod
    def check_plain(cls, base: nn.Module) -> None:
        super().check_plain(base)
        if base.max_norm is not None:
            raise ValueError(
                f"expected max_norm=None, got {base.max_norm}: it rewrites the frozen weight"
            )

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def _fill(self, init: str, lora_A: Tensor, lora_B: Tensor) -> None:
        # PEFT's start for every ``init``: A = 0, where the linear layers have B = 0.
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    def _compute(self, input: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            return self._look_up(input, self.plain_weight())
        weight, lora_A = self.weight, self.lora_A
        if weight.shape[0] != lora_A.shape[1]:  # transformers resizes an embedding in place
            self.check_fit()
        if lora_A.is_meta and not input.is_meta:
            self.check_values()
        base = self._look_up(input, weight)
        S = self._look_up(input, lora_A.t())
        if is_shard(S):
            S = S * 1  # sums over the mesh: the reshape within F.linear would misplace its mask
        return add_scaled(base, F.linear(S, self.lora_B), self._scale())

    def _look_up(self, indices: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            indices,
            table,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
