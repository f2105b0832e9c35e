"""What a page of keys and values is, and how many there are in each state."""

from __future__ import annotations

from dataclasses import dataclass

from compress.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class PageType:
    """What a page is: `bytes` of memory for the keys and values of `tokens` slots, all layers together."""

    name: str
    bytes: int
    tokens: int

    def __post_init__(self) -> None:
        for field in ("bytes", "tokens"):
            if getattr(self, field) < 1:
                raise UsageError(f"a page needs at least one of its {field}, not {getattr(self, field)}")


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Pages by state now, and what the prefix cache has done so far (hits, misses and evictions in pages)."""

    free: int
    cached: int
    owned: int
    hits: int
    misses: int
    hit_tokens: int
    evictions: int
