"""Floats of 8 bits (e4m3): one scale for a whole layer, or one for each of its heads, found on calibration text.

The format: Micikevicius et al., 2022, arXiv:2209.05433. Scales are powers of two: a float's relative precision gains
nothing from a finer choice, and a power of two is the same number in every dtype that a file may keep it in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, slots=True)
class Fp8:
    """number = float * scale. Nothing is stored beside the codes."""

    name: ClassVar[str] = "fp8"
    numbers: ClassVar[int] = 0

    def code_bytes(self, width: int) -> int:
        """Bytes of the codes of one token and head."""
        return width

    def row_bytes(self, width: int) -> int:
        """All bytes of one token and head."""
        return width


def scale_for(largest: float) -> float:
    """The least power of two with which no number up to `largest` is too large; 1 where nothing was seen."""
    return 2.0 ** math.ceil(math.log2(largest / LARGEST)) if 0 < largest < math.inf else 1.0
