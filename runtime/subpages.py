"""Sub-pages: pages cut into one piece for each layer and head, which any layer and head may use.

A sub-page holds as many slots as a page, of one head. It goes by the number of the row (one token and head) that is its
first, if the rows of all layers lie one after another in memory: the next slots' rows are `heads` further each. Pages
that are cut are taken from the block pool, and go back once all their sub-pages are free.

Shape suffixes: P pages, N layers times heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compress.core.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.blocks import BlockPool


class SubPages:
    """Those of one pool. `free`: how many are free in pages that are cut already."""

    def __init__(self, pool: BlockPool, layers: int, heads: int) -> None:
        self.per_page = layers * heads
        self.free = 0
        self._pool = pool
        self._page_rows = pool.page.tokens * heads
        self._layer_rows = pool.memory_pages * self._page_rows
        self._heads = heads
        if layers * self._layer_rows >= 1 << 31:
            raise ResourceError(
                f"{pool.pages:,} pages of {layers} layers have more than 2^31 keys, which no table of layers and heads "
                "can name",
                hint="give keys and values less memory",
            )
        column_N = np.arange(self.per_page)
        self._first_N = (column_N // heads * self._layer_rows + column_N % heads).astype(np.int64)
        self._free_PN = np.zeros((pool.pages, self.per_page), dtype=bool)
        self._free_P = np.zeros(pool.pages, dtype=np.int64)  # how many of each page
        self._is_cut_P = np.zeros(pool.pages, dtype=bool)

    @property
    def obtainable(self) -> int:
        """Sub-pages that can be had now, with pages of the pool cut."""
        return self.free + self.per_page * self._pool.available

    @property
    def pages(self) -> list[int]:
        """Pages that are cut."""
        return np.flatnonzero(self._is_cut_P).tolist()

    def take(self, count: int) -> np.ndarray:
        """So many sub-pages (int64), which must be obtainable. The fullest pages first, so that others empty."""
        while self.free < count:
            page = self._pool.take()
            self._is_cut_P[page] = True
            self._free_PN[page] = True
            self._free_P[page] = self.per_page
            self.free += self.per_page
        pages = np.flatnonzero(self._free_P)
        pages = pages[np.argsort(self._free_P[pages], kind="stable")]
        pages = pages[: np.searchsorted(np.cumsum(self._free_P[pages]), count) + 1] if count else pages[:0]
        index, column = (at[:count] for at in np.nonzero(self._free_PN[pages]))
        page = pages[index]
        self._free_PN[page, column] = False
        self._free_P[pages] -= np.bincount(index, minlength=len(pages))
        self.free -= count
        return self._first_N[column] + page * self._page_rows

    def cut(self, pages: Iterable[int]) -> np.ndarray:
        """All sub-pages of pages that somebody holds; they stay held until the sub-pages are given back."""
        listed = np.fromiter(pages, dtype=np.int64)
        for page in listed.tolist():
            self._pool.hold(page)
        self._is_cut_P[listed] = True
        return (listed[:, None] * self._page_rows + self._first_N).reshape(-1)

    def give(self, subpages: np.ndarray) -> None:
        """Back to those that are free; pages that are free as a whole go back to the pool."""
        page, column = self._place(subpages)
        if self._free_PN[page, column].any() or not self._is_cut_P[page].all():
            raise RuntimeError(f"sub-pages are given back that nobody holds: {subpages.tolist()}")
        self._free_PN[page, column] = True
        self._free_P += np.bincount(page, minlength=len(self._free_P))
        self.free += len(page)
        whole = np.flatnonzero(self._free_P == self.per_page)
        if len(whole):
            self.free -= self.per_page * len(whole)
            self._free_P[whole] = 0
            self._free_PN[whole] = False
            self._is_cut_P[whole] = False
            for number in whole.tolist():
                self._pool.drop(number)

    def check_integrity(self, held: np.ndarray) -> None:
        """RuntimeError unless each sub-page of a cut page is either free or among those that are `held`, once."""
        page, column = self._place(held)
        counted = self._free_PN.astype(np.int64)
        np.add.at(counted, (page, column), 1)
        if (counted != self._is_cut_P[:, None]).any():
            raise RuntimeError("a sub-page is lost, held twice, or free while it is held")
        if (self._free_PN.sum(1) != self._free_P).any() or self._free_P.sum() != self.free:
            raise RuntimeError(f"{self.free} sub-pages are free, counted were {self._free_P.sum()}")
        if (self._free_P == self.per_page).any():
            raise RuntimeError("a page whose sub-pages are all free was not given back")

    def _place(self, subpages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Page, and layer and head of the place in it."""
        layer, within = np.divmod(subpages.astype(np.int64), self._layer_rows)
        page, head = np.divmod(within, self._page_rows)
        return page, layer * self._heads + head
