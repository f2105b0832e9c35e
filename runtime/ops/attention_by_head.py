"""Keys and values of a step stored and attended to, where sequences have tables for each layer and head.

Each such sequence and key-value head goes through the ordinary operations as a sequence of its own with one head, over
pages of single heads. Scales of fp8 are those of the head whose content it is, wherever it lies: they go to keys and
values before they are stored, to queries and to results.

Shape suffixes: T tokens of the flat batch, M those of a part, H query heads, G key-value heads, R = H / G, D channels
of a head, A tokens times key-value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.native import attention as native
from runtime.ops.attention import paged_attention
from runtime.ops.backend import uses_native
from runtime.ops.head_batch import HeadBatch, HeadLayer, Seated
from runtime.ops.head_pages import HeadPages
from runtime.ops.kv_store import store_kv
from runtime.ops.pages import Pages


def store_and_attend(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    k: Pages,
    v: Pages,
    batch: HeadBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    exact: bool,
) -> Tensor:
    """`store_kv` and `paged_attention` of a step."""
    if k.heads is None or v.heads is None:
        raise ValueError("these pages are not pages of single heads, too")
    heads = k.heads, v.heads
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    how = {"scale": scale, "window": window, "softcap": softcap, "exact": exact}
    parts = [(part, part.layer(k.heads.layer)) for part in batch.parts]
    if batch.whole is not None:  # all is stored before anything is read: rows of a step may read each other's pages
        at_T = batch.whole_T
        store_kv(k_TGD[at_T], v_TGD[at_T], k, v, batch.whole.slot_T)
    for part, layer in parts:
        k_AD, v_AD = (_of_heads(x[part.token_M], pages, divide=True) for x, pages in ((k_TGD, k), (v_TGD, v)))
        store_kv(k_AD[:, None], v_AD[:, None], k.heads, v.heads, layer.row_A)
    if batch.whole is not None:
        out_THD[batch.whole_T] = paged_attention(q_THD[batch.whole_T], k, v, batch.whole, **how)
    for part, layer in parts:
        out_THD[part.token_M] = _attend(q_THD[part.token_M], k, v, *heads, part, layer, **how)
    return out_THD


def _attend(
    q_MHD: Tensor,
    k: Pages,
    v: Pages,
    k_heads: HeadPages,
    v_heads: HeadPages,
    part: Seated,
    layer: HeadLayer,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    exact: bool,
) -> Tensor:
    tokens, heads, width = q_MHD.shape
    groups = k.groups
    q_ARD = _of_heads(q_MHD.view(tokens, groups, -1, width), k).view(tokens * groups, heads // groups, width)
    if part.order_A is not None:
        q_ARD = q_ARD[part.order_A]
    if part.few and not exact and uses_native(q_ARD) and native.takes(q_ARD, k_heads, v_heads):
        y_ARD = _compiled(q_ARD, k_heads, v_heads, part, layer, scale, window, softcap)
    else:
        batch = part.batch(layer)
        y_ARD = paged_attention(
            q_ARD, k_heads, v_heads, batch, scale=scale, window=window, softcap=softcap, exact=exact
        )
    if part.order_A is not None:
        y_ARD = torch.empty_like(y_ARD).index_copy_(0, part.order_A, y_ARD)
    return _of_heads(y_ARD.view(tokens, groups, -1, width), v).view(tokens, heads, width)


def _compiled(
    q_ARD: Tensor,
    k: HeadPages,
    v: HeadPages,
    part: Seated,
    layer: HeadLayer,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Every query as one of a decode."""
    end_A = layer.own_A + 1
    first_A = torch.zeros(len(end_A), dtype=torch.int32)
    if window is not None:
        first_A = torch.from_numpy((end_A - window).clip(0)).int()
    line_A = layer.line if part.order_A is None else layer.line[part.owner_A]
    decodes = native.Decodes(
        row_N=torch.arange(len(end_A)),
        first_N=first_A,
        end_N=torch.from_numpy(end_A).int(),
        table_NP=torch.from_numpy(part.tables),
        slots=int(end_A.sum()) - int(first_A.sum()),
        line_N=torch.from_numpy(line_A),
    )
    out_ARD = torch.empty(q_ARD.shape)
    native.decode(out_ARD, q_ARD.contiguous(), k, v, decodes, scale, softcap)
    return out_ARD


def _of_heads(x: Tensor, pages: Pages, *, divide: bool = False) -> Tensor:
    """x [M, G, …, D] times the scale of its head, or divided by it and by token and head [A, D]."""
    if pages.scale_G is not None:
        scale_G = pages.scale_G.view(1, -1, *[1] * (x.dim() - 2))
        x = x.float() / scale_G if divide else (x * scale_G).to(x.dtype)
    return x.reshape(-1, x.shape[-1]) if divide else x
