"""Artifact: a finished folder with its manifest, opened for reading."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core._verify_gguf import gguf_file
from compress.core.errors import ArtifactError
from compress.core.manifest import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class Artifact:
    """A published folder: where it is, its manifest and its config.json, empty beside a GGUF file, which has all that
    in it. Weights are read through a Checkpoint."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]


def open_artifact(path: str | Path) -> Artifact:
    """Open one of our artifacts. ArtifactError if it is none; what its files hold is for `verify` to check."""
    folder = Path(path)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        raise ArtifactError(f"there is no {MANIFEST_NAME}, so this is no artifact of ours", where=str(folder))
    return Artifact(
        folder,
        Manifest.parse(_read(manifest), where=str(manifest)),
        _read_config(folder) if gguf_file(folder) is None else {},
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise ArtifactError(f"not JSON: {error}", where=str(path)) from None
    if not isinstance(config, dict):
        raise ArtifactError("not a JSON object", where=str(path))
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArtifactError("not UTF-8 text", where=str(path)) from None
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=str(path)) from None
