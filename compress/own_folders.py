"""What may be replaced or removed: only folders that compress made, and none that holds or lies inside a run's inputs.

Read before any work. Nothing here writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.errors import ArtifactError, UsageError
from compress.core.lock import HOLDER_NAME, LOCK_NAME
from compress.core.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from compress.core.recipe import Recipe

JOURNAL_NAME = "journal.jsonl"
_PARTIAL = {LOCK_NAME, HOLDER_NAME, f".{JOURNAL_NAME}.tmp", "stages", "spill", "saves", "kept", "merged", "artifact"}
_REPORT = {"report.html", "report.md", "report.json"}
_TEMPORARY = {f".{name}.tmp" for name in (*_REPORT, "run.json")}
_STAGE = re.compile(r"\d\d-[a-z_]+")
_OTHER = "choose another --output"


def is_artifact(folder: Path) -> bool:
    """Whether `folder` holds a manifest of ours that can be read, or nothing at all."""
    names = _names(folder)
    if not names:
        return names is not None
    try:
        Manifest.parse((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ArtifactError):
        return False
    return True


def is_partial(folder: Path) -> bool:
    """Whether `folder` is unfinished work of ours: it has a journal, or nothing that a run does not put there."""
    names = _names(folder)
    return names is not None and (JOURNAL_NAME in names or names <= _PARTIAL)


def is_report(folder: Path) -> bool:
    """Whether `folder` has a run.json, or nothing but files of a report."""
    names = _names(folder)
    return names is not None and ("run.json" in names or names <= _REPORT | _TEMPORARY)


def is_stages(folder: Path) -> bool:
    """Whether `folder` holds stage folders and nothing else."""
    names = _names(folder)
    return names is not None and all(_STAGE.fullmatch(name) for name in names)


def is_there(path: Path) -> bool:
    """Whether anything goes by this name, if only a link that leads nowhere."""
    return os.path.lexists(path)  # unlike Path.exists, never raises: names may be too long or not readable


def _names(folder: Path) -> set[str] | None:
    """Names in the folder; None if it is none or cannot be read."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return None


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def refuse_inputs(folders: Iterable[Path], recipe: Recipe) -> None:
    """UsageError if one of `folders`, which a run replaces or removes, holds what the run reads or where people are.

    None may lie inside the source model either. Links are followed on both sides.
    """
    model, others = _read_by(recipe)
    for folder in folders:
        real = _real(folder)
        for what, path in (("the source model", model), *others):
            if os.path.exists(path) and _real(path).is_relative_to(real):
                raise UsageError(f"this cannot be an output: {what} is here ({path})", where=str(folder), hint=_OTHER)
        if os.path.isdir(model) and real.is_relative_to(_real(model)):
            raise UsageError(f"an output cannot lie inside the source model ({model})", where=str(folder), hint=_OTHER)


def _read_by(recipe: Recipe) -> tuple[Path, list[tuple[str, Path]]]:
    """The source model; and the other places that must not be lost. A hub id is a path that is not there."""
    located = recipe.located()
    others = [
        ("the current directory", Path.cwd()),
        ("the home directory", Path(os.path.expanduser("~"))),  # Path.home() would raise where there is none
        ("the recipe's folder", recipe.base_folder),
    ]
    if located.adapter:
        others.append(("the adapter", Path(located.adapter)))
    if located.calibration:
        others.append(("calibration.dataset", Path(located.calibration.dataset)))
    if located.evaluate and located.evaluate.perplexity:
        others.append(("evaluate.perplexity.dataset", Path(located.evaluate.perplexity.dataset)))
    if located.evaluate and located.evaluate.task_folder:
        others.append(("evaluate.task_folder", Path(located.evaluate.task_folder)))
    return Path(located.model), others
