"""Names for the content of full pages, and the index that finds a page by its content.

The name of a page is a digest of its tokens chained to the digest of the page before it; the first page chains to the
tenant, so that tenants never share. The digest finds a page, equal tokens decide.

An eviction begins a new stretch: the first slots hold what it left of all tokens before, those after them further
tokens. Its pages chain to a digest of the policy, the eviction and the tokens before it, so that they are found only by
sequences that come to the same eviction of the same tokens.

Where blocks of a sequence are coded as whole pages, a full page has the same name before and after, since the same
tokens are where they were; coded pages are named after the last full page that went into them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from kv_compress._coded_pages import CodingPoints

if TYPE_CHECKING:
    from kv_compress._budget import Point, Points
    from runtime.sequence import Sequence

_DIGEST_BYTES = 16


class PrefixKey(NamedTuple):
    """What one full page holds: its tokens, and by the parent's digest all that came before them."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Stretch:
    """What lies between two evictions: `slots` slots hold what is left of the tokens before `position`, those after
    them one token each. `point` ends it. Its pages' names chain to `root`; `keys` are those that were asked for."""

    root: bytes
    slots: int
    position: int
    point: Point | None
    coding: CodingPoints | None = None
    keys: list[PrefixKey] = field(default_factory=list)

    def slots_at(self, position: int) -> int:
        """Slots taken when all tokens before `position` are stored."""
        return self.slots + position - self.position

    def position_at(self, slots: int) -> int:
        """Tokens that are stored when so many slots are taken."""
        return self.position + slots - self.slots


def key_of(sequence: Sequence, index: int, page_tokens: int, stretch: Stretch | None = None) -> PrefixKey:
    """Key of the sequence's full page `index`, now or in another stretch. Tokens never change once they are there, so
    keys are kept."""
    stretch = stretch or sequence.stretches[sequence.stretch]
    if stretch.coding is not None and stretch.position:
        is_coded, index = stretch.coding.entry(index, stretch.coding.coded(stretch.position))
        if is_coded:
            return _coded_key(sequence, index, stretch.coding)
        stretch = sequence.stretches[0]
    keys = stretch.keys
    while len(keys) <= index:
        start = max(len(keys) * page_tokens, stretch.slots)  # slots before hold what an eviction left
        end = max((len(keys) + 1) * page_tokens, stretch.slots)
        tokens = tuple(sequence.tokens[stretch.position_at(start) : stretch.position_at(end)])
        parent = keys[-1].digest if keys else stretch.root
        keys.append(PrefixKey(digest(parent, array("q", tokens).tobytes()), parent, tokens))
    return keys[index]


def _coded_key(sequence: Sequence, number: int, coding: CodingPoints) -> PrefixKey:
    """Key of the sequence's coded page `number`, kept with the stretch that it begins."""
    keys = sequence.stretches[number // coding.together + 1].keys
    if not keys:
        first = coding.sinks + number // coding.together * coding.every
        parent = key_of(
            sequence, (first + coding.every) // coding.block - 1, coding.block, sequence.stretches[0]
        ).digest
        for index in range(coding.together):
            start = first + index * coding.page_tokens
            tokens = tuple(sequence.tokens[start : start + coding.page_tokens])
            keys.append(PrefixKey(digest(parent, f"coded {index} {coding.salt}".encode()), parent, tokens))
    return keys[number % coding.together]


def stretches_of(sequence: Sequence, points: Points | CodingPoints | None) -> list[Stretch]:
    """All stretches of the sequence that its tokens reach so far, from its beginning on; they are kept with it."""
    known = sequence.stretches
    coding = points if isinstance(points, CodingPoints) else None
    if not known:
        root = digest(b"tenant", sequence.tenant.encode())
        first = None if points is None else points.after(0, 0, len(sequence.prompt), sequence.longest)
        known.append(Stretch(root, 0, 0, first, coding))
    while points is not None and (point := known[-1].point) is not None and point.position <= len(sequence.tokens):
        last = known[-1]
        tokens = array("q", [*point, *sequence.tokens[last.position : point.position]])
        root = digest(last.root, points.salt.encode() + tokens.tobytes())
        after = points.after(point.kept, point.position, len(sequence.prompt), sequence.longest)
        known.append(Stretch(root, point.kept, point.position, after, coding))
    return known


def digest(parent: bytes, content: bytes) -> bytes:
    """Digest of `content` that comes after what `parent` stands for."""
    return blake2b(parent + content, digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """Which page holds what; at most one page per digest."""

    def __init__(self) -> None:
        self.content: dict[int, PrefixKey] = {}  # by page, to be read only
        self._page: dict[bytes, int] = {}

    def find(self, key: PrefixKey) -> int | None:
        """The page that holds exactly this."""
        page = self._page.get(key.digest)
        return page if page is not None and self.content[page] == key else None

    def add(self, page: int, key: PrefixKey) -> None:
        """Note what `page` holds, unless it or another page is known for it already."""
        if page not in self.content and key.digest not in self._page:
            self.content[page] = key
            self._page[key.digest] = page

    def remove(self, page: int) -> None:
        """Forget what `page` holds."""
        content = self.content.pop(page, None)
        if content is not None:
            del self._page[content.digest]

    def check_integrity(self) -> None:
        """RuntimeError if pages whose content is known cannot all be found by it."""
        if {content.digest: page for page, content in self.content.items()} != self._page:
            raise RuntimeError(f"the prefix index finds {self._page} but the pages hold {self.content}")
