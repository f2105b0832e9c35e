"""What the prefix cache has of a sequence's beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kv_compress._coded_pages import CodingPoints
from runtime.prefixes import PrefixIndex, Stretch, key_of, stretches_of
from runtime.recoding import resume

if TYPE_CHECKING:
    from kv_compress._budget import Points
    from runtime.sequence import Sequence


class Found(NamedTuple):
    """`pages` that hold a sequence's first `computed` tokens, in which `stretch`."""

    pages: tuple[int, ...]
    stretch: int
    computed: int


def look_up(sequence: Sequence, points: Points | CodingPoints | None, known: PrefixIndex, page_tokens: int) -> Found:
    """Pages that hold the beginning of the sequence's tokens, all but the last one's, whose logits are needed: a full
    hit leaves its page to be recomputed. What an eviction left goes before what was there, since it reaches further."""
    stretches = stretches_of(sequence, points)
    if isinstance(points, CodingPoints):
        return Found(*resume(sequence, points, _limit(sequence), known))
    for index in range(len(stretches) - 1, 0, -1):
        stretch = stretches[index]
        if (most := pages_to_look_up(sequence, stretch, page_tokens)) * page_tokens >= stretch.slots:
            pages = _leading(sequence, stretch, most, known, page_tokens)
            if pages and len(pages) * page_tokens >= stretch.slots:
                return Found(pages, index, stretch.position_at(len(pages) * page_tokens))
    most = pages_to_look_up(sequence, stretches[0], page_tokens)
    pages = _leading(sequence, stretches[0], most, known, page_tokens)
    return Found(pages, 0, len(pages) * page_tokens)


def pages_to_look_up(sequence: Sequence, stretch: Stretch, page_tokens: int) -> int:
    """Full pages of a stretch that may be used: before the last token, and the queries that its end wants."""
    limit = _limit(sequence)
    if stretch.point is not None:
        limit = min(limit, stretch.point.position - max(stretch.point.queries, 1))
    return max(stretch.slots_at(limit), 0) // page_tokens if limit >= stretch.position else 0


def _leading(sequence: Sequence, stretch: Stretch, most: int, known: PrefixIndex, page_tokens: int) -> tuple[int, ...]:
    """Leading pages of a stretch that are known."""
    found: list[int] = []
    for index in range(most):
        page = known.find(key_of(sequence, index, page_tokens, stretch))
        if page is None:
            break
        found.append(page)
    return tuple(found)


def _limit(sequence: Sequence) -> int:
    """Positions that may be taken from the cache: before the last token, and before logits that are wanted."""
    limit = len(sequence.tokens) - 1
    return limit if sequence.lookup_limit is None else min(limit, sequence.lookup_limit)
