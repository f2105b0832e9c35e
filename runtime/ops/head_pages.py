"""Pages of one key-value head each, in the memory of pages of all heads.

If the pages of all layers lie one after another, a token and head is a row of [layer, page, slot, head], and B slots of
one head are B rows that lie G rows apart. Attention that takes each sequence and head for itself reads them where they
are: a table holds first rows.

Shape suffixes: B slots of a page, G key-value heads of a layer, C numbers or bytes of codes of a head, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.ops.pages import Pages


@dataclass(frozen=True, eq=False)
class HeadPages(Pages):
    """`codes` [rows, 1, 1, C] of all layers. A page goes by its first row; the next slots are `apart` rows further
    each. `write` takes rows. Scales of fp8 are not in here (they are 1), since they are the layer's and head's.
    `layer` is the one whose turn it is."""

    layer: int = 0
    slots: int = 1
    apart: int = 1

    @property
    def block(self) -> int:
        """Slots of a page."""
        return self.slots

    @property
    def page_rows(self) -> int:
        """Rows from one page number to the next."""
        return 1

    @property
    def slot_rows(self) -> int:
        """Rows from one slot of a page to the next."""
        return self.apart

    def read(self, slot_S: Tensor) -> Tensor:
        """What slots (page * B + offset) hold [S, 1, D]."""
        return self.read_rows(slot_S // self.slots + slot_S % self.slots * self.apart)

    def read_rows(self, row_S: Tensor) -> Tensor:
        """What rows hold [S, 1, D]."""
        return super().read(row_S)


def split_layers(whole: Pages, count: int, scales: Sequence[Tensor | None], rotated: Sequence[bool]) -> list[Pages]:
    """The pages of `count` layers that lie one after another in `whole`, each with its pages of single heads."""
    rows = whole.codes.shape[0] * whole.block * whole.groups
    codes, numbers = whole.codes.view(rows, 1, 1, -1), whole.numbers
    numbers = None if numbers is None else numbers.view(rows, 1, 1, -1)
    found = []
    for layer, (scale_G, rotate) in enumerate(zip(scales, rotated, strict=True)):
        its_numbers = None if whole.numbers is None else whole.numbers.chunk(count)[layer]
        one = None if scale_G is None else torch.ones_like(scale_G[:1])
        heads = HeadPages(codes, whole.codec, numbers, one, rotate, layer=layer, slots=whole.block, apart=whole.groups)
        found.append(Pages(whole.codes.chunk(count)[layer], whole.codec, its_numbers, scale_G, rotate, heads=heads))
    return found
