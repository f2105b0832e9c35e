"""The teacher: a model that reads the same token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError
from compress.core.passes import Job
from distill._settings_taught import ORIGINAL


def find_teacher(name: str, job: Job) -> Checkpoint:
    """The teacher, not loaded yet. InputError if its tokens are others than the student's."""
    if name != ORIGINAL:
        return named_teacher(name, job.checkpoint)
    teacher = job.original or job.checkpoint
    _require_same_tokens(teacher, job.checkpoint)
    return teacher


def named_teacher(name: str, student: Checkpoint) -> Checkpoint:
    """The teacher that lies in a folder, or at the hub. InputError if its tokens are others than the student's."""
    teacher = Checkpoint.open(name)
    _require_same_tokens(teacher, student)
    return teacher


def open_teacher(name: str, job: Job) -> Any:
    """The teacher's model, in the dtype that is fast here. InputError if its tokens are others than the student's."""
    return load_teacher(find_teacher(name, job), job)


def load_teacher(teacher: Checkpoint, job: Job) -> Any:
    """Its model, to be asked and not trained."""
    return teacher.build_model(teacher_dtype(teacher, job), job.device).requires_grad_(False)


def teacher_dtype(teacher: Checkpoint, job: Job) -> Any:
    """What it computes in."""
    from compress.core.walk import compute_dtype

    return compute_dtype(teacher, job.dtype, job.device)


def _require_same_tokens(teacher: Checkpoint, student: Checkpoint) -> None:
    """Rows of embeddings behind the vocabulary may differ in number; what an id means may not."""
    ours, theirs = _vocabulary(student.folder), _vocabulary(teacher.folder)
    if ours is not None and theirs is not None and ours != theirs:
        raise InputError(
            "the teacher's tokenizer gives tokens other ids than the student's: their distributions cannot be compared",
            where=str(teacher.folder),
            hint="choose a teacher of the same family",
        )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
    vocabulary = model.get("vocab")
    return vocabulary if isinstance(vocabulary, dict) else {str(row[0]): place for place, row in enumerate(vocabulary)}
