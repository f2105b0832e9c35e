"""Evictions that leave unequal numbers of slots: what stays moves into tables of each layer and head.

Slots are scored and read layer by layer as the model goes, right after a layer's attention. What stays is put aside and
written once all layers are read: it may go to pages of another layer or head, of the sequence's own that held what is
evicted. Each sequence is done alone, so what stays does not depend on the rest of the batch.

Shape suffixes: T tokens of the flat batch, H query heads, G key-value heads, D channels of a head, W observed queries,
S slots, K slots that stay, N layers times heads, I pages of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from kv_compress._scores import Observed, scorer
from kv_compress.adakv import keep_among
from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages, turned
from runtime.step import Compression, Step

if TYPE_CHECKING:
    from kv_compress.eviction import EvictionSettings
    from runtime.cache import KVCache
    from runtime.groups import GroupPool
    from runtime.models.decoder import Decoder


@dataclass(eq=False)
class _Work:
    """One eviction: the rows of its queries, the position of the next token; what was put aside so far."""

    done: Compression
    queries: range
    position: int
    length_N: np.ndarray
    counts: list[int] = field(default_factory=list)
    aside: list[list[Tensor]] = field(default_factory=list)  # by layer, keys and values as they are stored


class HeadCompactor:
    """Evicts from a cache whose layers lie one after another. `counts`: of the last step, by sequence, how many slots
    stayed in each layer and head."""

    def __init__(
        self,
        cache: KVCache,
        settings: EvictionSettings,
        frequencies: Sequence[Tensor],
        scales: Sequence[float],
        softcap: float | None,
    ) -> None:
        self.counts: dict[int, tuple[int, ...]] = {}
        self.adds_up = False  # no method that keeps unequal numbers looks at all steps
        self._cache = cache
        self._score = scorer(settings.method)
        self._share = settings.alpha_safeguard if settings.method == "adakv" else 1.0
        self._protected = settings.sinks, settings.recent
        self._frequencies = frequencies
        self._scales = scales
        self._softcap = softcap

    @classmethod
    def of(cls, model: Decoder, cache: KVCache, settings: EvictionSettings) -> HeadCompactor:
        """For a model. UsageError where a layer's sliding window is longer than the tokens that always stay."""
        settings.require_windows(layer.window for layer in model.config.layers)
        return cls(
            cache,
            settings,
            [cast(Tensor, model.rotaries[kind].frequency_F) for kind in model.rotary_of_layer],
            [layer.scale for layer in model.config.layers],
            model.config.attention_softcap,
        )

    def begin(self, step: Step, batch: AttentionBatch) -> Callable[[Tensor], None]:
        """What is to be called with the rotated queries [T, H, D] of each layer in turn, after its attention."""
        groups = step.groups
        if groups is None:
            raise ValueError("a step without tables of layers and heads")
        index = {row.sequence: at for at, row in enumerate(step.rows)}
        works = [self._work(done, step, index[done.sequence], batch, groups) for done in step.compressions]
        layers = iter(range(len(self._scales)))
        self.counts = {}

        def after_attention(q_THD: Tensor) -> None:
            layer = next(layers)
            for work in works:
                self._put_aside(layer, work, q_THD, groups)
            if layer == len(self._scales) - 1:
                for work in works:
                    self._write(work, groups)

        return after_attention

    def _work(self, done: Compression, step: Step, at: int, batch: AttentionBatch, groups: GroupPool) -> _Work:
        row, end = step.rows[at], batch.starts[at + 1]
        length_N = np.full(groups.columns, done.slots)
        if not done.source:
            length_N = groups.lengths[done.seat] + len(row.tokens)
        return _Work(done, range(end - done.queries, end), row.start + len(row.tokens), length_N)

    def _put_aside(self, layer: int, work: _Work, q_THD: Tensor, groups: GroupPool) -> None:
        k, v = self._cache.of_layer(layer)
        rows = [self._rows(layer, head, work, groups).to(q_THD.device) for head in range(groups.heads)]
        q_HWD = q_THD[work.queries.start : work.queries.stop].float().transpose(0, 1)
        scores = self._scores(layer, work, rows, k, v, q_HWD)
        kept = keep_among(scores, work.done.budgets[layer], self._protected, self._share)
        work.counts += [len(kept_K) for kept_K in kept]
        row_K = torch.cat([row_S[kept_K] for row_S, kept_K in zip(rows, kept, strict=True)])
        work.aside.append([x.flatten(0, 2)[row_K] for x in self._tensors(layer)])

    def _rows(self, layer: int, head: int, work: _Work, groups: GroupPool) -> Tensor:
        """Where a layer's and head's slots are stored [S]."""
        column, block = layer * groups.heads + head, self._cache.block_size
        slot_S = np.arange(work.length_N[column])
        if work.done.source:
            page_S = np.array(work.done.source, dtype=np.int64)[slot_S // block]
            row_S = (layer * self._cache.pages + page_S) * block * groups.heads + head
        else:
            row_S = groups.tables[work.done.seat, column, slot_S // block].astype(np.int64)
        return torch.from_numpy(row_S + slot_S % block * groups.heads)

    def _scores(self, layer: int, work: _Work, rows: list[Tensor], k: Pages, v: Pages, q_HWD: Tensor) -> list[Tensor]:
        """Scores [S] of each head; heads that store equally many slots are done together."""
        groups = len(rows)
        together = [range(groups)] if len({len(row_S) for row_S in rows}) == 1 else [[head] for head in range(groups)]
        found: list[Tensor] = []
        for heads in together:
            repeats = q_HWD.shape[0] // groups
            k_GSD, v_GSD = (torch.stack([_read(pages, rows[head], head) for head in heads]) for pages in (k, v))
            observed = Observed(
                k_GSD=k_GSD,
                v_GSD=v_GSD,
                q_HWD=q_HWD[heads[0] * repeats : (heads[-1] + 1) * repeats],
                scale=self._scales[layer],
                softcap=self._softcap,
                position=work.position,
                frequency_F=self._frequencies[layer],
                protected=self._protected,
                seed=work.done.seed + layer,
            )
            found += self._score(observed).unbind()
        return found

    def _write(self, work: _Work, groups: GroupPool) -> None:
        """What was put aside goes into the first slots of the seat's tables."""
        counts_N, block = np.array(work.counts), self._cache.block_size
        table_NI = groups.target(work.done.seat, counts_N)
        column_K = np.repeat(np.arange(len(counts_N)), counts_N)
        slot_K = np.arange(len(column_K)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        row_K = table_NI[column_K, slot_K // block] + slot_K % block * groups.heads
        at_K = torch.from_numpy(row_K.astype(np.int64)).to(work.aside[0][0].device)
        for tensor, parts in zip(self._tensors(0), zip(*work.aside, strict=True), strict=True):
            tensor.flatten(0, 2)[at_K] = torch.cat(parts)
        self.counts[work.done.sequence] = tuple(work.counts)

    def _tensors(self, layer: int) -> list[Tensor]:
        """Keys and values [rows, 1, 1, C] of all layers, with what belongs to codes."""
        return [x for pages in self._cache.of_layer(layer) if pages.heads for x in pages.heads.tensors()]


def _read(pages: Pages, row_S: Tensor, head: int) -> Tensor:
    """fp32 keys or values [S, D] of one head, as attention sees them."""
    if pages.heads is None:
        raise ValueError("these pages are not pages of single heads, too")
    x_SD = pages.heads.read_rows(row_S)[:, 0].float()
    if pages.scale_G is not None:
        x_SD = x_SD * pages.scale_G[head]
    return turned(x_SD) if pages.rotate else x_SD
