"""Manifest (compress.json): every file of an artifact with size and SHA-256, and how it came about. Canonical JSON.

A pure function of the run's fingerprint: no time, host, path or memory figure is in it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from compress.core.errors import ArtifactError

MANIFEST_NAME = "compress.json"
SCHEMA_VERSION = 1
Status = Literal["quantized", "kept", "changed", "added", "dropped"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its path in the folder (with /), bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of one tensor of the source; `added`: one that the source does not have.

    A quantized tensor whose reason says "after …" was transformed first: it does not resemble the source's."""

    tensor: str
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Manifest:
    """The content of compress.json, apart from that file itself."""

    version: str
    files: tuple[FileRecord, ...]
    recipe: dict[str, Any]
    fingerprint: dict[str, Any]
    lineage: dict[str, Any]
    coverage: tuple[Coverage, ...]
    stages: list[dict[str, Any]] = field(default_factory=list)
    kv_cache: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def text(self) -> str:
        """Canonical JSON: sorted keys, one trailing newline; files and coverage sorted by name.

        `digest` is the SHA-256 of the same text without it, so that `verify` notices any change of the manifest.
        """
        data = asdict(self)
        data["files"] = sorted(data["files"], key=lambda file: file["path"])
        data["coverage"] = sorted(data["coverage"], key=lambda item: item["tensor"])
        digest = hashlib.sha256(_canonical(data).encode()).hexdigest()
        return _canonical(data | {"digest": digest})

    @classmethod
    def parse(cls, text: str, *, where: str = MANIFEST_NAME) -> Manifest:
        """Manifest from its JSON. ArtifactError names the key that is missing or wrong."""
        data = _object(text, where)
        version = data.get("schema_version")
        if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            raise ArtifactError(
                f"schema_version {version!r} is not understood: this version knows 1 to {SCHEMA_VERSION}", where=where
            )
        known = {item.name for item in fields(cls)}
        for key in sorted(known - data.keys()):
            raise ArtifactError(f"the key {key!r} is missing", where=where)
        values = {key: data[key] for key in known}
        values["files"] = tuple(_file(item, where) for item in _list(data, "files", where))
        values["coverage"] = tuple(_coverage(item, where) for item in _list(data, "coverage", where))
        for key in ("recipe", "fingerprint", "lineage"):
            if not isinstance(data[key], dict):
                raise ArtifactError(f"{key} must be an object", where=where)
        _list(data, "stages", where)
        return cls(**values)


def _canonical(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not JSON: {error}", where=where) from None
    if not isinstance(data, dict):
        raise ArtifactError("not a JSON object", where=where)
    return data


def _list(data: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(data[key], list):
        raise ArtifactError(f"{key} must be a list", where=where)
    return data[key]


def _file(item: object, where: str) -> FileRecord:
    match item:
        case {"path": str(path), "size": int(size), "sha256": str(sha256), **rest} if not rest and size >= 0:
            if _is_unsafe(path):
                raise ArtifactError(f"files names {path!r}, which leads out of the folder", where=where)
            return FileRecord(path, size, sha256)
    raise ArtifactError(f"an entry of files is not path, size and sha256: {item!r:.80}", where=where)


def _is_unsafe(path: str) -> bool:
    parts = path.split("/")
    return path.startswith("/") or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts)


def _coverage(item: object, where: str) -> Coverage:
    match item:
        case {"tensor": str(tensor), "status": str(status), "reason": str(reason)} if status in get_args(Status):
            return Coverage(tensor, status, reason)  # pyright: ignore[reportArgumentType]
    raise ArtifactError(f"an entry of coverage is not tensor, status and reason: {item!r:.80}", where=where)
