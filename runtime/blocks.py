"""The pool of pages: free list, reference counts, copy-on-write, and the cache of prefixes.

A page is in exactly one of three states: free; cached (nobody holds it, but its content is known and can be found
again); owned (one or more tables hold it). PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from compress.core.errors import ResourceError, UsageError
from kv_compress._budget import Points
from kv_compress._coded_pages import CodingPoints
from runtime.evictions import Evictions
from runtime.groups import GroupPool
from runtime.lookup import Found, look_up, pages_to_look_up
from runtime.page import PageType, PoolStatistics
from runtime.prefixes import PrefixIndex, key_of, stretches_of
from runtime.sequence import Sequence
from runtime.step import Row


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
        self.evictions = Evictions(self)
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
        so_far = self._hits, self._misses, self._hit_tokens, self._evictions
        return PoolStatistics(len(self._free), len(self._idle), self._owned, *so_far)

    def cut_for(self, layers: int, heads: int) -> None:
        """From the first eviction on, sequences have tables for each of so many layers and heads."""
        self.groups = GroupPool(self, layers, heads)

    def pages_for(self, slots: int) -> int:
        """Pages that `slots` slots take."""
        return -(-slots // self.page.tokens)

    # Prefixes

    def lookup(self, sequence: Sequence) -> Found:
        """Pages that already hold the beginning of the sequence's tokens; changes nothing."""
        stretches_of(sequence, self.points)  # `begin` wants them in any case
        if not self.prefix_cache:
            return Found((), 0, 0)
        return look_up(sequence, self.points, self._prefixes, self._page_tokens)

    def room_after(self, found: Found, slots: int) -> int:
        """Pages that stay available if `found` are shared and the rest of `slots` slots reserved; negative: too few."""
        idle = sum(1 for page in found.pages if not self._references[page])
        return self.available - idle - (self.pages_for(slots) - len(found.pages))

    def begin(self, sequence: Sequence, found: Found) -> None:
        """Start the sequence, which must hold no pages, on the pages that `lookup` just found."""
        self._share(sequence, found.pages, found.stretch, found.computed)
        self._hits += len(found.pages)
        self._hit_tokens += found.computed
        if self.prefix_cache:
            stretch = sequence.stretches[found.stretch]
            self._misses += pages_to_look_up(sequence, stretch, self._page_tokens) - len(found.pages)

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

    def stored(self, rows: Iterable[Row]) -> None:
        """The rows of a step are stored, as far as tables of each layer and head go."""
        seats = [(row.seat, len(row.tokens)) for row in rows if row.seat >= 0]
        if self.groups is not None and seats:
            self.groups.stored(*zip(*seats, strict=True))

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

    def own(self, pages: Iterable[int]) -> list[int]:
        """Those that one table alone holds."""
        return [page for page in pages if self._references[page] == 1]

    def is_known(self, page: int) -> bool:
        """Whether the prefix cache knows what is in it: then it is not written."""
        return page in self._known

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
