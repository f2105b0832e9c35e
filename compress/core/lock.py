"""FolderLock: one process at a time works in a folder; the others are told who does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from compress.core.errors import LockError
from compress.core.files import io_errors

LOCK_NAME = "lock"
HOLDER_NAME = "lock.holder"


class FolderLock:
    """Hold `folder` for this process: `with FolderLock(folder): …`. LockError names the holder's pid and command.

    The operating system lets go of the lock of a dead process, so a stale lock is taken over without asking.
    The folder must exist; whoever removes it while holding the lock removes the lock's two files with it.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / HOLDER_NAME
        self._lock = FileLock(folder / LOCK_NAME, timeout=0)

    def __enter__(self) -> FolderLock:
        with io_errors("lock the folder", self._holder.parent):
            try:
                self._lock.acquire()
            except Timeout:
                raise self._held() from None
            # Plain, not durable: it says who holds the lock now and means nothing after a crash.
            self._holder.write_text(json.dumps({"pid": os.getpid(), "command": " ".join(sys.argv)}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _held(self) -> LockError:
        who = "another process"
        try:
            holder = json.loads(self._holder.read_text())
            who = f"process {holder['pid']} ({holder['command']})"
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it is just starting or leaving
        return LockError(
            f"{who} is working on this output",
            where=str(self._holder.parent),
            hint="wait for it or choose another --output",
        )
