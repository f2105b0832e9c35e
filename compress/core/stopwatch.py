"""The time that a stage takes in this process, in laps: each ends where something is durable, and the next begins."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return round(seconds, 3)
