"""CUDA graphs of decode steps: one launch instead of hundreds, for a few batch sizes.

A graph replays fixed addresses and grids, so a batch is copied into static tensors and filled up to the next captured
size with rows that nobody reads: one token at position 0 whose keys go to a trash page. Graphs share one memory pool.
Everything else (prefill, more sequences than the largest size) runs without a graph.

Shape suffixes: N rows (sequences, one token each), N1 rows + 1, P pages of a table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.ops.batch import AttentionBatch

if TYPE_CHECKING:  # tests on a GPU have torch alone
    from runtime.cache import KVCache
    from runtime.models.decoder import Decoder

Forward = Callable[[torch.Tensor, AttentionBatch], torch.Tensor]  # ids_N, batch -> logits [N, V]

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class PaddedDecodes:
    """The static inputs of one batch size."""

    ids_N: torch.Tensor
    batch: AttentionBatch
    trash_page: int
    block_size: int

    @classmethod
    def empty(cls, rows: int, pages: int, trash_page: int, block_size: int, device: torch.device) -> PaddedDecodes:
        """`rows` rows of padding, with tables of `pages` pages."""
        trash = [trash_page] * pages
        batch = AttentionBatch.build(
            [0] * rows, [1] * rows, [0] * rows, [trash] * rows, block_size=block_size, device=device
        )
        batch.max_kv = pages * block_size  # of any batch to come: the launch is cut for it
        return cls(torch.zeros(rows, dtype=torch.int64, device=device), batch, trash_page, block_size)

    def fill(self, ids_N: torch.Tensor, batch: AttentionBatch) -> None:
        """Copy a batch of decodes in; the rows past it become padding."""
        rows, pages = batch.table_SP.shape
        mine = self.batch
        self.ids_N[:rows].copy_(ids_N)
        self.ids_N[rows:].zero_()
        mine.position_T[:rows].copy_(batch.position_T)
        mine.position_T[rows:].zero_()
        mine.index_T[:rows].copy_(batch.index_T)
        mine.index_T[rows:].zero_()
        mine.slot_T[:rows].copy_(batch.slot_T)
        mine.slot_T[rows:].fill_(self.trash_page * self.block_size)
        mine.kv_len_S[:rows].copy_(batch.kv_len_S)
        mine.kv_len_S[rows:].fill_(1)
        mine.table_SP[:rows, :pages].copy_(batch.table_SP)
        mine.table_SP[rows:].fill_(self.trash_page)


class DecodeGraphs:
    """Captured decode steps. `trash_page` must belong to no sequence; `pages` is the longest table to come."""

    def __init__(
        self,
        forward: Forward,
        *,
        pages: int,
        trash_page: int,
        block_size: int,
        device: torch.device,
        sizes: Sequence[int] = SIZES,
    ) -> None:
        self._pages = pages
        self._inputs = {
            rows: PaddedDecodes.empty(rows, pages, trash_page, block_size, device) for rows in sorted(sizes)
        }
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor] = {}
        before = torch.cuda.memory_reserved(device)
        self._capture(forward)
        self.bytes = torch.cuda.memory_reserved(device) - before  # for the memory ledger

    @classmethod
    def of(cls, model: Decoder, cache: KVCache, pages: int, most_rows: int) -> DecodeGraphs:
        """Decodes of up to `most_rows` sequences, with tables of up to `pages` pages. Padding goes to the last page."""
        return cls(
            lambda ids_N, batch: model(ids_N, batch, cache, None),
            pages=pages,
            trash_page=cache.pages - 1,
            block_size=cache.block_size,
            device=torch.device(model.device),
            sizes=[size for size in SIZES if size < 2 * most_rows],
        )

    def _capture(self, forward: Forward) -> None:
        """The largest size first: the smaller ones fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        for rows, inputs in reversed(self._inputs.items()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.inference_mode():  # compile and allocate outside the capture
                for _ in range(2):
                    forward(inputs.ids_N, inputs.batch)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool), torch.inference_mode():
                self._logits[rows] = forward(inputs.ids_N, inputs.batch)
            self._graphs[rows] = graph

    def covers(self, batch: AttentionBatch) -> bool:
        """Whether a batch is all decodes in whole pages and fits a captured size."""
        rows, pages = batch.table_SP.shape
        return batch.by_head is None and batch.max_query == 1 and rows <= max(self._graphs) and pages <= self._pages

    def run(self, ids_N: torch.Tensor, batch: AttentionBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits of some rows of a batch that is covered; valid until the next call."""
        count = len(batch.kv_len)
        size = min(captured for captured in self._graphs if captured >= count)
        self._inputs[size].fill(ids_N, batch)
        self._graphs[size].replay()
        logits_NV = self._logits[size][:count]
        return logits_NV if len(rows) == count else logits_NV[rows]
