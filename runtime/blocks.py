"""The pool of pages: free list, reference counts, copy-on-write, and the cache of prefixes.

A page is in exactly one of three states: free; cached (nobody holds it, but its content is known and can be found
again); owned (one or more tables hold it). PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compress.core.errors import ResourceError, UsageError
from kv_compress._budget import Point, Points
from kv_compress._coded_pages import CodingPoints
from runtime.groups import GroupPool
from runtime.prefixes import PrefixIndex, Stretch, key_of, stretches_of
from runtime.recoding import resume, table_after
from runtime.sequence import Sequence
from runtime.step import Compression, Recoding, Row


@dataclass(frozen=True, slots=True)
class PageType:
    """What a page is: `bytes` of memory for the keys and values of `tokens` slots, all layers together."""

    name: str
    bytes: int
    tokens: int

    def __post_init__(self) -> None:
        for field in ("bytes", "tokens"):
            if getattr(self, field) < 1:
                raise UsageError(f"a page needs at least one of its {field}, not {getattr(self, field)}")


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Pages by state now, and what the prefix cache has done so far (hits, misses and evictions in pages)."""

    free: int
    cached: int
    owned: int
    hits: int
    misses: int
    hit_tokens: int
    evictions: int


class Found(NamedTuple):
    """What the prefix cache has of a sequence: `pages` that hold its first `computed` tokens, in which `stretch`."""

    pages: tuple[int, ...]
    stretch: int
    computed: int


