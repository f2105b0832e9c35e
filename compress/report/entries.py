"""Entries: artifacts as they lie on disk, for a comparison.

Read are compress.json, evaluation.json, and run.json of the report folder beside the artifact, if it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.core._verify_gguf import gguf_file, matrix_type
from compress.core.errors import InputError
from compress.core.safetensors_io import read_header
from compress.report.data import model_name, summary


@dataclass(frozen=True)
class Entry:
    """One artifact as found on disk; `parameters` are those of its source."""

    name: str
    source: str
    summary: str
    bytes: int
    source_bytes: int | None
    parameters: int | None
    evaluation: Mapping[str, Any]
    run: Mapping[str, Any] | None
    recipe: Mapping[str, Any]


def read_entries(artifacts: Sequence[Path | str]) -> list[Entry]:
    """The artifacts in the order given, each under a name of its own. InputError for a folder that is none of ours."""
    return _distinct([_read(Path(path)) for path in artifacts])


def _read(path: Path) -> Entry:
    manifest = _json(path / "compress.json", "the folder is no artifact of ours: it has no compress.json")
    evaluation = path / "evaluation.json"
    run = path.with_name(f"{path.name}.report") / "run.json"
    recipe, lineage = manifest.get("recipe") or {}, manifest.get("lineage") or {}
    return Entry(
        name=path.absolute().name,
        source=model_name({"recipe": recipe, "source": {"id": lineage.get("source") or "an unknown source"}}),
        summary=_what_it_is(path, recipe.get("stages") or []),
        bytes=_bytes(path),
        source_bytes=lineage.get("bytes"),
        parameters=lineage.get("parameters"),
        evaluation=_json(evaluation, "") if evaluation.is_file() else {},
        run=_json(run, "") if run.is_file() else None,
        recipe=recipe,
    )


def _what_it_is(path: Path, stages: Sequence[Mapping[str, Any]]) -> str:
    """Its stages; where there were none, but a GGUF file is there, the type of that."""
    file = None if stages else gguf_file(path)
    return summary({"stages": [_as_stage(stage) for stage in stages]}) if file is None else f"gguf {matrix_type(file)}"


def _bytes(path: Path) -> int:
    """Of the weights; a GGUF file, which has everything in it, counts in whole."""
    files = path.glob("*.safetensors")
    weights = sum(info.bytes for file in files for info in read_header(file).values())
    return weights or sum(file.stat().st_size for file in path.glob("*.gguf"))


def _json(path: Path, if_missing: str) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise InputError("there is no such folder", where=str(path.parent))
    if not path.is_file():
        raise InputError(if_missing, where=str(path.parent))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"the file is not JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("the file does not hold a JSON object", where=str(path))
    return data


def _as_stage(written: Mapping[str, Any]) -> dict[str, Any]:
    kind, settings = next(iter(written.items()))
    return {"kind": kind, "method": settings.get("method", kind), "settings": settings}


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Names that occur twice are numbered, so that plot and table can be told apart."""
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        number = seen[entry.name]
        result.append(entry if number == 1 else replace(entry, name=f"{entry.name} ({number})"))
    return result
