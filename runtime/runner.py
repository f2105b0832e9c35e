"""From a step, as the scheduler decided it, to logits: page copies, the flat batch, one forward pass.

Shape suffixes: T tokens of the flat batch, N rows whose logits are wanted, K hidden channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.compaction import Compactor
from runtime.head_compaction import HeadCompactor
from runtime.ops.batch import AttentionBatch
from runtime.ops.head_batch import FEW_QUERIES, HeadBatch
from runtime.step import Recoding, Step

_PIECE_LOGITS = 1 << 24  # logits of prompts that are there at once: 64 MiB


@dataclass(frozen=True)
class StepLogits:
    """Row i of the fp32 logits [N, V] is where sequence `sampled[i]` chooses its next token. `prompts_NK` are the
    hidden rows of all positions that were wanted beside them, for Runner.logits. `counts`: by sequence, the slots that
    an eviction left in each layer and head, where their numbers are unequal."""

    logits_NV: Tensor
    sampled: tuple[int, ...]
    prompts_NK: Tensor | None = None
    counts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


class WholeSteps(Protocol):
    """A way to do some batches at once, faster than layer by layer (runtime.graphs, runtime.small_steps)."""

    def covers(self, batch: AttentionBatch) -> bool:
        """Whether a batch can be done so."""
        ...

    def run(self, ids_T: Tensor, batch: AttentionBatch, rows: Tensor) -> Tensor:
        """Logits of some rows of a batch that is covered."""
        ...


class Runner:
    """Runs steps on a model and its cache, those that `whole` covers through it."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        device: str = "cpu",
        *,
        whole: WholeSteps | None = None,
        compactor: Compactor | HeadCompactor | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.whole = whole
        self.compactor = compactor

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.model.config.vocab

    @torch.inference_mode()
    def run(self, step: Step, wanted: Mapping[int, range]) -> StepLogits:
        """Logits of every row that samples, and what is needed for those of the positions `wanted`, by sequence."""
        self.cache.copy_pages(step.copies)
        rows = step.rows
        batch = self._batch(step)
        counts: Mapping[int, tuple[int, ...]] = {}
        if self.compactor is not None and (step.compressions or self.compactor.adds_up):
            batch.after_attention = self.compactor.begin(step, batch)
            counts = self.compactor.counts
        ids_T = torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64, device=self.device)
        sampling = [(row.sequence, end - 1) for row, end in zip(rows, batch.starts[1:], strict=True) if row.samples]
        index_N = torch.tensor([index for _, index in sampling], dtype=torch.int64, device=self.device)
        sampled = tuple(sequence for sequence, _ in sampling)
        if not wanted:
            logits_NV = self._logits(ids_T, batch, index_N)
            self._code_pages(step)
            return StepLogits(logits_NV, sampled, counts=counts)
        offsets = {row.sequence: start - row.start for row, start in zip(rows, batch.starts, strict=False)}
        prompts = [offsets[sequence] + position for sequence, positions in wanted.items() for position in positions]
        x_TK = self.model.hidden(ids_T, batch, self.cache)
        self._code_pages(step)
        prompts_NK = x_TK[torch.tensor(prompts, dtype=torch.int64, device=self.device)]
        return StepLogits(self.model.logits(x_TK[index_N]), sampled, prompts_NK, counts)

    def logits(self, x_NK: Tensor) -> Iterator[Tensor]:
        """fp32 logits [N, V] of hidden rows, in pieces [n, V] of bounded size: all rows of a prompt would be large."""
        for piece_NK in x_NK.split(max(1, _PIECE_LOGITS // self.vocabulary)):
            yield self.model.logits(piece_NK)

    def _batch(self, step: Step) -> AttentionBatch:
        """The flat batch. Where sequences have tables for each layer and head, slots and tables are in `by_head`."""
        rows = step.rows
        seated = step.groups is not None and any(row.seat >= 0 for row in rows)
        block = self.cache.block_size
        batch = AttentionBatch.build(
            [row.start for row in rows],
            [len(row.tokens) for row in rows],
            [0 if seated else row.kv_len for row in rows],
            [(0,) * -(-len(row.tokens) // block) if seated else row.table for row in rows],
            block_size=block,
            device=self.device,
            frames=self.cache.frames,
        )
        if seated and step.groups is not None:
            few = FEW_QUERIES if torch.device(self.device).type == "cpu" else 1
            batch.by_head = HeadBatch.build(rows, step.groups, block_size=block, device=self.device, few_queries=few)
        return batch

    def _code_pages(self, step: Step) -> None:
        """When all rows have read what is there in full."""
        for done in step.compressions:
            if isinstance(done, Recoding):
                self.cache.code_pages(done.source, done.target)

    def _logits(self, ids_T: Tensor, batch: AttentionBatch, index_N: Tensor) -> Tensor:
        if self.whole is not None and batch.after_attention is None and self.whole.covers(batch):
            return self.whole.run(ids_T, batch, index_N)
        return self.model(ids_T, batch, self.cache, index_N)
