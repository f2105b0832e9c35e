"""One run per folder: the second is told who holds it, a dead holder is taken over."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.core.errors import LockError
from compress.core.lock import HOLDER_NAME, FolderLock

HOLD = """
import pathlib, sys
from compress.core.lock import FolderLock
with FolderLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_elsewhere(folder: Path) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.getcwd()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def test_the_second_is_refused_and_told_who(tmp_path: Path) -> None:
    child = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(LockError, match=f"process {child.pid} ") as caught, FolderLock(tmp_path):
            pass
        assert caught.value.exit_code == 4
    finally:
        child.communicate(b"")
    with FolderLock(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = hold_elsewhere(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / HOLDER_NAME).read_text())["pid"] == os.getpid()


def test_a_holder_that_left_no_name_is_reported_all_the_same(tmp_path: Path) -> None:
    child = hold_elsewhere(tmp_path)
    try:
        (tmp_path / HOLDER_NAME).write_text("{")
        with pytest.raises(LockError, match="another process"), FolderLock(tmp_path):
            pass
    finally:
        child.communicate(b"")
