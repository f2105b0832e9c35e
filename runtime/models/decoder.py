"""The one model of the runtime: a decoder that its ModelConfig describes. Modules come filled from runtime.loader.

Shape suffixes: T tokens of the flat batch, K hidden channels, V vocabulary, N rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kv_compress.policy import KVPolicy
from runtime.cache import KVCache
from runtime.layers.attention import Attention
from runtime.layers.embedding import Embedding
from runtime.layers.norm import RMSNorm
from runtime.layers.rotary import Rotary
from runtime.layers.sparse import Packing
from runtime.models.config import ModelConfig
from runtime.ops.attention import AttentionBatch
from runtime.ops.pages import Pages


class Block(nn.Module):
    """One decoder layer. Gemma also norms what attention and feed-forward give (`after_*`)."""

    def __init__(
        self,
        before_attention: RMSNorm,
        attention: Attention,
        before_ffn: RMSNorm,
        ffn: nn.Module,
        *,
        after_attention: RMSNorm | None = None,
        after_ffn: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.before_attention = before_attention
        self.attention = attention
        self.after_attention = after_attention
        self.before_ffn = before_ffn
        self.ffn = ffn
        self.after_ffn = after_ffn

    def forward(
        self,
        x_TK: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        pages: tuple[Pages, Pages],
    ) -> Tensor:
        y_TK = self.attention(self.before_attention(x_TK), rotation, batch, *pages)
        x_TK = x_TK + (y_TK if self.after_attention is None else self.after_attention(y_TK))
        y_TK = self.ffn(self.before_ffn(x_TK))
        return x_TK + (y_TK if self.after_ffn is None else self.after_ffn(y_TK))


class Decoder(nn.Module):
    """Token ids to logits over paged keys and values. In `exact` numerics everything is fp32, and the bits of a row
    depend on its own sequence alone, neither on the rest of the batch nor on how its prompt was cut into chunks.
    `kv_policy`: how caches for this model keep keys and values; None: as they are."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: nn.Module,
        *,
        numerics: Literal["exact", "fast"],
        dtype: torch.dtype,
        device: str,
        kv_policy: KVPolicy | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.kv_policy = kv_policy
        self.numerics = numerics
        self.dtype = dtype
        self.device = device
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        kinds = [(layer.rope, layer.head_dim) for layer in config.layers]
        distinct = list(dict.fromkeys(kinds))
        self.rotaries = nn.ModuleList(Rotary(rope, head_dim, device) for rope, head_dim in distinct)
        self.rotary_of_layer = [distinct.index(kind) for kind in kinds]

    @torch.inference_mode()
    def forward(self, ids_T: Tensor, batch: AttentionBatch, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        """fp32 logits [N, V] of the flat batch's `rows` (all of them: None); this step's keys and values are stored."""
        x_TK = self.hidden(ids_T, batch, cache)
        return self.logits(x_TK if rows is None else x_TK[rows])

    @torch.inference_mode()
    def hidden(self, ids_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor:
        """What the last block gives [T, K]; this step's keys and values are stored."""
        rotations = [rotary(batch.position_T) for rotary in self.rotaries]
        x_TK = self.embedding(ids_T)
        for block, kind, pages in zip(self.blocks, self.rotary_of_layer, cache.layers(), strict=True):
            x_TK = block(x_TK, rotations[kind], batch, pages)
        return x_TK

    @torch.inference_mode()
    def logits(self, x_NK: Tensor) -> Tensor:
        """fp32 logits [N, V] of rows that `hidden` gave."""
        return self.capped(self.head(self.norm(x_NK)).float())

    def capped(self, logits_NV: Tensor) -> Tensor:
        """Logits after the soft-cap, if the model has one."""
        softcap = self.config.logit_softcap
        return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)

    @property
    def capturable(self) -> bool:
        """Whether a step can be captured as a CUDA graph: routing to experts asks the device for numbers of rows."""
        return all(layer.experts is None for layer in self.config.layers)

    @property
    def slow_reasons(self) -> dict[str, str]:
        """Why layers have no fast path, by their place in the model."""
        reasons = {name: getattr(module, "slow_reason", "") for name, module in self.named_modules()}
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def packings(self) -> dict[str, Packing]:
        """What became of layers with zeros, by their place in the model; empty where nobody looked for them."""
        found = {name: getattr(module, "packing", None) for name, module in self.named_modules()}
        return {name: packing for name, packing in found.items() if packing is not None}
