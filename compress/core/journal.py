"""The journal of a run: what is finished and durable, and with which inputs.

One JSON line per entry, each with a checksum, appended and fsynced. The first line is the fingerprint: everything that
decides the artifact's bytes. A unit is recorded only after its file is durable, so a line is never a lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import UsageError
from compress.core.files import append_durably, atomic_write, truncate

_FRESH = "--fresh starts over"
_SHOWN_DIFFERENCES = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished unit: its kind (block, stage, evaluation, ready …) and what the resuming run must know of it."""

    kind: str
    data: dict[str, Any]


def canonical(data: object) -> str:
    """JSON that is equal for equal data: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Journal:
    """The journal at `path`, opened with the fingerprint of the run that is about to start.

    A missing or empty journal is begun, with `first` right behind the fingerprint. One with another fingerprint is
    refused (UsageError lists what changed). A torn last line, left by a kill in the middle of a write, is cut off.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], first: tuple[Entry, ...] = ()) -> None:
        self.path = path
        # Through JSON, so that tuples and lists compare equal.
        self.fingerprint: dict[str, Any] = json.loads(canonical(fingerprint))
        self._entries: list[Entry] = _read(path)
        if self._entries:
            self._require_same_inputs(self._entries.pop(0))
        else:
            atomic_write(path, "".join(_line(entry) for entry in (Entry("fingerprint", self.fingerprint), *first)))
            self._entries = list(first)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All finished units, oldest first."""
        return tuple(self._entries)

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        """Data of the entries of one kind, oldest first."""
        return (entry.data for entry in self._entries if entry.kind == kind)

    def last(self, kind: str) -> dict[str, Any] | None:
        """Data of the newest entry of one kind."""
        return next((entry.data for entry in reversed(self._entries) if entry.kind == kind), None)

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Record a finished unit, durably. Call it only when the unit's own files are durable."""
        entry = Entry(kind, json.loads(canonical(data)))
        append_durably(self.path, _line(entry))
        self._entries.append(entry)

    def _require_same_inputs(self, first: Entry) -> None:
        changed = differences(first.data, self.fingerprint)
        if first.kind != "fingerprint":
            raise _damaged(self.path, 1)
        if changed:
            shown = "; ".join(changed[:_SHOWN_DIFFERENCES])
            if len(changed) > _SHOWN_DIFFERENCES:
                shown += f"; and {len(changed) - _SHOWN_DIFFERENCES} more"
            raise UsageError(
                f"an unfinished run with other inputs is here and cannot be resumed: {shown}",
                where=str(self.path.parent),
                hint=_FRESH,
            )


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Every leaf in which two JSON values differ, as `path: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for index, pair in enumerate(zip(old, new, strict=True))
            for line in differences(*pair, f"{path}[{index}]")
        ]
    return [] if old == new else [f"{path}: {_short(old)} → {_short(new)}"]


def _short(value: object) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 40 else f"{text[:12]}…{text[-12:]}"


def _line(entry: Entry) -> str:
    body = canonical({"data": entry.data, "kind": entry.kind})
    return f"{_checksum(body)} {body}\n"


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def recorded_fingerprint(path: Path) -> dict[str, Any] | None:
    """The fingerprint of the run whose journal lies at `path`; None if there is none."""
    return next((entry.data for entry in _read(path) if entry.kind == "fingerprint"), None)


def finished_units(path: Path) -> int:
    """How many finished units the journal at `path` names."""
    return sum(entry.kind not in ("fingerprint", "replaces") for entry in _read(path))


def _read(path: Path) -> list[Entry]:
    """Entries of the journal at `path`; a torn last line is cut from the file, other damage is refused."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    entries: list[Entry] = []
    good_bytes = 0
    lines = raw.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        entry = _parse(line)
        if entry is None:
            if number < len(lines):
                raise _damaged(path, number)
            truncate(path, good_bytes)
            break
        entries.append(entry)
        good_bytes += len(line)
    return entries


def _parse(line: bytes) -> Entry | None:
    """The entry of one whole line, or None if the line is torn or altered."""
    try:
        checksum, _, body = line.decode().removesuffix("\n").partition(" ")
        if not line.endswith(b"\n") or checksum != _checksum(body):
            return None
        fields = json.loads(body)
        return Entry(fields["kind"], fields["data"])
    except (UnicodeDecodeError, ValueError, KeyError, TypeError):
        return None


def _damaged(path: Path, line: int) -> UsageError:
    return UsageError("the journal is damaged, so finished work cannot be trusted", where=f"{path}:{line}", hint=_FRESH)
