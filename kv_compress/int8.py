"""Whole numbers of 8 bits: one fp16 scale for each token and head, symmetric around zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Int8:
    """number = code * scale, code in -127 … 127. Twice to four times the tokens at next to no loss."""

    name: ClassVar[str] = "int8"
    numbers: ClassVar[int] = 1
    """fp16 numbers beside the codes of a token and head: the scale."""

    def code_bytes(self, width: int) -> int:
        """Bytes of the codes of one token and head."""
        return width

    def row_bytes(self, width: int) -> int:
        """All bytes of one token and head."""
        return self.code_bytes(width) + 2 * self.numbers
