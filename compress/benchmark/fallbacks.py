"""Fallbacks: layers for which the runtime has no fast path here, and why, put together by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MOST_NAMES = 2


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of layers under each reason (from name -> reason)."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def sentences(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for each reason."""
    return [sentence(reason, names) for reason, names in by_reason(reasons).items()]


def sentence(reason: str, names: Sequence[str]) -> str:
    """How many layers, which, and why."""
    named = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    return f"{len(names)} {'layer has' if len(names) == 1 else 'layers have'} no fast path ({named}): {reason}"
