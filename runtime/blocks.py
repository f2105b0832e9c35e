"""The pool of pages: free list, reference counts, copy-on-write, and the cache of prefixes.

A page is in exactly one of three states: free; cached (nobody holds it, but its content is known and can be found
again); owned (one or more tables hold it). PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from compress.core.errors import ResourceError, UsageError
from runtime.prefixes import PrefixIndex, key_of
from runtime.sequence import Sequence


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


class BlockPool:
    """`pages` pages of one type. Sequences get pages from `begin`, `fork` and `reserve`, and lose them by `release`.

    Full pages are kept for sequences that begin alike. A page whose content is known is never written again.
    """

    def __init__(self, pages: int, page: PageType, *, prefix_cache: bool = True) -> None:
        if pages < 1:
            raise UsageError(f"a pool needs at least one page, not {pages}")
        self.pages = pages
        self.page = page
        self.prefix_cache = prefix_cache
        self._free = list(range(pages - 1, -1, -1))  # a stack: what was used last is used next
        self._references = [0] * pages
        self._owned = 0
        self._prefixes = PrefixIndex()
        self._known = self._prefixes.content  # by page: in it are the pages whose content is known
        self._page_tokens = page.tokens
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages, the least recently used first
        self._hits = self._misses = self._evictions = 0

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
        hit_tokens = self._hits * self.page.tokens
        return PoolStatistics(
            len(self._free), len(self._idle), self._owned, self._hits, self._misses, hit_tokens, self._evictions
        )

    def pages_for(self, slots: int) -> int:
        """Pages that `slots` slots take."""
        return -(-slots // self.page.tokens)

    # Prefixes

    def lookup(self, sequence: Sequence) -> tuple[int, ...]:
        """Pages that already hold the beginning of the sequence's tokens; changes nothing.

        The last token is never covered, because its logits are needed: a full hit leaves its page to be recomputed.
        """
        found: list[int] = []
        for index in range(self._pages_to_look_up(sequence)):
            page = self._prefixes.find(key_of(sequence, index, self.page.tokens))
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def _pages_to_look_up(self, sequence: Sequence) -> int:
        if not self.prefix_cache:
            return 0
        last = len(sequence.tokens) - 1
        limit = last if sequence.lookup_limit is None else min(last, sequence.lookup_limit)
        return max(limit, 0) // self.page.tokens

    def room_after(self, found: tuple[int, ...], slots: int) -> int:
        """Pages that stay available if `found` are shared and the rest of `slots` slots reserved; negative: too few."""
        idle = sum(1 for page in found if not self._references[page])
        return self.available - idle - (self.pages_for(slots) - len(found))

    def begin(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        """Start the sequence, which must hold no pages, on the pages that `lookup` just found."""
        self._share(sequence, found, len(found) * self.page.tokens)
        self._hits += len(found)
        self._misses += self._pages_to_look_up(sequence) - len(found)

    def fork(self, parent: Sequence, child: Sequence, computed: int) -> None:
        """Let `child`, which must hold no pages, share the pages of the parent's first `computed` positions."""
        self._share(child, parent.table[0][: self.pages_for(computed)], computed)

    def register(self, sequence: Sequence, slots: int) -> None:
        """Offer the full pages among the first `slots` slots to the prefix cache."""
        full = slots // self._page_tokens
        if full <= sequence.registered or not self.prefix_cache:
            return
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
            old, new = table[written], self._take()
            table = (*table[:written], new, *table[written + 1 :])
            copies = ((old, new),)
            self._drop(old)
        sequence.table[0] = table + tuple(self._take() for _ in range(missing))
        return copies

    def release(self, sequence: Sequence) -> None:
        """Give back all that the sequence holds, the only way to do so. Doing it twice is harmless."""
        for group, table in enumerate(sequence.table):
            for page in reversed(table):  # the end of a prefix is of use to fewer, so it is evicted first
                self._drop(page)
            sequence.table[group] = ()
            sequence.kv_len[group] = 0
        sequence.computed = sequence.registered = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """RuntimeError with what is wrong, unless pages, counts, tables (of all sequences alive) and cache agree."""
        holders: Counter[int] = Counter()
        for sequence in sequences:
            self._check_table(sequence)
            holders.update(sequence.table[0])
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
        if len(set(table)) != len(table) or max(sequence.registered, self.pages_for(stored)) > len(table):
            raise RuntimeError(f"sequence {sequence.id} stores {stored} slots in pages {table}")
        if sequence.computed > len(sequence.tokens):
            raise RuntimeError(f"sequence {sequence.id} computed more positions than it has tokens")
        for index, page in enumerate(table[: sequence.registered]):
            content = self._known.get(page)
            if content is not None and content != key_of(sequence, index, self.page.tokens):
                raise RuntimeError(f"page {page} of sequence {sequence.id} holds other tokens than the cache says")

    def _share(self, sequence: Sequence, pages: tuple[int, ...], slots: int) -> None:
        if sequence.table[0]:
            raise RuntimeError(f"sequence {sequence.id} already holds pages")
        for page in pages:
            if not self._references[page]:
                del self._idle[page]
                self._owned += 1
            self._references[page] += 1
        sequence.table[0] = pages
        sequence.computed = sequence.kv_len[0] = slots
        sequence.registered = slots // self.page.tokens

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._prefixes.remove(page)
            self._evictions += 1
        self._references[page] = 1
        self._owned += 1
        return page

    def _drop(self, page: int) -> None:
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
