"""Tables of pages for each layer and head: where sequences lie that keep unequal numbers of slots.

A sequence lies in whole pages, one table for all layers and heads, until its first eviction. What stays then moves into
sub-pages (runtime.subpages), and the sequence is given a seat here: its line of the arrays. They are numpy arrays of
all seats, so that a step's bookkeeping is a few operations for all sequences at once. A seat's numbers stay as they are
until the seat is given to somebody else: a step in flight may still read them.

Shape suffixes: N layers times heads, I pages of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.subpages import SubPages

if TYPE_CHECKING:
    from runtime.blocks import BlockPool


class GroupPool:
    """By seat: `lengths` [seat, N], slots stored; `tables` [seat, N, I], sub-pages in slot order."""

    def __init__(self, pool: BlockPool, layers: int, heads: int) -> None:
        self.layers, self.heads = layers, heads
        self.subpages = SubPages(pool, layers, heads)
        self.page_tokens = pool.page.tokens
        self._seats(8, 4)
        self._vacant = list(range(7, -1, -1))
        self._spare: dict[int, np.ndarray] = {}  # by seat: sub-pages that are in no table yet

    @property
    def columns(self) -> int:
        """Layers times heads."""
        return self.layers * self.heads

    def bound(self, slots: int) -> int:
        """The most sub-pages of a sequence that stores `slots` slots in the mean, what they may waste included."""
        return self.columns * slots // self.page_tokens

    # A sequence comes and goes

    def open(self, subpages: np.ndarray) -> int:
        """A seat, with these sub-pages to come."""
        if not self._vacant:
            taken = len(self.lengths)
            self._seats(2 * taken, self.tables.shape[2])
            self._vacant = list(range(2 * taken - 1, taken - 1, -1))
        seat = self._vacant.pop()
        self.lengths[seat] = self._held[seat] = 0
        self._spare[seat] = subpages
        return seat

    def close(self, seat: int) -> None:
        """Give back all that a seat has, and the seat."""
        self.subpages.give(np.concatenate([self._table(seat), self._spare[seat]]))
        self._vacant.append(seat)

    # A sequence grows

    def grow(self, seats: Sequence[int]) -> bool:
        """Room for one more slot in all tables of these decoding sequences. False, and nothing is done, if there are
        too few sub-pages."""
        for seat in seats:
            if len(self._spare[seat]):  # were kept for the prompt
                self.subpages.give(self._spare[seat])
                self._spare[seat] = self._spare[seat][:0]
        at = np.sort(np.array(seats))
        lines = _lines(at)
        line, column = np.nonzero(self.lengths[lines] == self._held[lines] * self.page_tokens)
        if len(line) > self.subpages.obtainable:
            return False
        if len(line):
            seat = at[line]
            index = self._held[seat, column]
            self._widen(int(index.max()) + 1)
            self.tables[seat, column, index] = self.subpages.take(len(line))
            self._held[seat, column] = index + 1
        return True

    def extend(self, seat: int, tokens: int) -> bool:
        """Room for so many more slots in all tables of one sequence."""
        held = self._held[seat]
        wanted = np.maximum(-(-(self.lengths[seat] + tokens) // self.page_tokens), held)
        count, spare = int((wanted - held).sum()), self._spare[seat]
        if count > len(spare) + self.subpages.obtainable:
            return False
        if count:
            new = spare[:count]
            self._spare[seat] = spare[count:]
            if count > len(new):
                new = np.concatenate([new, self.subpages.take(count - len(new))])
            self._widen(int(wanted.max()))
            index = np.arange(self.tables.shape[2])
            self.tables[seat][(index >= held[:, None]) & (index < wanted[:, None])] = new
            self._held[seat] = wanted
        return True

    def stored(self, seats: Sequence[int], tokens: Sequence[int]) -> None:
        """So many tokens more are stored, in all tables of each."""
        if min(tokens) == max(tokens):
            self.lengths[_lines(np.sort(np.array(seats)))] += tokens[0]
        else:
            self.lengths[np.array(seats)] += np.array(tokens, dtype=np.int32)[:, None]

    # A sequence is evicted from

    def target(self, seat: int, counts_N: np.ndarray) -> np.ndarray:
        """The tables [N, I] of an eviction that leaves so many slots: of a seat with tables their first pages, else
        its sub-pages in turn. It changes nothing: the model asks, too."""
        pages_N = -(-counts_N // self.page_tokens)
        most = int(pages_N.max())
        if self._held[seat].any():
            return self.tables[seat, :, :most]
        table_NI = np.zeros((self.columns, most), dtype=np.int32)
        table_NI[np.arange(most) < pages_N[:, None]] = self._spare[seat][: pages_N.sum()]
        return table_NI

    def evict(self, seat: int, counts_N: np.ndarray, reserved: int) -> None:
        """The eviction is done. Of what no table needs any more, `reserved` sub-pages less those in tables are kept for
        the rest of the prompt; the others are given back."""
        pages_N = -(-counts_N // self.page_tokens)
        table_NI, used = self.target(seat, counts_N).copy(), int(pages_N.sum())
        if self._held[seat].any():
            index = np.arange(self.tables.shape[2])
            behind = (index >= pages_N[:, None]) & (index < self._held[seat][:, None])
            spare = np.concatenate([self._spare[seat], self.tables[seat][behind]])
        else:
            spare = self._spare[seat][used:]
        kept = max(reserved - used, 0)
        self._spare[seat] = spare[:kept]
        self._widen(table_NI.shape[1])
        self.tables[seat, :, : table_NI.shape[1]] = table_NI
        self._held[seat] = pages_N
        self.lengths[seat] = counts_N
        self.subpages.give(spare[kept:])

    def stored_by_layer(self, seat: int) -> list[int]:
        """Slots that each layer stores, the mean of its heads (a whole number, as budgets are)."""
        return (self.lengths[seat].reshape(self.layers, self.heads).sum(1) // self.heads).tolist()

    def counts_of(
        self, seat: int, slots: int, kept_by_layer: Sequence[int], counts: Iterable[int] | None
    ) -> np.ndarray:
        """What an eviction left in each layer and head [N], as told, or equal in all heads of a layer (where there is
        no model). RuntimeError for what cannot be. `slots`: what was there, of a sequence that had no tables."""
        budget_N = np.repeat(np.array(kept_by_layer), self.heads)
        if counts is None:
            return self._fill(seat, budget_N) if self._held[seat].any() else budget_N
        counts_N = np.array(list(counts))
        had_N = self.lengths[seat] if self._held[seat].any() else np.full(self.columns, slots)
        sums = counts_N.reshape(self.layers, -1).sum(1) if counts_N.shape == budget_N.shape else None
        if sums is None or (sums != np.array(kept_by_layer) * self.heads).any():
            raise RuntimeError(f"an eviction left {counts_N.tolist()}, of layers that keep {list(kept_by_layer)}")
        if (counts_N > had_N).any() or (counts_N < 1).any():
            raise RuntimeError(f"an eviction left {counts_N.tolist()} of {had_N.tolist()} slots")
        return counts_N

    def check_integrity(self, seats: Iterable[int]) -> None:
        """RuntimeError unless these seats are those in use, their tables cover their slots, and no sub-page is lost."""
        used = sorted(seats)
        if used != sorted(set(range(len(self.lengths))) - set(self._vacant)):
            raise RuntimeError(f"seats {used} are used, vacant are {sorted(self._vacant)}")
        if (self.lengths[used] > self._held[used] * self.page_tokens).any():
            raise RuntimeError("a table of a layer and head is too short for its slots")
        held = [np.concatenate([self._table(seat), self._spare[seat]]) for seat in used]
        self.subpages.check_integrity(np.concatenate(held) if held else np.zeros(0, dtype=np.int64))

    def _table(self, seat: int) -> np.ndarray:
        held = np.arange(self.tables.shape[2]) < self._held[seat][:, None]
        return self.tables[seat][held].astype(np.int64)

    def _fill(self, seat: int, budget_N: np.ndarray) -> np.ndarray:
        """Counts of each layer's heads as equal as what they have allows."""
        counts_N = np.minimum(budget_N, self.lengths[seat])
        for layer in range(self.layers):
            heads = slice(layer * self.heads, (layer + 1) * self.heads)
            while left := int(budget_N[heads].sum() - counts_N[heads].sum()):
                room = np.flatnonzero(counts_N[heads] < self.lengths[seat][heads])[:left]
                counts_N[heads][room] += 1
        return counts_N

    def _seats(self, seats: int, pages: int) -> None:
        """Arrays of so many seats, with what was in them."""
        old = getattr(self, "tables", np.zeros((0, self.columns, 0), dtype=np.int32))
        before = len(old)
        tables = np.zeros((seats, self.columns, pages), dtype=np.int32)
        tables[:before, :, : old.shape[2]] = old
        lengths, held = np.zeros((2, seats, self.columns), dtype=np.int32)
        if before:
            lengths[:before], held[:before] = self.lengths, self._held
        self.tables, self.lengths, self._held = tables, lengths, held

    def _widen(self, pages: int) -> None:
        if pages > self.tables.shape[2]:
            self._seats(len(self.lengths), max(pages, 2 * self.tables.shape[2]))


def _lines(seats: np.ndarray) -> np.ndarray | slice:
    """Rising seats as an index, which copies nothing where they follow one another."""
    follow = seats[-1] - seats[0] + 1 == len(seats)
    return slice(int(seats[0]), int(seats[-1]) + 1) if follow else seats
