"""Reads strace's log of a run: which calls changed the output, in which order, and whether renames were durable."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")
_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")
_ON_DESCRIPTOR = ("write", "pwrite64", "ftruncate", "fsync", "fdatasync")
OPENS = ("openat", "open", "creat")
RENAMES = ("rename", "renameat", "renameat2")
SYNCS = ("fsync", "fdatasync")
REMOVALS = ("unlink", "unlinkat", "rmdir")


@dataclass(frozen=True)
class Call:
    """A system call that changes something under the watched folder: the `when`-th of its name in the main thread.

    `path` is what it acts on (a rename: what it makes), `source` what a rename or link starts from. `nth` counts the
    calls of this name on this path, reading ones included.
    """

    name: str
    when: int
    path: Path
    source: Path | None = None
    nth: int = 1

    @property
    def point(self) -> str:
        return f"{self.name}:{self.when}"


def read_trace(log: Path, pid: int, root: Path) -> list[Call]:
    """Calls of the main thread that change something under `root`, in order."""
    counts: dict[str, int] = {}
    on_path: dict[tuple[str, Path], int] = {}
    calls: list[Call] = []
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None or int(match[1]) != pid:
            continue
        name, arguments = match[2], match[3]
        counts[name] = counts.get(name, 0) + 1
        paths = _paths(name, arguments)
        if not paths or not paths[-1].is_relative_to(root):
            continue
        key = name, paths[-1]
        on_path[key] = on_path.get(key, 0) + 1
        if name in OPENS and not _WRITING.search(arguments):
            continue
        source = paths[0] if len(paths) > 1 else None
        calls.append(Call(name, counts[name], paths[-1], source, on_path[key]))
    return calls


def _paths(name: str, arguments: str) -> list[Path]:
    if name in _ON_DESCRIPTOR:
        found = _DESCRIPTOR.match(arguments)
        return [Path(found[1])] if found else []
    folders = _DESCRIPTOR.findall(arguments.split(" = ")[0])
    names = [match.encode().decode("unicode_escape") for match in _PATH.findall(arguments)]
    folders += [""] * (len(names) - len(folders))
    return [Path(os.path.normpath(os.path.join(folder, name))) for folder, name in zip(folders, names, strict=False)]


def order_violations(calls: list[Call]) -> list[str]:
    """Renames (and links) whose content was not fsynced before, or whose folder was not fsynced right after."""
    problems = []
    changing = [call for call in calls if call.name not in OPENS]
    for position, call in enumerate(changing):
        if call.name not in (*RENAMES, "link", "linkat") or call.source is None:
            continue
        if not _synced_before(changing[:position], call.source):
            problems.append(f"{call.point}: {call.source} was not fsynced before it became {call.path}")
        after = changing[position + 1] if position + 1 < len(changing) else None
        if after is None or after.name not in SYNCS or after.path != call.path.parent:
            problems.append(f"{call.point}: {call.path.parent} was not fsynced after {call.path} appeared")
    return problems


def _synced_before(earlier: list[Call], path: Path) -> bool:
    """Whether the last thing that happened to the content of `path`, under whatever name, was an fsync."""
    for call in reversed(earlier):
        if call.name in RENAMES and call.path == path and call.source is not None:
            path = call.source
        elif call.path == path:
            return call.name in SYNCS
    return False
