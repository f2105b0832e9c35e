"""Names for the content of full pages, and the index that finds a page by its content.

The name of a page is a digest of its tokens chained to the digest of the page before it; the first page chains to the
tenant, so that tenants never share. The digest finds a page, equal tokens decide.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from runtime.sequence import Sequence

_DIGEST_BYTES = 16


class PrefixKey(NamedTuple):
    """What one full page holds: its tokens, and by the parent's digest all that came before them."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


def key_of(sequence: Sequence, index: int, page_tokens: int) -> PrefixKey:
    """Key of the sequence's full page `index`. Tokens never change once they are there, so keys are kept."""
    keys = sequence.keys
    while len(keys) <= index:
        start = len(keys) * page_tokens
        tokens = tuple(sequence.tokens[start : start + page_tokens])
        parent = keys[-1].digest if keys else digest(b"tenant", sequence.tenant.encode())
        keys.append(PrefixKey(digest(parent, array("q", tokens).tobytes()), parent, tokens))
    return keys[index]


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
