"""The search for an exponent between 0 and 1 whose error is least."""

from __future__ import annotations

from collections.abc import Callable

_COARSE = 4


def least(steps: int, error: Callable[[int], float], start: float = float("inf")) -> tuple[int | None, float]:
    """The step of 0 … `steps` with the least `error`, and that error; None if none is below `start`.

    Errors change little from step to step: first every fourth step is tried, then what lies around the best one, at
    half the distance each time.
    """
    errors = {step: error(step) for step in {*range(0, steps + 1, _COARSE), steps}}
    distance = _COARSE
    while distance > 1:
        distance //= 2
        best = min(errors, key=errors.__getitem__)
        for step in (best - distance, best + distance):
            if 0 <= step <= steps and step not in errors:
                errors[step] = error(step)
    best = min(errors, key=errors.__getitem__)
    return (best, errors[best]) if errors[best] < start else (None, start)
