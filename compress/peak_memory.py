"""PeakMemory: the highest anonymous memory of this process over a stretch of work. Pages mapped from files are not ours
to hold (the kernel drops them when memory is short), so they are not counted."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; all resident memory where the system does not tell them apart."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return psutil.Process().memory_info().rss


class PeakMemory:
    """Samples every `interval_seconds` in a thread: `with PeakMemory() as memory: …; memory.peak_bytes`."""

    def __init__(self, interval_seconds: float = 0.05) -> None:
        self.start_bytes = 0
        self.peak_bytes = 0
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._note()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self._note()

    def _note(self) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
