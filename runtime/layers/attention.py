"""Self-attention of one layer over paged keys and values.

Shape suffixes: T tokens of the flat batch, K hidden channels, H query heads, G key-value heads, D channels of a head.
"""

from __future__ import annotations

from torch import Tensor, nn

from runtime.layers.merged import Merged
from runtime.layers.norm import RMSNorm
from runtime.models.config import LayerConfig
from runtime.ops.attention import AttentionBatch, paged_attention
from runtime.ops.attention_by_head import store_and_attend
from runtime.ops.kv_store import store_kv
from runtime.ops.pages import Pages, turned
from runtime.ops.rotary import apply_rotary


class Attention(nn.Module):
    """Projections, norms of queries and keys where the family has them, rotation, cache, attention, output."""

    def __init__(
        self,
        config: LayerConfig,
        qkv: Merged,
        output: nn.Module,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        softcap: float | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.qkv = qkv
        self.output = output
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.softcap = softcap
        self.exact = exact

    def forward(
        self,
        x_TK: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        k_pages: Pages,
        v_pages: Pages,
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; stores this step's keys (rotated) and values in the pages."""
        layer, tokens = self.config, x_TK.shape[0]
        q, k, v = self.qkv(x_TK)
        q_THD = q.reshape(tokens, layer.heads, layer.head_dim)
        k_TGD = k.reshape(tokens, layer.kv_heads, layer.head_dim)
        v_TGD = v.reshape(tokens, layer.kv_heads, layer.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        q_THD, k_TGD = apply_rotary(q_THD, k_TGD, *rotation)
        if k_pages.rotate:
            q_THD, k_TGD = turned(q_THD), turned(k_TGD)
        v_TGD = turned(v_TGD) if v_pages.rotate else v_TGD
        how = {"scale": layer.scale, "window": layer.window, "softcap": self.softcap, "exact": self.exact}
        if batch.by_head is None:
            store_kv(k_TGD, v_TGD, k_pages, v_pages, batch.slot_T)
            y_THD = paged_attention(q_THD, k_pages, v_pages, batch, **how)
        else:
            y_THD = store_and_attend(q_THD, k_TGD, v_TGD, k_pages, v_pages, batch.by_head, **how)
        if batch.after_attention is not None:
            batch.after_attention(turned(q_THD) if k_pages.rotate else q_THD)
        if v_pages.rotate:
            y_THD = turned(y_THD)
        return self.output(y_THD.reshape(tokens, layer.heads * layer.head_dim))
