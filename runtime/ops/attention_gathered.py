"""Fast paged attention where there is no Triton: gather a sequence's slots, then `scaled_dot_product_attention`.

Decodes and short chunks in fp32 on a CPU go through a C kernel, if there is a compiler. Else decodes of similar length
are padded and done together, the heads of a group as the query rows of one product: without that a CPU spends its time
on starting operations, and on reading keys once per head. Long chunks are done one sequence at a time and, where a mask
is needed, in tiles of queries, so that memory stays linear in length.

Shape suffixes: T tokens, H query heads, G key-value heads, R heads per group (H / G), D head width, P pages, B slots of
a page, N sequences that decode together, Q queries of a tile, K keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from runtime.native import attention as native
from runtime.ops.backend import uses_native
from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages

_FEW_QUERIES = 8  # of a chunk that goes through the kernel, one query at a time …
_FEW_SCORES = 1 << 13  # … or queries times keys
_MASKED_QUERIES = 512  # rows of a tile that needs a mask
_SCORES = 1 << 22  # scores held at once where a soft-cap forbids the fused product
_GATHERED = 3 << 18  # numbers of keys of decodes that are gathered at once: they should stay in a cache
_SIMILAR = 0.75  # decodes go together if the shortest has at least this share of the longest's keys …
_SHORT = 64  # … or misses fewer keys than this


@dataclass(frozen=True)
class _Padded:
    """Decodes, padded to the same number of keys."""

    row_N: torch.Tensor
    slot_NK: torch.Tensor
    visible_N11K: torch.Tensor | None  # None: all of them


@dataclass(frozen=True)
class _Chunk:
    """Several queries of one sequence: flat rows start … end - 1; its keys begin at slot `first`."""

    start: int
    end: int
    slot: int  # of the first query
    first: int
    slot_K: torch.Tensor


def attend_gathered(
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`paged_attention`, as fast as it gets here; rows may depend on their neighbours in the last bits."""
    block, groups, width = k.block, k.groups, k.width
    compiled = uses_native(q_THD) and native.takes(q_THD, k, v)
    key = "gathered", block, groups * width, window, compiled
    if key not in batch.plans:
        single = [s for s in range(len(batch.kv_len)) if _queries(batch, s) == 1]
        direct = [s for s in range(len(batch.kv_len)) if compiled and _is_short(batch, s, window)]
        decodes = (
            _compiled_rows(batch, direct, window)
            if compiled
            else _padded_decodes(batch, single, block, groups * width, window)
        )
        rest = set(range(len(batch.kv_len))) - set(direct or single)
        batch.plans[key] = [*decodes, *_chunks(batch, sorted(rest), block, window)]
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    for part in batch.plans[key]:
        if isinstance(part, native.Decodes):
            native.decode(out_THD, q_THD, k, v, part, scale, softcap)
        elif isinstance(part, _Padded):
            _attend_padded(out_THD, q_THD, k, v, part, scale, softcap)
        else:
            _attend_chunk(out_THD, q_THD, k, v, part, scale, window, softcap)
    return out_THD


def _visible(batch: AttentionBatch, sequence: int, window: int | None) -> tuple[int, int]:
    """The slots that some query of a sequence sees: first, end."""
    start, end = batch.starts[sequence : sequence + 2]
    first = 0 if window is None else max(0, batch.indices[start] - window + 1)
    return first, min(batch.kv_len[sequence], batch.indices[end - 1] + 1)


def _queries(batch: AttentionBatch, sequence: int) -> int:
    return batch.starts[sequence + 1] - batch.starts[sequence]


def _is_short(batch: AttentionBatch, sequence: int, window: int | None) -> bool:
    first, end = _visible(batch, sequence, window)
    queries = _queries(batch, sequence)
    return queries <= _FEW_QUERIES or queries * (end - first) <= _FEW_SCORES


def _compiled_rows(batch: AttentionBatch, direct: list[int], window: int | None) -> Iterator[native.Decodes]:
    """Every query of these sequences as one of a decode: its own row, and the slots that it sees."""
    rows = [(s, row, batch.indices[row]) for s in direct for row in range(*batch.starts[s : s + 2])]
    if rows:
        first = [0 if window is None else max(0, slot - window + 1) for _, _, slot in rows]
        end = [min(batch.kv_len[s], slot + 1) for s, _, slot in rows]
        sequence_N = torch.tensor([s for s, _, _ in rows])
        yield native.Decodes(
            row_N=torch.tensor([row for _, row, _ in rows]),
            first_N=torch.tensor(first, dtype=torch.int32),
            end_N=torch.tensor(end, dtype=torch.int32),
            table_NP=batch.table_SP[sequence_N],
            slots=sum(end) - sum(first),
            coded_N=None if batch.coded_S is None else batch.coded_S[sequence_N],
            sinks=0 if batch.frames is None else batch.frames.sinks,
        )


