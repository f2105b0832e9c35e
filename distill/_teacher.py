"""The teacher: a model that reads the same token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from compress.core.passes import Job
from distill._settings_taught import ORIGINAL, Led

WHAT_TEACHES = "name a folder with config.json and safetensors weights, relative to the recipe; a hub id; or original"


def find_teacher(name: str, job: Job) -> Checkpoint:
    """The teacher, not loaded yet. InputError if it cannot teach this student, or is not the one of the run's start."""
    if name == ORIGINAL:
        teacher = job.original or job.checkpoint
        _require_same_tokens(teacher, job.checkpoint)
        return teacher
    length = None if job.calibration is None else job.calibration.ids.shape[1]
    teacher = named_teacher(name, job.checkpoint, length)
    if job.remember("teacher", teacher.sha256) != teacher.sha256():
        raise InputError("the teacher is another than when this run began", where=name, hint="--fresh starts over")
    return teacher


def named_teacher(name: str, student: Checkpoint, length: int | None) -> Checkpoint:
    """The teacher that lies in a folder, or at the hub, for texts of `length` tokens. UsageError if there is none;
    InputError if its tokens are others than the student's, or it cannot read so many."""
    teacher = _opened(name)
    _require_same_tokens(teacher, student)
    positions = teacher.config.get("max_position_embeddings")
    if isinstance(positions, int) and length is not None and length > positions:
        raise InputError(
            f"the teacher reads {positions} tokens at most, and a row of the text has {length}",
            where=str(teacher.folder),
        )
    return teacher


def _opened(name: str) -> Checkpoint:
    try:
        return Checkpoint.open(name)
    except InputError as error:
        message = f"{error.where}: {error.message}" if error.where else error.message
        hint = f"{error.hint}; or {WHAT_TEACHES}" if error.hint else WHAT_TEACHES
        raise UsageError(message, where="distill.teacher", hint=hint) from error


def require_dense_original(name: str, job: Job) -> None:
    """InputError if the original teaches and is quantized itself."""
    original = job.original or job.checkpoint
    if name == ORIGINAL and original.kind == "quantized":
        raise InputError(
            "the model that the run starts from is quantized itself: there is nothing to learn from it",
            where=str(original.folder),
            hint="name the model that it was made from: teacher",
        )


def open_teacher(settings: Led, job: Job) -> Any:
    """The teacher's model, in the dtype that is fast here. InputError if its tokens are others than the student's."""
    teacher = find_teacher(settings.teacher, job)
    model = load_teacher(teacher, job, sharded=settings.sharded)
    if settings.compile:
        from distill._compiled import compile_blocks

        compile_blocks(model, teacher.architecture)
    return model


def load_teacher(teacher: Checkpoint, job: Job, *, sharded: bool = False) -> Any:
    """Its model, to be asked and not trained; `sharded`: by all processes together, each with a part of its blocks."""
    if sharded:
        from distill._shards import stream

        return stream(teacher, teacher_dtype(teacher, job), job.processes, job.device, trained=False)
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
    rows = int(teacher.config["vocab_size"])
    if ours and max(ours.values()) >= rows:
        raise InputError(
            f"the teacher has embeddings for {rows} tokens, and the tokenizer gives ids up to {max(ours.values())}",
            where=str(teacher.folder),
        )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id, added tokens included; None without a tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data.get("model", {}).get("vocab")
    found = vocabulary if isinstance(vocabulary, dict) else {str(row[0]): place for place, row in enumerate(vocabulary)}
    return found | {str(token["content"]): int(token["id"]) for token in data.get("added_tokens") or ()}
