"""One Ctrl-C lets the unit at work finish, a second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from compress.core.events import Listener, Notice


@contextmanager
def units_finish(events: Listener) -> Iterator[Callable[[], None]]:
    """Within the block, the first SIGINT only takes note; the callable given raises KeyboardInterrupt if there was one.

    Call it where a unit is durable. Outside the main thread nothing is changed, since signals arrive there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = threading.Event()

    def take_note(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        events(Notice("stopping after this block; press Ctrl-C again to stop at once", level="warning"))

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, take_note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
