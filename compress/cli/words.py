"""Figures in words, the same everywhere: durations, shares, changes, intervals."""

from collections.abc import Sequence

NOTHING = "–"


def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figure(value: float | None) -> str:
    """Four significant digits, without an exponent where people read none: 12.3456 -> "12.35"."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    digits = max(0, 3 - _magnitude(value))
    return f"{value:.{digits}f}" if -4 <= _magnitude(value) < 7 else f"{value:.3g}"


def _magnitude(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def percent(share: float | None) -> str:
    """0.513 -> "51.3 %"."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def change(share: float | None, interval: Sequence[float] | None = None, unit: str = "%") -> str:
    """0.017, [0.012, 0.022] -> "+1.70 % [+1.20, +2.20]"."""
    if share is None:
        return ""
    text = f"{100 * share:+.2f} {unit}"
    if interval and None not in interval:
        text += f" [{', '.join(f'{100 * bound:+.2f}' for bound in interval)}]"
    return text
