"""Words: figures as a person reads them. What is not known is said in words, never as a zero or a blank."""

from collections.abc import Sequence

from compress.core.quantities import format_bytes

NOT_MEASURED = "not measured"
NONE = "–"

__all__ = [
    "NONE",
    "NOT_MEASURED",
    "between",
    "change",
    "duration",
    "format_bytes",
    "number",
    "percent",
    "signed_percent",
]


def number(value: float | None, digits: int = 4) -> str:
    """4 significant digits, without an exponent between 0.0001 and 1,000,000."""
    if value is None:
        return NOT_MEASURED
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return text.replace("-", "−")


def percent(share: float | None, digits: int = 3) -> str:
    """A share of one, in percent."""
    return NOT_MEASURED if share is None else f"{100 * share:.{digits}g} %".replace("-", "−")


def signed_percent(share: float | None) -> str:
    """A relative change with its sign; a factor where it is tenfold or more."""
    if share is None:
        return NOT_MEASURED
    return f"{100 * share:+.2f} %".replace("-", "−") if abs(share) < 10 else f"× {1 + share:.3g}"


def change(value: float | None) -> str:
    """A difference with its sign."""
    if value is None:
        return NOT_MEASURED
    return f"{'+' if value > 0 else ''}{number(value, 3)}"


def between(bounds: Sequence[float] | None, text=number) -> str:
    """An interval in words; empty if there is none."""
    return "" if not bounds else f"{text(bounds[0])} … {text(bounds[1])}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
