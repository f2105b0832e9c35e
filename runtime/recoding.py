"""Blocks of a sequence that are coded as whole pages, as far as tables and the prefix cache go: no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.prefixes import PrefixIndex, key_of, stretches_of

if TYPE_CHECKING:
    from kv_compress._coded_pages import CodingPoints
    from runtime.sequence import Sequence
    from runtime.step import Recoding


def resume(
    sequence: Sequence, points: CodingPoints, limit: int, known: PrefixIndex
) -> tuple[tuple[int, ...], int, int]:
    """Where a sequence can begin with what the prefix cache has: the pages, in which stretch, behind how many tokens.

    It must be able to go on exactly: behind the sinks coded pages, as many as there are at that position, behind them
    full ones up to it. Full pages that are coded by then may be gone long since, or the coded ones may be; then it
    begins further in front, if need be at the start. `limit`: tokens that may be taken.
    """
    stretches = stretches_of(sequence, points)
    for passed in range(points.passed(limit), -1, -1):
        stretch = stretches[passed]
        end = limit if stretch.point is None else min(limit, stretch.point.position - 1)
        pages: list[int] = []
        for index in range(stretch.slots_at(end) // points.block):
            page = known.find(key_of(sequence, index, points.block, stretch))
            if page is None:
                break
            pages.append(page)
        computed = stretch.position_at(len(pages) * points.block)
        if passed == 0 or computed >= stretch.position:
            return tuple(pages), passed, computed
    raise RuntimeError("a sequence can always begin at its start")


def table_after(table: tuple[int, ...], done: Recoding) -> tuple[int, ...]:
    """The table in which the coded pages stand for their sources, and the room for what comes at the end."""
    first = table.index(done.source[0])
    taken = {*done.target, *done.spare}
    behind = tuple(page for page in table[first + len(done.source) :] if page not in taken)
    return (*table[:first], *done.target, *behind, *done.spare)