class BlockPool:
    """`pages` pages of one type. Sequences get pages from `begin`, `fork` and `reserve`, and lose them by `release`.

    Full pages are kept for sequences that begin alike. A page whose content is known is never written again.
    `points` say where evictions happen; the scheduler sets them.
    """

    def __init__(self, pages: int, page: PageType, *, prefix_cache: bool = True) -> None:
        if pages < 1:
            raise UsageError(f"a pool needs at least one page, not {pages}")
        self.pages = pages
        self.page = page
        self.prefix_cache = prefix_cache
        self.points: Points | CodingPoints | None = None
        self.groups: GroupPool | None = None  # where layers and heads keep unequal numbers of slots
        self.memory_pages = pages  # that the memory of each layer has
        self._free = list(range(pages - 1, -1, -1))  # a stack: what was used last is used next
        self._references = [0] * pages
        self._owned = 0
        self._prefixes = PrefixIndex()
        self._known = self._prefixes.content  # by page: in it are the pages whose content is known
        self._page_tokens = page.tokens
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages, the least recently used first
        self._hits = self._misses = self._hit_tokens = self._evictions = 0

    @classmethod
    def from_memory(cls, memory_bytes: int, page: PageType, *, prefix_cache: bool = True) -> BlockPool:
        """As many pages as fit into `memory_bytes`; ResourceError if that is not even one."""
        if memory_bytes < page.bytes:
            raise ResourceError(
                f"{memory_bytes:,} bytes for keys and values hold no page of {page.bytes:,} bytes",
                hint="give the runtime more memory or choose a smaller block size",
            )
        return cls(memory_bytes // page.bytes, page, prefix_cache=prefix_cache)

    @property
    def slots(self) -> int:
        """Tokens that fit into the whole pool."""
        return self.pages * self.page.tokens

    @property
    def available(self) -> int:
        """Pages that can be had now: free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._idle)

    @property
    def statistics(self) -> PoolStatistics:
        """Counts as of now."""
        return PoolStatistics(
            len(self._free),
            len(self._idle),
            self._owned,
            self._hits,
            self._misses,
            self._hit_tokens,
            self._evictions,
        )

    def cut_for(self, layers: int, heads: int) -> None:
        """From the first eviction on, sequences have tables for each of so many layers and heads."""
        self.groups = GroupPool(self, layers, heads)

    def pages_for(self, slots: int) -> int:
        """Pages that `slots` slots take."""
        return -(-slots // self.page.tokens)

    # Prefixes

    def lookup(self, sequence: Sequence) -> Found:
        """Pages that already hold the beginning of the sequence's tokens; changes nothing.

        The last token is never covered, because its logits are needed: a full hit leaves its page to be recomputed.
        What an eviction left goes before what was there, since it reaches further.
        """
        stretches = stretches_of(sequence, self.points)
        if isinstance(self.points, CodingPoints):
            limit = self._limit(sequence) if self.prefix_cache else 0
            return Found(*resume(sequence, self.points, limit, self._prefixes))
        for index in range(len(stretches) - 1, 0, -1):
            stretch = stretches[index]
            if (most := self._pages_to_look_up(sequence, stretch)) * self._page_tokens >= stretch.slots:
                pages = self._find(sequence, stretch, most)
                if pages and len(pages) * self._page_tokens >= stretch.slots:
                    return Found(pages, index, stretch.position_at(len(pages) * self._page_tokens))
        pages = self._find(sequence, stretches[0], self._pages_to_look_up(sequence, stretches[0]))
        return Found(pages, 0, len(pages) * self._page_tokens)

    def _find(self, sequence: Sequence, stretch: Stretch, most: int) -> tuple[int, ...]:
        """Leading pages of a stretch that are known."""
        found: list[int] = []
        for index in range(most):
            page = self._prefixes.find(key_of(sequence, index, self.page.tokens, stretch))
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def _pages_to_look_up(self, sequence: Sequence, stretch: Stretch) -> int:
        """Full pages of a stretch that may be used: before the last token, and the queries that its end wants."""
        if not self.prefix_cache:
            return 0
        limit = self._limit(sequence)
        if stretch.point is not None:
            limit = min(limit, stretch.point.position - max(stretch.point.queries, 1))
        return max(stretch.slots_at(limit), 0) // self.page.tokens if limit >= stretch.position else 0

    def _limit(self, sequence: Sequence) -> int:
        """Positions that may be taken from the cache: before the last token, and before logits that are wanted."""
        limit = len(sequence.tokens) - 1
        return limit if sequence.lookup_limit is None else min(limit, sequence.lookup_limit)

    def room_after(self, found: Found, slots: int) -> int:
        """Pages that stay available if `found` are shared and the rest of `slots` slots reserved; negative: too few."""
        idle = sum(1 for page in found.pages if not self._references[page])
        return self.available - idle - (self.pages_for(slots) - len(found.pages))

    def begin(self, sequence: Sequence, found: Found) -> None:
        """Start the sequence, which must hold no pages, on the pages that `lookup` just found."""
        self._share(sequence, found.pages, found.stretch, found.computed)
        self._hits += len(found.pages)
        self._hit_tokens += found.computed
        stretch = sequence.stretches[found.stretch]
        self._misses += self._pages_to_look_up(sequence, stretch) - len(found.pages)

    def fork(self, parent: Sequence, child: Sequence, computed: int) -> bool:
        """Let `child`, which must hold no pages, share the pages of the parent's first `computed` positions. False, and
        nothing is done, if the parent has evicted from them, or evicts at other points than the child would, or if no
        pages are shared under the policy."""
        if parent.seat >= 0 or (isinstance(self.points, Points) and self.points.alone):
            return False
        stretches, index = stretches_of(child, self.points), parent.stretch
        stretch = stretches_of(parent, self.points)[index]
        if index:
            same = index < len(stretches) and stretches[index].root == stretch.root
            if not same or computed < stretch.position:
                return False
        if (point := stretches[index].point) is not None and computed > point.position - max(point.queries, 1):
            return False
        pages = parent.table[0][: self.pages_for(stretch.slots_at(computed))]
        self._share(child, pages, index, computed)
        return True

    def register(self, sequence: Sequence, slots: int) -> None:
        """Offer the full pages among the first `slots` slots to the prefix cache."""
        full = slots // self._page_tokens
        if full <= sequence.registered or not self.prefix_cache or sequence.is_seated:
            return
        if not sequence.stretches:
            stretches_of(sequence, self.points)
        for index in range(sequence.registered, full):
            self._prefixes.add(sequence.table[0][index], key_of(sequence, index, self.page.tokens))
        sequence.registered = full

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Take pages (all of them by default) out of the prefix cache: their content is not to be trusted any more."""
        for page in range(self.pages) if pages is None else pages:
            self._prefixes.remove(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    # Pages

    def crowded(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those that need `reserve` before they can write one more slot; the others do not, whatever is reserved for
        these: their page is there, nobody else's, and not known. For all at once, since 256 of them ask in each step.
        """
        page_tokens, references, known = self._page_tokens, self._references, self._known
        found = []
        if self.groups is not None:
            sequences = list(sequences)
            seats = [sequence.seat for sequence in sequences if sequence.is_seated]
            if seats and self.groups.grow(seats):
                sequences = [sequence for sequence in sequences if not sequence.is_seated]
        for sequence in sequences:
            table = sequence.table[0]
            index = sequence.kv_len[0] // page_tokens
            if index >= len(table) or references[page := table[index]] > 1 or page in known:
                found.append(sequence)
        return found

    def reserve(self, sequence: Sequence, slots: int) -> tuple[tuple[int, int], ...] | None:
        """Make the table cover `slots` slots, all from `kv_len` on writable.

        Returns the page copies (from, to) that must be done before anything is written, or None, with nothing changed,
        if there are too few pages.
        """
        if self.groups is not None and sequence.is_seated:
            return () if self.groups.extend(sequence.seat, slots - sequence.kv_len[0]) else None
        table = sequence.table[0]
        missing = -(-slots // self._page_tokens) - len(table)
        written = sequence.kv_len[0] // self._page_tokens  # only this page can be somebody else's too
        copied = written < len(table) and (self._references[table[written]] > 1 or table[written] in self._known)
        if missing <= 0 and not copied:
            return ()
        if max(missing, 0) + copied > self.available:
            return None
        copies = ()
        if copied:
            old, new = table[written], self.take()
            table = (*table[:written], new, *table[written + 1 :])
            copies = ((old, new),)
            self.drop(old)
        sequence.table[0] = table + tuple(self.take() for _ in range(missing))
        return copies

    def can_evict(self, sequence: Sequence) -> bool:
        """Whether there are pages for what `prepare_eviction` does: shared ones are never written."""
        if sequence.is_seated:  # each table keeps some of its own pages
            return True
        point = _point_of(sequence)
        movable, wanted = self._moved(sequence, point)
        own = sum(1 for page in movable if self._references[page] == 1)
        if self.groups is not None:
            short = self._subpages_behind(sequence, point) - self.groups.subpages.free
            return (own + self.available) * self.groups.columns >= short
        return own + self.available >= wanted

    def prepare_eviction(self, sequence: Sequence) -> Compression | Recoding:
        """The eviction (or recoding) at the end of the sequence's stretch, all of which its table must cover.

        Its target is taken here: pages of the sequence's own that nobody else can read, new ones, and, where there are
        too few, such as only the prefix cache knew, which forgets them.
        """
        if self.groups is not None:
            return self._prepare_seat(sequence, self.groups)
        table, point = sequence.table[0], _point_of(sequence)
        movable, wanted = self._moved(sequence, point)
        target, taken = self._target(movable, wanted)
        sequence.table[0] = table + taken
        frames, seed = (*target, *taken), self._seed(sequence)
        if isinstance(self.points, CodingPoints):
            return Recoding(sequence.id, movable, frames[: self.points.together], frames[self.points.together :])
        source = table[: self.pages_for(point.slots)]
        return Compression(sequence.id, point.slots, point.kept, source, frames, point.queries, seed)

    def _target(self, table: tuple[int, ...], wanted: int) -> tuple[list[int], tuple[int, ...]]:
        """So many pages to write to: own ones, forgotten if need be, and new ones."""
        own = [page for page in table if self._references[page] == 1]
        target = [page for page in own if page not in self._known][:wanted]
        fresh = min(wanted - len(target), self.available)
        known = [page for page in own if page in self._known][: wanted - len(target) - fresh]
        for page in known:
            self._prefixes.remove(page)
        return [*target, *known], tuple(self.take() for _ in range(fresh))

    def _prepare_seat(self, sequence: Sequence, groups: GroupPool) -> Compression:
        """The same where counts are unequal: what stays moves into sub-pages, of which as many are taken as there may
        be need for. Pages of the sequence's own are cut, but are its alone until the eviction is done."""
        table, point = sequence.table[0], _point_of(sequence)
        seed, stored, source = self._seed(sequence), [point.slots] * groups.layers, ()
        if sequence.is_seated:
            more = point.slots - sequence.kv_len[0]
            stored = [slots + more for slots in groups.stored_by_layer(sequence.seat)]
        else:
            source = table[: self.pages_for(point.slots)]
            wanted = self._subpages_behind(sequence, point)
            pages = -(-max(wanted - groups.subpages.free, 0) // groups.columns)
            target, taken = self._target(table, pages)
            free = groups.subpages.take(min(wanted, groups.subpages.free))
            sequence.seat = groups.open(np.concatenate([free, groups.subpages.cut([*target, *taken])]))
            for page in taken:
                self.drop(page)  # is held by its sub-pages now
        budgets = self._points.budgets(point.kept, stored)
        return Compression(
            sequence.id, point.slots, point.kept, source, (), point.queries, seed, sequence.seat, budgets
        )

    def _seed(self, sequence: Sequence) -> int:
        return int.from_bytes(stretches_of(sequence, self.points)[sequence.stretch + 1].root[:7], "little")

    def _moved(self, sequence: Sequence, point: Point) -> tuple[tuple[int, ...], int]:
        """The pages that what happens at a point makes free, and how many others the sequence needs instead."""
        table, wanted = sequence.table[0], self._pages_behind(sequence, point)
        if not isinstance(self.points, CodingPoints):
            return table, wanted
        entries = self.points.sources(sequence.stretch)
        return table[entries.start : entries.stop], max(self.points.together, wanted - (len(table) - len(entries)))

    def _pages_behind(self, sequence: Sequence, point: Point) -> int:
        """Pages that the sequence needs after a point, until all its tokens so far are stored."""
        return self.pages_for(self._slots_behind(sequence, point))

    def _slots_behind(self, sequence: Sequence, point: Point) -> int:
        return self._points.peak(point.kept, point.position, len(sequence.prompt), len(sequence.tokens))

    def _subpages_behind(self, sequence: Sequence, point: Point) -> int:
        return 0 if self.groups is None else self.groups.bound(self._slots_behind(sequence, point))

    @property
    def _points(self) -> Points | CodingPoints:
        if self.points is None:
            raise RuntimeError("this pool has no points of eviction")
        return self.points

    def stored(self, rows: Iterable[Row]) -> None:
        """The rows of a step are stored, as far as tables of each layer and head go."""
        seats = [(row.seat, len(row.tokens)) for row in rows if row.seat >= 0]
        if self.groups is not None and seats:
            self.groups.stored(*zip(*seats, strict=True))

    def evict(self, sequence: Sequence, done: Compression | Recoding, counts: tuple[int, ...] | None = None) -> None:
        """The eviction is done: the sequence keeps the target alone (and, of a recoding, what was not its source), the
        other pages are given back. `counts`: slots that each layer and head kept, where they are unequal."""
        if self.groups is not None and isinstance(done, Compression):
            self._seat(sequence, done, counts, self.groups)
            return
        slots = _point_of(sequence).kept
        table = done.target if isinstance(done, Compression) else table_after(sequence.table[0], done)
        kept = set(table)
        for page in reversed(sequence.table[0]):
            if page not in kept:
                self.drop(page)
        sequence.table[0] = table
        sequence.kv_len[0] = slots
        sequence.stretch += 1
        sequence.registered = 0
        self.register(sequence, slots)

    def _seat(self, sequence: Sequence, done: Compression, counts: tuple[int, ...] | None, groups: GroupPool) -> None:
        """From now on the sequence lies in the tables of its seat alone."""
        point = _point_of(sequence)
        counts_N = groups.counts_of(done.seat, done.slots, done.budgets, counts)
        more = point.position < len(sequence.tokens)  # else nothing has to be kept for them
        groups.evict(done.seat, counts_N, self._subpages_behind(sequence, point) if more else 0)
        for page in reversed(sequence.table[0]):
            self.drop(page)
        sequence.table[0] = ()
        sequence.kv_len[0] = done.kept
        sequence.stretch += 1
        sequence.registered = 0

    def release(self, sequence: Sequence) -> None:
        """Give back all that the sequence holds, the only way to do so. Doing it twice is harmless."""
        if self.groups is not None and sequence.seat >= 0:
            self.groups.close(sequence.seat)
            sequence.seat = -1
        for group, table in enumerate(sequence.table):
            for page in reversed(table):  # the end of a prefix is of use to fewer, so it is evicted first
                self.drop(page)
            sequence.table[group] = ()
            sequence.kv_len[group] = 0
        sequence.computed = sequence.registered = sequence.stretch = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """RuntimeError with what is wrong, unless pages, counts, tables (of all sequences alive) and cache agree."""
        holders: Counter[int] = Counter()
        alive = list(sequences)
        for sequence in alive:
            self._check_table(sequence)
            holders.update(sequence.table[0])
        if self.groups is not None:
            self.groups.check_integrity(sequence.seat for sequence in alive if sequence.seat >= 0)
            holders.update(self.groups.subpages.pages)
        if list(map(holders.__getitem__, range(self.pages))) != self._references:
            raise RuntimeError(f"reference counts {self._references} but the tables hold {sorted(holders.items())}")
        free, idle = set(self._free), set(self._idle)
        if len(free) != len(self._free) or free & idle or (free | idle) & holders.keys():
            raise RuntimeError(f"a page is in two states: free {self._free}, cached {idle}, owned {set(holders)}")
        if len(free) + len(idle) + self._owned != self.pages or self._owned != len(holders):
            raise RuntimeError(f"{len(free)} free + {len(idle)} cached + {self._owned} owned of {self.pages} pages")
        self._prefixes.check_integrity()
        known = set(self._known)
        if free & known or not idle <= known:
            raise RuntimeError(f"known content in pages {sorted(known)}, free {self._free}, cached {idle}")

    def _check_table(self, sequence: Sequence) -> None:
        table, stored = sequence.table[0], sequence.kv_len[0]
        pages = 0 if sequence.is_seated else max(sequence.registered, self.pages_for(stored))
        if len(set(table)) != len(table) or pages > len(table):
            raise RuntimeError(f"sequence {sequence.id} stores {stored} slots in pages {table}")
        if sequence.computed > len(sequence.tokens):
            raise RuntimeError(f"sequence {sequence.id} computed more positions than it has tokens")
        stretch = stretches_of(sequence, self.points)[sequence.stretch]
        if (table or sequence.is_seated) and stored != stretch.slots_at(sequence.computed):
            raise RuntimeError(f"sequence {sequence.id} stores {stored} slots for {sequence.computed} positions")
        for index, page in enumerate(table[: sequence.registered]):
            content = self._known.get(page)
            if content is not None and content != key_of(sequence, index, self.page.tokens):
                raise RuntimeError(f"page {page} of sequence {sequence.id} holds other tokens than the cache says")

    def _share(self, sequence: Sequence, pages: tuple[int, ...], stretch: int, computed: int) -> None:
        if sequence.table[0]:
            raise RuntimeError(f"sequence {sequence.id} already holds pages")
        for page in pages:
            if not self._references[page]:
                del self._idle[page]
                self._owned += 1
            self._references[page] += 1
        sequence.table[0] = pages
        sequence.stretch = stretch
        sequence.computed = computed
        sequence.kv_len[0] = sequence.stretches[stretch].slots_at(computed)
        sequence.registered = sequence.kv_len[0] // self.page.tokens

    def take(self) -> int:
        """A page, which must be available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._prefixes.remove(page)
            self._evictions += 1
        self._references[page] = 1
        self._owned += 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is held."""
        self._references[page] += 1

    def drop(self, page: int) -> None:
        """One holder less."""
        if self._references[page] < 1:
            raise RuntimeError(f"page {page} is given back but nobody holds it")
        self._references[page] -= 1
        if self._references[page]:
            return
        self._owned -= 1
        if page in self._known:
            self._idle[page] = None
        else:
            self._free.append(page)


def _point_of(sequence: Sequence) -> Point:
    """The eviction that the sequence comes to next."""
    point = sequence.stretches[sequence.stretch].point
    if point is None:
        raise RuntimeError(f"sequence {sequence.id} comes to no eviction")
    return point
