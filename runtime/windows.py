"""Whole windows of text through a model at once, with no engine: logits as its policy for keys and values leaves them.

Shape suffixes: B windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_compress._coded_pages import CodingPoints
from runtime.cache import KVCache
from runtime.frames import FrameCache
from runtime.models.decoder import Decoder
from runtime.ops.batch import AttentionBatch


def pages_for_window(points: CodingPoints | None, length: int, block: int) -> int:
    """Pages that `window_logits` wants for each window; `points`: where pages are coded, if they are."""
    return -(-length // block) + (0 if points is None else points.coded(length))


def window_logits(model: Decoder, cache: KVCache | FrameCache, ids_BT: Tensor) -> Tensor:
    """fp32 logits [B, T, V]. The cache has `pages_for_window` pages for each; nothing in them is kept.

    Where whole pages are coded, windows go from point to point, so that each token sees what it would in an engine.
    """
    count, length = ids_BT.shape
    points, block = cache.points, cache.block_size
    each, full = pages_for_window(points, length, block), -(-length // block)
    tables = [list(range(row * each, row * each + full)) for row in range(count)]
    parts: list[Tensor] = []
    start = passed = 0
    while start < length:
        end = length if points is None else min(points.position(passed + 1), length)
        slots = start if points is None else points.slots(start)
        batch = AttentionBatch.build(
            [start] * count, [end - start] * count, [slots] * count, tables, block_size=block,
            device=ids_BT.device, frames=cache.frames,
        )  # fmt: skip
        parts.append(model(ids_BT[:, start:end].reshape(-1), batch, cache, None).view(count, end - start, -1))
        if isinstance(cache, FrameCache) and cache.points.passed(end) > passed:
            entries, together = cache.points.sources(passed), cache.points.together
            for row, table in enumerate(tables):
                first = row * each + full + passed * together
                target = range(first, first + together)
                cache.code_pages(table[entries.start : entries.stop], target)
                table[entries.start : entries.stop] = target
            passed += 1
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
