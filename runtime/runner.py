"""From a step, as the scheduler decided it, to logits: page copies, the flat batch, one forward pass.

Shape suffixes: T tokens of the flat batch, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.ops.batch import AttentionBatch
from runtime.step import Step

if TYPE_CHECKING:
    from runtime.graphs import DecodeGraphs


@dataclass(frozen=True)
class StepLogits:
    """fp32 logits [N, V]: row i < len(sampled) is where sequence `sampled[i]` chooses its next token; the rows
    `prompts[sequence]` foretell tokens of that sequence's prompt."""

    logits_NV: Tensor
    sampled: tuple[int, ...]
    prompts: Mapping[int, slice]


class Runner:
    """Runs steps on a model and its cache. With `graph_pages`, the longest page table to come, decodes of up to
    `most_rows` sequences are captured as CUDA graphs, whose padding goes to the cache's last page."""

    def __init__(
        self, model: Any, cache: Any, device: str = "cpu", *, graph_pages: int = 0, most_rows: int = 1
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._graphs = self._capture(graph_pages, most_rows) if graph_pages else None

    @property
    def graphs_bytes(self) -> int:
        """What captured graphs take."""
        return 0 if self._graphs is None else self._graphs.bytes

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.model.config.vocab

    @torch.inference_mode()
    def run(self, step: Step, wanted: Mapping[int, range]) -> StepLogits:
        """Logits of every row that samples and, beside them, of the positions `wanted` of some sequences."""
        self.cache.copy_pages(step.copies)
        rows = step.rows
        batch = AttentionBatch.build(
            [row.start for row in rows],
            [len(row.tokens) for row in rows],
            [row.kv_len for row in rows],
            [row.table for row in rows],
            block_size=self.cache.block_size,
            device=self.device,
        )
        ids_T = torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64, device=self.device)
        indices, sampled, prompts = _logit_rows(step, batch.starts, wanted)
        return StepLogits(self._logits(ids_T, batch, indices), sampled, prompts)

    def _logits(self, ids_T: Tensor, batch: AttentionBatch, indices: list[int]) -> Tensor:
        index_N = torch.tensor(indices, dtype=torch.int64, device=self.device)
        if self._graphs is not None and self._graphs.covers(batch):
            logits_TV = self._graphs.run(ids_T, batch)
            return logits_TV if len(indices) == len(logits_TV) else logits_TV[index_N]
        return self.model(ids_T, batch, self.cache, index_N)

    def _capture(self, pages: int, most_rows: int) -> DecodeGraphs:
        from runtime.graphs import SIZES, DecodeGraphs

        return DecodeGraphs(
            lambda ids_N, batch: self.model(ids_N, batch, self.cache, None),
            pages=pages,
            trash_page=self.cache.pages - 1,
            block_size=self.cache.block_size,
            device=torch.device(self.device),
            sizes=[size for size in SIZES if size < 2 * most_rows],
        )


def _logit_rows(
    step: Step, starts: list[int], wanted: Mapping[int, range]
) -> tuple[list[int], tuple[int, ...], dict[int, slice]]:
    """Indices of the flat batch whose logits are needed: first those that sample, then those of prompts."""
    sampling = [(row.sequence, end - 1) for row, end in zip(step.rows, starts[1:], strict=True) if row.samples]
    indices = [index for _, index in sampling]
    prompts = {}
    for row, start in zip(step.rows, starts, strict=False):
        positions = wanted.get(row.sequence, range(0))
        if positions:
            prompts[row.sequence] = slice(len(indices), len(indices) + len(positions))
            indices += range(start + positions.start - row.start, start + positions.stop - row.start)
    return indices, tuple(sequence for sequence, _ in sampling), prompts
