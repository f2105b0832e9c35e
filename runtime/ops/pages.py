"""Pages of keys, or of values, of one layer: as they are, or as codes with what belongs to them.

Attention reads codes where they lie; scales go to scores and to probabilities. Who has no kernel for that reads rows as
numbers (`read`). A token and head is coded by itself when it is stored, so that nothing depends on other tokens.

Shape suffixes: P pages, B slots of a page, G key-value heads, D channels of a head, C numbers or bytes of codes of a
head, N fp16 numbers beside them, T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kv_compress._coding import decode, encode, hadamard
from runtime.ops.coded_pages import CodedPages

if TYPE_CHECKING:
    from runtime.ops.head_pages import HeadPages

__all__ = ["Pages", "as_pages", "turned"]


@dataclass(frozen=True, eq=False)
class Pages:
    """`codes` [P, B, G, C]: numbers themselves under "full", else codes of `codec` with fp16 `numbers` [P, B, G, N], or
    with the fp32 `scale_G` of fp8. `rotate`: what is stored here was rotated, and queries (outputs) must be, too.
    `heads`: the same memory as pages of single heads, where layers and heads keep unequal numbers of slots. `coded`:
    the same memory as pages that are coded as a whole; their slots come behind those of these pages."""

    codes: Tensor
    codec: str = "full"
    numbers: Tensor | None = None
    scale_G: Tensor | None = None
    rotate: bool = False
    heads: HeadPages | None = None
    coded: CodedPages | None = None

    @property
    def is_coded(self) -> bool:
        """Whether these are codes."""
        return self.codec != "full"

    @property
    def block(self) -> int:
        """Slots of a page."""
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.codes.shape[2]

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.codes.shape[3] * (2 if self.codec == "int4" else 1)

    @property
    def page_rows(self) -> int:
        """Rows (one token and head) from one page to the next."""
        return self.block * self.groups

    @property
    def slot_rows(self) -> int:
        """Rows from one slot of a page to the next."""
        return self.groups

    def tensors(self) -> Iterator[Tensor]:
        """All that lies in pages: what moves with a slot."""
        yield self.codes
        if self.numbers is not None:
            yield self.numbers

    def read(self, slot_S: Tensor) -> Tensor:
        """What slots hold, as numbers [S, G, D]: in the pages' own dtype, or fp32 from codes."""
        if self.coded is not None:
            return self._read_frames(slot_S, self.coded)
        codes_SGC = self.codes.flatten(0, 1).index_select(0, slot_S)
        if not self.is_coded:
            return codes_SGC
        numbers_SGN = None if self.numbers is None else self.numbers.flatten(0, 1).index_select(0, slot_S)
        return decode(self.codec, codes_SGC, numbers_SGN, self.scale_G)

    def write(self, x_TGD: Tensor, slot_T: Tensor) -> None:
        """Put numbers [T, G, D] into slots, coded if these pages are."""
        if self.coded is not None:  # pages lie apart
            self.codes[slot_T // self.block, slot_T % self.block] = x_TGD.to(self.codes.dtype)
            return
        if not self.is_coded:
            self.codes.flatten(0, 1).index_copy_(0, slot_T, x_TGD.to(self.codes.dtype))
            return
        codes_TGC, numbers_TGN = encode(self.codec, x_TGD, self.scale_G)
        self.codes.flatten(0, 1).index_copy_(0, slot_T, codes_TGC)
        if self.numbers is not None and numbers_TGN is not None:
            self.numbers.flatten(0, 1).index_copy_(0, slot_T, numbers_TGN)

    def _read_frames(self, slot_S: Tensor, coded: CodedPages) -> Tensor:
        """fp32, from full and coded pages."""
        first = self.codes.shape[0] * self.block  # slot of coded pages
        is_coded_S = slot_S >= first
        x_SGD = slot_S.new_empty((len(slot_S), self.groups, self.width), dtype=torch.float32)
        full_S = slot_S[~is_coded_S]
        x_SGD[~is_coded_S] = self.codes[full_S // self.block, full_S % self.block].float()
        x_SGD[is_coded_S] = coded.read(slot_S[is_coded_S] - first).float()
        return x_SGD


def as_pages(pages: Tensor | Pages) -> Pages:
    """A plain tensor [P, B, G, D] is pages of numbers."""
    return pages if isinstance(pages, Pages) else Pages(pages)


def turned(x_TGD: Tensor) -> Tensor:
    """`x_TGD` rotated, in its own dtype."""
    return hadamard(x_TGD.float()).to(x_TGD.dtype)
