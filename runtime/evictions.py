"""What an eviction takes from the pool and gives back, and the coding of whole pages, which goes the same way.

`prepare` when the step is planned, `finish` when it is done. Pages that others may read are never written. What goes on
in them is told by the step (runtime.step) and done where the tensors are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_compress._coded_pages import CodingPoints
from runtime.prefixes import stretches_of
from runtime.recoding import table_after
from runtime.step import Compression, Recoding

if TYPE_CHECKING:
    from kv_compress._budget import Point, Points
    from runtime.blocks import BlockPool
    from runtime.groups import GroupPool
    from runtime.sequence import Sequence


class Evictions:
    """Those of one pool, at the points that it has."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def has_room(self, sequence: Sequence) -> bool:
        """Whether there are pages for what `prepare` does: shared ones are never written."""
        if sequence.is_seated:  # each table keeps some of its own pages
            return True
        point, groups = _point_of(sequence), self._pool.groups
        movable, wanted = self._moved(sequence, point)
        own = len(self._pool.own(movable)) + self._pool.available
        if groups is None:
            return own >= wanted
        return own * groups.columns >= self._subpages_behind(sequence, point, groups) - groups.subpages.free

    def prepare(self, sequence: Sequence) -> Compression | Recoding:
        """The eviction (or recoding) at the end of the sequence's stretch, all of which its table must cover.

        Its target is taken here: pages of the sequence's own that nobody else can read, new ones, and, where there are
        too few, such as only the prefix cache knew, which forgets them.
        """
        if (groups := self._pool.groups) is not None:
            return self._prepare_seat(sequence, groups)
        table, point = sequence.table[0], _point_of(sequence)
        movable, wanted = self._moved(sequence, point)
        target, taken = self._target(movable, wanted)
        sequence.table[0] = table + taken
        frames, seed, points = (*target, *taken), self._seed(sequence), self._points
        if isinstance(points, CodingPoints):
            return Recoding(sequence.id, movable, frames[: points.together], frames[points.together :])
        source = table[: self._pool.pages_for(point.slots)]
        return Compression(sequence.id, point.slots, point.kept, source, frames, point.queries, seed)

    def finish(self, sequence: Sequence, done: Compression | Recoding, counts: tuple[int, ...] | None = None) -> None:
        """It is done: the sequence keeps the target alone (and, of a recoding, what was not its source), the other
        pages are given back. `counts`: slots that each layer and head kept, where they are unequal."""
        slots, groups = _point_of(sequence).kept, self._pool.groups
        if groups is not None and isinstance(done, Compression):
            table = self._seat(sequence, done, counts, groups)
        else:
            table = done.target if isinstance(done, Compression) else table_after(sequence.table[0], done)
        kept = set(table)
        for page in reversed(sequence.table[0]):
            if page not in kept:
                self._pool.drop(page)
        sequence.table[0] = table
        sequence.kv_len[0] = slots
        sequence.stretch += 1
        sequence.registered = 0
        self._pool.register(sequence, slots)

    def _target(self, table: tuple[int, ...], wanted: int) -> tuple[list[int], tuple[int, ...]]:
        """So many pages to write to: own ones, forgotten if need be, and new ones."""
        own = self._pool.own(table)
        target = [page for page in own if not self._pool.is_known(page)][:wanted]
        fresh = min(wanted - len(target), self._pool.available)
        known = [page for page in own if self._pool.is_known(page)][: wanted - len(target) - fresh]
        self._pool.forget(known)
        return [*target, *known], tuple(self._pool.take() for _ in range(fresh))

    def _moved(self, sequence: Sequence, point: Point) -> tuple[tuple[int, ...], int]:
        """The pages that what happens at a point makes free, and how many others the sequence needs instead, until all
        its tokens so far are stored."""
        table, points = sequence.table[0], self._points
        wanted = self._pool.pages_for(self._slots_behind(sequence, point))
        if not isinstance(points, CodingPoints):
            return table, wanted
        entries = points.sources(sequence.stretch)
        return table[entries.start : entries.stop], max(points.together, wanted - (len(table) - len(entries)))

    def _slots_behind(self, sequence: Sequence, point: Point) -> int:
        return self._points.peak(point.kept, point.position, len(sequence.prompt), len(sequence.tokens))

    def _seed(self, sequence: Sequence) -> int:
        return int.from_bytes(stretches_of(sequence, self._points)[sequence.stretch + 1].root[:7], "little")

    @property
    def _points(self) -> Points | CodingPoints:
        if self._pool.points is None:
            raise RuntimeError("this pool has no points of eviction")
        return self._pool.points

    # Unequal counts

    def _prepare_seat(self, sequence: Sequence, groups: GroupPool) -> Compression:
        """What stays moves into sub-pages, of which as many are taken as there may be need for. Pages of the sequence's
        own are cut, but are its alone until the eviction is done."""
        table, point = sequence.table[0], _point_of(sequence)
        seed, stored, source = self._seed(sequence), [point.slots] * groups.layers, ()
        if sequence.is_seated:
            more = point.slots - sequence.kv_len[0]
            stored = [slots + more for slots in groups.stored_by_layer(sequence.seat)]
        else:
            source = table[: self._pool.pages_for(point.slots)]
            wanted = self._subpages_behind(sequence, point, groups)
            pages = -(-max(wanted - groups.subpages.free, 0) // groups.columns)
            target, taken = self._target(table, pages)
            free = groups.subpages.take(min(wanted, groups.subpages.free))
            sequence.seat = groups.open(np.concatenate([free, groups.subpages.cut([*target, *taken])]))
            for page in taken:
                self._pool.drop(page)  # is held by its sub-pages now
        budgets = self._points.budgets(point.kept, stored)
        return Compression(
            sequence.id, point.slots, point.kept, source, (), point.queries, seed, sequence.seat, budgets
        )

    def _seat(
        self, sequence: Sequence, done: Compression, counts: tuple[int, ...] | None, groups: GroupPool
    ) -> tuple[int, ...]:
        """From now on the sequence lies in the tables of its seat alone: none are left of its own."""
        point = _point_of(sequence)
        counts_N = groups.counts_of(done.seat, done.slots, done.budgets, counts)
        more = point.position < len(sequence.tokens)  # else nothing has to be kept for them
        groups.evict(done.seat, counts_N, self._subpages_behind(sequence, point, groups) if more else 0)
        return ()

    def _subpages_behind(self, sequence: Sequence, point: Point, groups: GroupPool) -> int:
        return groups.bound(self._slots_behind(sequence, point))


def _point_of(sequence: Sequence) -> Point:
    """The eviction that the sequence comes to next."""
    point = sequence.stretches[sequence.stretch].point
    if point is None:
        raise RuntimeError(f"sequence {sequence.id} comes to no eviction")
    return point
