"""Amounts as people write them: 120MB and 4GiB become bytes, 2% becomes 0.02."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

_UNITS = {"B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


def parse_size(value: Any) -> int:
    """Bytes of "120MB" (decimal), "4GiB" (binary) or a plain whole number of bytes; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _BY_LOWER:
        raise ValueError(f"should be a size such as 120MB or 4GiB, not {value!r}")
    return int(float(match[1]) * _BY_LOWER[match[2].lower()])


def parse_fraction(value: Any) -> float:
    """0.02 of "2%" or 0.02; ValueError for anything else. A bare number above 1 is refused: it was meant as percent."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        return float(match[1]) / 100
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"should be a percentage such as 2%, not {value!r}")
    if not 0 <= value <= 1:
        meant = f": write {value}% or {value / 100}" if value > 1 else ""
        raise ValueError(f"{value} is neither a percentage nor a fraction between 0 and 1{meant}")
    return float(value)


def format_bytes(count: float) -> str:
    """1536 -> "1.54 kB": three figures, decimal units, as disks and hubs count."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(ge=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?\s*([KkMmGgTt][Ii]?)?[Bb]$"},
            ],
            "description": "bytes, or a size such as 120MB (decimal) or 4GiB (binary)",
        }
    ),
]
"""Bytes, written as a whole number or a size."""

Fraction = Annotated[
    float,
    BeforeValidator(parse_fraction),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?\s*%$"},
            ],
            "description": "a percentage such as 2%, or a fraction such as 0.02",
        }
    ),
]
"""A share of one, written as a percentage or a fraction."""
