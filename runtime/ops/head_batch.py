"""HeadBatch: a step's batch where some sequences have a table of pages for each layer and key-value head.

For attention each such sequence and head is a sequence of its own, with its own number of slots. What all layers need
is worked out once, in numpy, for all of them.

Shape suffixes: T tokens of the flat batch, S sequences with a seat, M their tokens, L layers, G key-value heads of a
layer, N = L G, A their tokens times heads, ordered by sequence, head and token; I pages of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from runtime.ops.batch import AttentionBatch

if TYPE_CHECKING:
    from runtime.groups import GroupPool
    from runtime.step import Row

FEW_QUERIES = 8  # of a sequence that are done one by one, where there is C for that


@dataclass(eq=False)
class HeadLayer:
    """One layer. `row_A`: where each token's keys and values go (int64, by token and head). `line` [S G]: of tables.
    `own_A`: the slot of each query, counted within its table; `kv_len` [S G]: slots stored, this step's included."""

    row_A: Tensor
    line: np.ndarray
    own_A: np.ndarray
    kv_len: np.ndarray


class Seated:
    """The tokens of some sequences with seats. `token_M`: where they are in the flat batch. `few`: whether they are few
    in each sequence. `owner_A`: the sequence and head of each token and head, by sequence, head and token."""

    def __init__(
        self,
        seats: np.ndarray,
        counts: np.ndarray,
        token_M: np.ndarray,
        groups: GroupPool,
        block: int,
        device: torch.device | str,
        *,
        few: bool,
    ) -> None:
        self.few = few
        self._groups, self._block, self._device = groups, block, device
        self._seats, self._counts = seats, counts
        self.token_M = torch.from_numpy(token_M).to(device)
        heads = groups.heads
        starts = np.concatenate([[0], np.cumsum(counts)])
        self._owner_M = np.repeat(np.arange(len(seats)), counts)
        self._within_M = np.arange(starts[-1]) - starts[self._owner_M]
        before_MN = groups.lengths[seats[self._owner_M]].astype(np.int64)
        self._slot_MN = before_MN + self._within_M[:, None]
        page_MN = groups.tables[seats[self._owner_M][:, None], np.arange(groups.columns), self._slot_MN // block]
        self._row_MN = page_MN + self._slot_MN % block * heads
        self._head_starts = np.concatenate([[0], np.cumsum(np.repeat(counts, heads))])
        self.owner_A = np.repeat(np.arange(len(seats) * heads), np.repeat(counts, heads))
        self._order_A: np.ndarray | None = None
        self.order_A: Tensor | None = None  # None: by token and head is the same as by sequence, head and token
        if counts.max() > 1:
            head_G1 = np.arange(heads)[:, None]
            order = [(np.arange(*starts[s : s + 2]) * heads + head_G1).reshape(-1) for s in range(len(seats))]
            self._order_A = np.concatenate(order)
            self.order_A = torch.from_numpy(self._order_A).to(device)

    def layer(self, layer: int) -> HeadLayer:
        """What attention of a layer needs."""
        heads = self._groups.heads
        columns = slice(layer * heads, (layer + 1) * heads)
        slot_A = self._slot_MN[:, columns].reshape(-1)
        kv_len = self._groups.lengths[self._seats, columns] + self._counts[:, None].astype(np.int32)
        line = self._seats[:, None] * self._groups.columns + np.arange(columns.start, columns.stop)
        return HeadLayer(
            row_A=torch.from_numpy(self._row_MN[:, columns].reshape(-1)).to(self._device),
            line=line.reshape(-1),
            own_A=slot_A if self._order_A is None else slot_A[self._order_A],
            kv_len=kv_len.reshape(-1),
        )

    def by_layer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What HeadBatch.lines tells of these tokens."""
        line_MN = self._seats[self._owner_M][:, None] * self._groups.columns + np.arange(self._groups.columns)
        numbers = self._row_MN, line_MN, (self._slot_MN + 1).astype(np.int32)
        shape = len(self._owner_M), self._groups.layers, self._groups.heads
        row, line, end = (each.reshape(shape).transpose(1, 0, 2) for each in numbers)
        return row, line, end

    @property
    def tables(self) -> np.ndarray:
        """All lines [seats N, I], where they are."""
        return self._groups.tables.reshape(-1, self._groups.tables.shape[2])

    def batch(self, of: HeadLayer) -> AttentionBatch:
        """A layer's sequences and heads as a batch of sequences with one head."""
        own_A = torch.from_numpy(of.own_A).to(self._device)
        count = np.repeat(self._counts, self._groups.heads)
        table = self.tables[of.line, : -(-int(of.kv_len.max()) // self._block)]
        batch = AttentionBatch(
            starts_S1=torch.from_numpy(self._head_starts.astype(np.int32)).to(self._device),
            kv_len_S=torch.from_numpy(of.kv_len).to(self._device),
            table_SP=torch.from_numpy(np.ascontiguousarray(table)).to(self._device),
            position_T=own_A,
            index_T=own_A,
            slot_T=own_A,
            starts=self._head_starts.tolist(),
            kv_len=of.kv_len.tolist(),
            max_query=int(self._counts.max()),
            max_kv=int(of.kv_len.max()),
        )
        long = np.flatnonzero(count > 1)
        batch.decodes = int(long[0]) if len(long) else len(count)  # a property that would count them one by one
        return batch


@dataclass(eq=False)
class HeadBatch:
    """A step's batch: `whole`, the sequences that lie in whole pages, whose tokens are `whole_T` of the flat batch; and
    those with seats, in parts."""

    whole: AttentionBatch | None
    whole_T: Tensor
    parts: list[Seated]

    @classmethod
    def build(
        cls, rows: Sequence[Row], groups: GroupPool, *, block_size: int, device: torch.device | str, few_queries: int
    ) -> HeadBatch:
        """From the rows of a step. Sequences with more than `few_queries` tokens are a part of their own."""
        seats = np.array([row.seat for row in rows])
        counts = np.array([len(row.tokens) for row in rows])
        starts = np.cumsum(counts) - counts
        found = []
        for few in (True, False):
            mine = np.flatnonzero((seats >= 0) & ((counts <= few_queries) == few))
            if len(mine):
                token_M = _tokens(starts[mine], counts[mine])
                part = Seated(seats[mine], counts[mine], token_M, groups, block_size, device, few=few)
                found.append(part)
        others = [row for row in rows if row.seat < 0]
        whole = None
        if others:
            whole = AttentionBatch.build(
                [row.start for row in others],
                [len(row.tokens) for row in others],
                [row.kv_len for row in others],
                [row.table for row in others],
                block_size=block_size,
                device=device,
            )
        mine = np.flatnonzero(seats < 0)
        return cls(whole, torch.from_numpy(_tokens(starts[mine], counts[mine])).to(device), found)

    def lines(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all tokens by layer, token and head: where keys and values go (int64), the line of the tables (int64) and
        the slots that are seen (int32); and the tables. Only where every sequence has a seat."""
        parts = [part.by_layer() for part in self.parts]
        order = np.argsort(np.concatenate([part.token_M.numpy() for part in self.parts]))
        row, line, end = (
            torch.from_numpy(np.ascontiguousarray(np.concatenate(of, axis=1)[:, order]))
            for of in zip(*parts, strict=True)
        )
        return row, line, end, torch.from_numpy(self.parts[0].tables)


def _tokens(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1 … of each."""
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)
