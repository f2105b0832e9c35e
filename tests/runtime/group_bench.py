"""The bench where layers and heads keep unequal numbers of slots: what each of them stores is told row by row.

How a layer's budget is shared out among its heads is drawn by lot from what is stored, so that no count is foreseeable
to the scheduler; what should be stored is worked out token by token from the same lots.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

import numpy as np

from runtime.groups import GroupPool
from runtime.scheduler import Step, StepOutput
from runtime.sequence import Sequence
from runtime.step import Compression, Row
from tests.runtime.bench import Bench, Slot, chosen, is_point

LAYERS, HEADS = 2, 2


class GroupBench(Bench):
    """A bench of two layers with two heads."""

    layers, heads = LAYERS, HEADS

    def __init__(self, pages: int = 16, page_tokens: int = 4, **given: Any) -> None:
        super().__init__(pages, page_tokens, **given)
        self.rows: list[Slot | None] = [None] * (LAYERS * pages * page_tokens * HEADS)

    @property
    def groups(self) -> GroupPool:
        """Of the pool."""
        assert self.pool.groups is not None
        return self.pool.groups

    def compute(self, step: Step) -> StepOutput:
        """Copies, all stores, all reads, then evictions; all of one is read before anything is written."""
        self.steps.append(step)
        for source, target in step.copies:
            for column in range(LAYERS * HEADS):
                for offset in range(self.pool.page.tokens):
                    self.rows[self._in_page(target, offset, column)] = self.rows[self._in_page(source, offset, column)]
        for row in step.rows:
            for offset, token in enumerate(row.tokens):
                slot = self.sequences[row.sequence].tenant, row.start + offset, token
                for column in range(LAYERS * HEADS):
                    self.rows[self._place(row, column, offset)] = slot
        output = StepOutput({row.sequence: self._next(row) for row in step.rows if row.samples})
        rows = {row.sequence: row for row in step.rows}
        counts = {done.sequence: self._move(done, rows[done.sequence]) for done in step.compressions}
        return StepOutput(output.tokens, counts=counts)

    def _in_page(self, page: int, offset: int, column: int) -> int:
        layer, head = divmod(column, HEADS)
        tokens = self.pool.page.tokens
        return ((layer * self.pool.pages + page) * tokens + offset) * HEADS + head

    def _place(self, row: Row, column: int, offset: int) -> int:
        """Where a new token of a row is stored."""
        tokens, groups = self.pool.page.tokens, self.groups
        if row.seat < 0:
            page, within = divmod(row.kv_len + offset, tokens)
            return self._in_page(row.table[page], within, column)
        page, within = divmod(int(groups.lengths[row.seat, column]) + offset, tokens)
        return int(groups.tables[row.seat, column, page]) + within * HEADS

    def _stored_in(self, row: Row, column: int) -> list:
        """What a row's sequence stores in a layer and head, the row included."""
        new = len(row.tokens)
        before = row.kv_len if row.seat < 0 else int(self.groups.lengths[row.seat, column])
        return [self.rows[self._place(row, column, offset)] for offset in range(-before, new)]

    def _next(self, row: Row) -> int:
        slots = [self._stored_in(row, column) for column in range(LAYERS * HEADS)]
        expected = self.lists(self.sequences[row.sequence], row.start + len(row.tokens))
        assert slots == expected, f"sequence {row.sequence} reads {slots}, its tokens are {expected}"
        return blake2b(repr(slots).encode(), digest_size=4).digest()[0] % self.vocabulary

    def _move(self, done: Compression, row: Row) -> tuple[int, ...]:
        sequence, end, groups = self.sequences[row.sequence], row.start + len(row.tokens), self.groups
        slots = [self._stored_in(row, column) for column in range(LAYERS * HEADS)]
        assert slots == self.lists(sequence, end) and 0 <= done.queries <= len(row.tokens)
        assert sum(map(len, slots)) == LAYERS * HEADS * done.slots
        stored = [len(slots[layer * HEADS]) + len(slots[layer * HEADS + 1]) for layer in range(LAYERS)]
        assert sum(done.budgets) == LAYERS * done.kept and all(
            HEADS * kept <= has for kept, has in zip(done.budgets, stored, strict=True)
        )
        kept = self.left(slots, done.budgets, done.queries)
        counts = tuple(map(len, kept))
        table_NI = groups.target(done.seat, np.array(counts))
        for column, of_column in enumerate(kept):
            for index, slot in enumerate(of_column):
                page, offset = divmod(index, self.pool.page.tokens)
                self.rows[int(table_NI[column, page]) + offset * HEADS] = slot
        self.evictions += 1
        return counts

    def left(self, slots: list[list], budgets: tuple[int, ...], queries: int) -> list[list]:
        """What an eviction leaves in each layer and head."""
        rng = random.Random(blake2b(repr(slots).encode(), digest_size=8).digest())
        assert self.eviction is not None
        kept = []
        for layer, budget in enumerate(budgets):
            first, second = slots[layer * HEADS : layer * HEADS + 2]
            low = max(self.eviction.least, HEADS * budget - len(second))
            high = min(len(first), HEADS * budget - self.eviction.least)
            count = rng.randint(low, high) if self.eviction.method == "adakv" else budget
            kept += [chosen(first, count, queries), chosen(second, HEADS * budget - count, queries)]
        return kept

    def lists(self, sequence: Sequence, end: int) -> list[list[Slot]]:
        """What each layer and head stores once the tokens before `end` are stored, and before an eviction there."""
        columns: list[list[Slot]] = [[] for _ in range(LAYERS * HEADS)]
        prompt, last, mean = len(sequence.prompt), 0, 0
        points = self.scheduler.points
        assert points is not None and self.eviction is not None
        for position, token in enumerate(sequence.tokens[:end]):
            if position and is_point(self.eviction, position, prompt):
                kept = points.kept(position)
                if kept < mean:
                    queries = min(self.eviction.recent, position - last if position <= prompt else 1)
                    stored = [len(columns[at]) + len(columns[at + 1]) for at in range(0, LAYERS * HEADS, HEADS)]
                    budgets = points.budgets(kept, [both // HEADS for both in stored])
                    columns, last, mean = self.left(columns, budgets, queries), position, kept
            mean += 1
            for column in columns:
                column.append((sequence.tenant, position, token))
        return columns

    def stored(self, sequence: Sequence, end: int) -> list[Slot]:
        """Not to be asked here."""
        raise AssertionError

    def check(self) -> None:
        """Integrity, and that the pool's own counts add up."""
        self.scheduler.check_integrity()
        counts = self.pool.statistics
        owned = {page for sequence in self.sequences.values() for page in sequence.table[0]}
        owned.update(self.groups.subpages.pages)
        assert counts.free + counts.cached + counts.owned == self.pool.pages
        assert counts.owned == len(owned)
