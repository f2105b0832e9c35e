"""Where zeros may lie: anywhere, or N weights kept of M neighbours along the input channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPREAD = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")


@dataclass(frozen=True, slots=True)
class Spread:
    """`kept` weights of each `among` neighbours may be other than zero."""

    kept: int
    among: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.among


def parse_pattern(pattern: str) -> Spread | None:
    """None for "unstructured". ValueError says what a pattern looks like."""
    if pattern == "unstructured":
        return None
    match = _SPREAD.fullmatch(pattern)
    if match is None:
        raise ValueError(f"{pattern!r} is no pattern: write unstructured, or N:M in quotes, such as '2:4'")
    kept, among = int(match[1]), int(match[2])
    if not 0 < kept < among:
        raise ValueError(f"pattern {pattern!r} keeps {kept} of {among}: it should keep some, and fewer than all")
    return Spread(kept, among)