def _padded_decodes(
    batch: AttentionBatch, single: list[int], block: int, width: int, window: int | None
) -> Iterator[_Padded]:
    """Decodes of similar length together; a key is `width` numbers of all heads."""
    ranges = {s: _visible(batch, s, window) for s in single}
    keys = {s: end - first for s, (first, end) in ranges.items()}
    single = sorted(single, key=lambda s: -keys[s])
    while single:
        most = keys[single[0]]
        least = min(most * _SIMILAR, most - _SHORT)
        limit = max(1, _GATHERED // (most * width))
        together = [s for s in single[:limit] if keys[s] >= least]
        single = single[len(together) :]
        yield _padded(batch, together, [ranges[s] for s in together], block)


def _padded(batch: AttentionBatch, together: list[int], ranges: list[tuple[int, int]], block: int) -> _Padded:
    device = batch.table_SP.device
    sequence_N = torch.tensor(together, device=device)
    first_N1, end_N1 = torch.tensor(ranges, device=device).T[:, :, None]
    most = max(end - first for first, end in ranges)
    index_NK = first_N1 + torch.arange(most, device=device)
    inside_NK = index_NK < end_N1
    index_NK = torch.minimum(index_NK, end_N1 - 1)  # padding repeats the sequence's own last slot: finite, then masked
    even = all(end - first == most for first, end in ranges)
    return _Padded(
        row_N=batch.starts_S1[sequence_N].long(),
        slot_NK=batch.pool_slots(sequence_N, index_NK, block),
        visible_N11K=None if even else inside_NK[:, None, None, :],
    )


def _chunks(batch: AttentionBatch, sequences: list[int], block: int, window: int | None) -> Iterator[_Chunk]:
    for sequence in sequences:
        start, end = batch.starts[sequence : sequence + 2]
        first, stop = _visible(batch, sequence, window)
        device = batch.table_SP.device
        index_1K = torch.arange(first, stop, device=device)[None]
        slot_K = batch.pool_slots(torch.tensor([sequence], device=device), index_1K, block)[0]
        yield _Chunk(start, end, batch.indices[start], first, slot_K)


def _gather(pages: Pages, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = pages.read(slots.reshape(-1)).to(dtype)
    return rows.view(*slots.shape, *rows.shape[1:])


def _attend_padded(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    part: _Padded,
    scale: float,
    softcap: float | None,
) -> None:
    heads, width = q_THD.shape[1:]
    groups = k.groups
    k_NGKD = _gather(k, part.slot_NK, q_THD.dtype).transpose(1, 2)
    v_NGKD = _gather(v, part.slot_NK, q_THD.dtype).transpose(1, 2)
    q_NGRD = q_THD[part.row_N].view(-1, groups, heads // groups, width)
    out_NGRD = _attend(q_NGRD, k_NGKD, v_NGKD, part.visible_N11K, scale, softcap)
    out_THD[part.row_N] = out_NGRD.reshape(-1, heads, width)


def _attend_chunk(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    part: _Chunk,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    groups = k.groups
    queries, heads, width = part.end - part.start, *q_THD.shape[1:]
    q_GRQD = q_THD[part.start : part.end].view(queries, groups, heads // groups, width).permute(1, 2, 0, 3)
    k_G1KD, v_G1KD = (_gather(pages, part.slot_K, q_THD.dtype).transpose(0, 1)[:, None] for pages in (k, v))
    keys = k_G1KD.shape[2]
    out_QGRD = out_THD[part.start : part.end].view(queries, groups, heads // groups, width)
    if softcap is None and queries == keys and (window is None or keys <= window):
        k_GRKD, v_GRKD = (x.expand(-1, heads // groups, -1, -1) for x in (k_G1KD, v_G1KD))
        out_GRQD = scaled_dot_product_attention(q_GRQD, k_GRKD, v_GRKD, is_causal=True, scale=scale)
        out_QGRD.copy_(out_GRQD.permute(2, 0, 1, 3))
        return
    rows = _MASKED_QUERIES if softcap is None else max(1, min(_MASKED_QUERIES, _SCORES // (heads * keys)))
    for at in range(0, queries, rows):
        slot_Q = part.slot + torch.arange(at, min(at + rows, queries), device=q_THD.device)
        last = part.slot + at + len(slot_Q)
        low = 0 if window is None else max(0, part.slot + at - window + 1 - part.first)
        high = last - part.first
        ahead_QK = slot_Q[:, None] - (part.first + torch.arange(low, high, device=q_THD.device))
        visible_QK = (ahead_QK >= 0) if window is None else (ahead_QK >= 0) & (ahead_QK < window)
        out_GRQD = _attend(
            q_GRQD[:, :, at : at + rows], k_G1KD[:, :, low:high], v_G1KD[:, :, low:high], visible_QK, scale, softcap
        )
        out_QGRD[at : at + rows] = out_GRQD.permute(2, 0, 1, 3)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of 4-D tensors whose two leading dimensions broadcast."""
    if softcap is None:
        shared = (-1, q.shape[1], -1, -1)
        return scaled_dot_product_attention(q, k.expand(shared), v.expand(shared), attn_mask=visible, scale=scale)
    score = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    if visible is not None:
        score = score.masked_fill_(~visible, float("-inf"))
    return torch.softmax(score, dim=-1) @ v
