"""Pages that are coded as a whole, of keys or of values of one layer, and where in a pool a sequence's tokens lie.

Shape suffixes: P pages, N tokens of a coded page, B of a full one, G key-value heads, D channels of a head, C numbers
or bytes of codes of a head, X numbers beside them, S slots, K tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_compress._channels import decode_channels, encode_channels
from kv_compress._coding import decode, encode


@dataclass(frozen=True, eq=False)
class CodedPages:
    """`codes` [P, N, G, C] under `codec`, with fp16 `numbers`: [P, N, G, X] of each token, or, with `channels`,
    [P, 2, G, D] scales and lowest numbers of each page; fp8 has the fp32 `scale_G`."""

    codes: Tensor
    codec: str
    numbers: Tensor | None = None
    scale_G: Tensor | None = None
    channels: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a page."""
        return self.codes.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """All that lies in pages."""
        yield self.codes
        if self.numbers is not None:
            yield self.numbers

    def read(self, slot_S: Tensor) -> Tensor:
        """What slots (page * N + offset) hold, as numbers [S, G, D]: fp32, or the pages' own where they are full."""
        page_S, offset_S = slot_S // self.tokens, slot_S % self.tokens
        codes_SGC = self.codes[page_S, offset_S]
        if self.codec == "full":
            return codes_SGC
        if self.channels and self.numbers is not None:
            return decode_channels(self.codec, codes_SGC, self.numbers[page_S])
        return decode(
            self.codec, codes_SGC, None if self.numbers is None else self.numbers[page_S, offset_S], self.scale_G
        )

    def write(self, x_NGD: Tensor, page: int) -> None:
        """Put a page's numbers [N, G, D] there, coded."""
        if self.codec == "full":
            self.codes[page] = x_NGD
            return
        if self.channels:
            codes_NGC, numbers = encode_channels(self.codec, x_NGD)
        else:
            codes_NGC, numbers = encode(self.codec, x_NGD, self.scale_G)
        self.codes[page] = codes_NGC
        if self.numbers is not None and numbers is not None:
            self.numbers[page] = numbers


@dataclass(frozen=True, slots=True)
class Frames:
    """A pool of `pages` frames of equal bytes, each a full page of `block` tokens or a coded one of `page_tokens`. In
    every sequence the first `sinks` tokens (a multiple of block) lie in full pages, then come coded ones.

    Slots of a pool: those of full pages first (page * block + offset), behind them those of coded ones.
    """

    pages: int
    block: int
    page_tokens: int
    sinks: int

    def coded(self, positions: Tensor, slots: Tensor) -> Tensor:
        """Coded pages of sequences that store so many tokens in so many slots."""
        return (positions - slots) // (self.page_tokens - self.block)

    def slots(self, table_SP: Tensor, coded_S1: Tensor, index_SK: Tensor) -> Tensor:
        """Where in the pool the tokens at these positions of sequences lie, whose first so many pages are coded."""
        behind_SK = index_SK - self.sinks
        past_SK = coded_S1 * self.page_tokens  # tokens of coded pages
        is_coded_SK = (behind_SK >= 0) & (behind_SK < past_SK)
        full_SK = torch.where(behind_SK < 0, index_SK, index_SK - coded_S1 * (self.page_tokens - self.block))
        number_SK, offset_SK = behind_SK // self.page_tokens, behind_SK % self.page_tokens
        entry_SK = torch.where(is_coded_SK, self.sinks // self.block + number_SK, full_SK // self.block)
        page_SK = table_SP.gather(1, entry_SK)
        return torch.where(
            is_coded_SK,
            self.pages * self.block + page_SK * self.page_tokens + offset_SK,
            page_SK * self.block + full_SK % self.block,
        )
