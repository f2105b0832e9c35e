"""Evictions in the cache: slots are scored layer by layer as the model goes, and what stays moves to the front.

A layer's slots are done right after its attention, when its queries are at hand and nobody reads the layer any more in
this step. Each sequence is done alone, so what stays does not depend on the rest of the batch.

Shape suffixes: T tokens of the flat batch, H query heads, G key-value heads, D channels of a head, W observed queries,
S slots of a sequence, N of which stay, P pages, B slots of a page, F rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kv_compress._scores import Observed, keep, scorer
from runtime.ops.batch import AttentionBatch
from runtime.step import Compression, Step

if TYPE_CHECKING:
    from kv_compress.eviction import EvictionSettings
    from runtime.cache import KVCache
    from runtime.models.decoder import Decoder


class _Work(NamedTuple):
    """One eviction: where its slots are and will be, the rows of its queries, the position of the next token."""

    slot_S: Tensor
    target_N: Tensor
    queries: range
    position: int
    seed: int


class Compactor:
    """Evicts from a cache by one method. `protected`: the first and last slots, which always stay."""

    def __init__(
        self,
        cache: KVCache,
        method: str,
        protected: tuple[int, int],
        frequencies: Sequence[Tensor],
        scales: Sequence[float],
        softcap: float | None,
        windows: Sequence[int | None],
    ) -> None:
        self.counts: dict[int, tuple[int, ...]] = {}  # all alike: none has to be told
        self._cache = cache
        self._score = scorer(method)
        self._protected = protected
        self._frequencies = frequencies  # of each layer
        self._scales = scales
        self._softcap = softcap
        self._windows = windows

    @property
    def adds_up(self) -> bool:
        """Whether the attention of every step is added up, not only of those with evictions."""
        return bool(self._cache.attended)

    @classmethod
    def of(cls, model: Decoder, cache: KVCache, settings: EvictionSettings) -> Compactor:
        """For a model. UsageError where eviction would break a sliding window."""
        settings.require_windows(layer.window for layer in model.config.layers)
        return cls(
            cache,
            settings.method,
            (settings.sinks, settings.recent),
            [model.rotaries[kind].frequency_F for kind in model.rotary_of_layer],
            [layer.scale for layer in model.config.layers],
            model.config.attention_softcap,
            [layer.window for layer in model.config.layers],
        )

    def begin(self, step: Step, batch: AttentionBatch) -> Callable[[Tensor], None]:
        """What is to be called with the rotated queries [T, H, D] of each layer in turn, after its attention."""
        rows = {row.sequence: index for index, row in enumerate(step.rows)}
        works = [self._work(each, step, rows[each.sequence], batch) for each in step.compressions]
        layers = iter(range(len(self._scales)))

        def after_attention(q_THD: Tensor) -> None:
            layer = next(layers)
            if self.adds_up:
                self._cache.add_attention(layer, q_THD, batch, self._scales[layer], self._windows[layer], self._softcap)
            for work in works:
                self._evict(layer, work, q_THD)

        return after_attention

    def _work(self, each: Compression, step: Step, row: int, batch: AttentionBatch) -> _Work:
        end = batch.starts[row + 1]
        position = step.rows[row].start + len(step.rows[row].tokens)
        device = batch.slot_T.device
        return _Work(
            self._slots(each.source, each.slots).to(device),
            self._slots(each.target, each.kept).to(device),
            range(end - each.queries, end),
            position,
            each.seed,
        )

    def _slots(self, pages: Sequence[int], count: int) -> Tensor:
        block = self._cache.block_size
        index = torch.arange(count)
        return torch.tensor(pages)[index // block] * block + index % block

    def _evict(self, layer: int, work: _Work, q_THD: Tensor) -> None:
        k_SGD, v_SGD = self._cache.read_slots(layer, work.slot_S)
        attended_SG = self._cache.read_attention(layer, work.slot_S)
        observed = Observed(
            k_GSD=k_SGD.transpose(0, 1),
            v_GSD=v_SGD.transpose(0, 1),
            q_HWD=q_THD[work.queries.start : work.queries.stop].float().transpose(0, 1),
            scale=self._scales[layer],
            softcap=self._softcap,
            position=work.position,
            frequency_F=self._frequencies[layer],
            protected=self._protected,
            seed=work.seed + layer,
            attended_GS=None if attended_SG is None else attended_SG.T,
        )
        kept_GN = keep(self._score(observed), len(work.target_N), self._protected)
        self._cache.move_slots(layer, work.slot_S[kept_GN.T], work.target_N)
