"""How keys and values are kept is said twice in an artifact, in config.json and in the manifest: both say the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core._model_folder import read_json
from compress.core.errors import ArtifactError
from compress.core.manifest import MANIFEST_NAME
from compress.core.model_files import KV_CACHE_KEY


def require_agreement(config: Mapping[str, Any], said: object, folder: Path | None = None) -> None:
    """ArtifactError unless `said`, the policy of the manifest (None: it has none), is that of config.json."""
    found = config.get(KV_CACHE_KEY)
    if said == found:
        return
    where = MANIFEST_NAME if folder is None else str(folder / MANIFEST_NAME)
    raise ArtifactError(
        f"is not the policy of config.json ({KV_CACHE_KEY}): {_difference(said, found)}",
        where=f"{where}: kv_cache",
        hint=None if folder is None else f"compress verify {folder} tells more",
    )


def require_agreement_in(folder: Path, config: Mapping[str, Any]) -> None:
    """The same of a folder, where it has a manifest that speaks of keys and values; of that file nothing else is
    looked at, which is what verify is for."""
    path = folder / MANIFEST_NAME
    manifest = read_json(path) if path.is_file() else {}
    if "kv_cache" in manifest:
        require_agreement(config, manifest["kv_cache"], folder)


def _difference(said: object, found: object, place: str = "") -> str:
    """The first place where two policies differ, and what is there in each."""
    if isinstance(said, dict) and isinstance(found, dict):
        for key in sorted(said.keys() | found.keys(), key=str):
            if said.get(key) != found.get(key):
                return _difference(said.get(key), found.get(key), f"{place}.{key}" if place else str(key))
    if isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for index, (one, other) in enumerate(zip(said, found, strict=True)):
            if one != other:
                return _difference(one, other, f"{place}[{index}]")
    return f"{place or 'it'} is {_short(said)} here and {_short(found)} there"


def _short(value: object) -> str:
    return "missing" if value is None else f"{value!r:.60}"
