"""Attention over a paged cache: grouped queries, sliding window, soft-cap, prefill chunks and decodes in one batch.

Paged attention: Kwon et al., 2023, arXiv:2309.06180. Running max and sum: Milakov and Gimelshein, 2018,
arXiv:1805.02867; Dao et al., 2022, arXiv:2205.14135.

Shape suffixes: T tokens of the flat batch, H query heads, D head width.
"""

import torch

from runtime.ops.attention_gathered import attend_gathered
from runtime.ops.attention_tiled import attend_tiled
from runtime.ops.backend import uses_triton
from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages, as_pages

__all__ = ["AttentionBatch", "paged_attention"]


def paged_attention(
    q_THD: torch.Tensor,
    k: torch.Tensor | Pages,
    v: torch.Tensor | Pages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """softmax(scale * q kᵀ) v of each token over its sequence's keys in its own or an earlier slot: [T, H, D].

    This step's keys and values must be in the pages already (`store_kv`); plain tensors [P, B, G, D] are pages, too.
    Query head h reads key-value head h // (H / G). `window` w: a query in slot p sees keys in slots p - w < … <= p.
    `softcap` c: scores are c * tanh(score / c). `exact`: fp32 in fixed tiles, so that a row's result depends, to the
    bit, neither on the rest of the batch nor on how its prompt was cut into chunks. Pages may hold anything outside a
    sequence's slots, NaN too.
    """
    k, v = as_pages(k), as_pages(v)
    if exact:
        return attend_tiled(q_THD, k, v, batch, scale=scale, window=window, softcap=softcap)
    if uses_triton(q_THD):
        from runtime.ops.triton import attention, attention_frames

        if batch.frames is None:
            return attention.attend(q_THD, k, v, batch, scale=scale, window=window, softcap=softcap)
        if attention_frames.takes(k, v):
            return attention_frames.attend(q_THD, k, v, batch, scale=scale, window=window, softcap=softcap)
    return attend_gathered(q_THD, k, v, batch, scale=scale, window=window, softcap=softcap)
