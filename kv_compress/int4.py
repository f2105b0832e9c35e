"""Whole numbers of 4 bits: an fp16 scale and an fp16 lowest number for each token and head (Liu et al., 2024,
arXiv:2402.02750, code values so; keys, whose channels differ more, gain from a rotation first)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Int4:
    """number = lowest + code * scale, code in 0 … 15. A byte holds channels i (low bits) and i + width / 2."""

    name: ClassVar[str] = "int4"
    numbers: ClassVar[int] = 2
    """fp16 numbers beside the codes of a token and head: the scale and the lowest number."""

    def code_bytes(self, width: int) -> int:
        """Bytes of the codes of one token and head. `width` must be even, as that of rotary heads is."""
        return width // 2

    def row_bytes(self, width: int) -> int:
        """All bytes of one token and head."""
        return self.code_bytes(width) + 2 * self.numbers
