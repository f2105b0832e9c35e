"""Distillation from a teacher cache: it is filled, if something is missing in it, and the student trained on it.

Shape suffixes: B rows, T positions; N positions with a next token, V vocabulary, D hidden width.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core._trim import trim_memory
from compress.core.calibration import tokenizer_sha256
from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.events import Finished, Metric, Notice, Progress, Started
from compress.core.journal import canonical
from compress.core.lock import FolderLock
from compress.core.passes import Job
from compress.core.quantities import format_bytes
from distill._batches import NO_TARGET, Batch, text_batches
from distill._cache import SCHEMA_VERSION, TeacherCache
from distill._logits import chunk_tokens, head_of, hidden_states
from distill._losses import Loss, mean_in_chunks
from distill._sparse import Sparse, encode, random_numbers
from distill._student import Student
from distill._teacher import find_teacher, load_teacher, teacher_dtype
from distill._trainer import BatchLoss, text_of, train

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from distill._cache_settings import Cache
    from distill.logits import Logits as Settings

STAGE = "teacher"
CHUNK_NUMBERS = 1 << 22  # fp64 numbers of a chunk of distributions


def train_on_cache(settings: Settings, wanted: Cache, job: Job) -> None:
    """Train job.checkpoint towards what the cache holds, and write what became of it."""
    tokens = text_of(job)
    cache = filled(settings, wanted, job, tokens)
    found = job.remember("teacher_cache", lambda: {"sha256": cache.sha256, "bytes": cache.bytes})
    if found["sha256"] != cache.sha256:
        raise ArtifactError(
            "the teacher cache is not the one that this run began with",
            where=str(cache.folder),
            hint="--fresh starts over",
        )
    student = Student(job, settings)
    loss = cached_loss(settings.loss, student.model, cache)
    train(settings, job, student, text_batches(settings, tokens), loss, settings.steps(tokens))


def cached_loss(loss: Loss, student: Any, cache: TeacherCache) -> BatchLoss:
    """The divergence from what the teacher said about these rows when the cache was written."""

    def summed(hidden_ND: Tensor, *kept_and_target: Tensor) -> Tensor:
        *kept, target_N = kept_and_target
        student_NV = head_of(student)(hidden_ND)[:, : cache.vocabulary]
        kl_N = Sparse(*kept).kl(student_NV.float() / loss.temperature)
        return loss.with_text(loss.temperature**2 * kl_N, student_NV, target_N).sum()

    def of_batch(batch: Batch) -> Tensor:
        if batch.rows_B is None:
            raise InputError("a teacher cache knows the rows of the calibration text, and this is another text")
        hidden_BTD = hidden_states(student, batch.ids_BT)
        device = hidden_BTD.device
        scored_BT = batch.target_BT != NO_TARGET
        kept = (part.to(device) for part in cache.batch(batch.rows_B).parts)
        target_N = batch.target_BT[scored_BT].to(device)
        return mean_in_chunks(summed, (hidden_BTD[scored_BT.to(device)], *kept), target_N, chunk_tokens(student))

    return of_batch


def filled(settings: Settings, wanted: Cache, job: Job, tokens: Tokens) -> TeacherCache:
    """The cache that is asked for, whole. The teacher is loaded only if something is missing in it."""
    teacher = find_teacher(settings.teacher, job)
    header = header_of(teacher, settings, wanted, job, tokens)
    folder = _folder(wanted, job, canonical(header))
    cache = TeacherCache(folder, wanted, tokens, header)
    if cache.missing:
        with FolderLock(folder):
            cache = TeacherCache(folder, wanted, tokens, header)  # another process may have written since
            _fill(cache, wanted, load_teacher(teacher, job), settings, job, tokens)
        trim_memory()
    else:
        job.events(Notice(f"the teacher is not loaded: what it says is in {folder}"))
    job.events(Metric(STAGE, "cache_bytes_per_token", cache.bytes / max(1, cache.token_count)))
    return cache


def header_of(teacher: Checkpoint, settings: Settings, wanted: Cache, job: Job, tokens: Tokens) -> dict[str, Any]:
    """Everything that decides what is in a cache."""
    return {
        "schema": SCHEMA_VERSION,
        "teacher": hashlib.sha256(canonical(teacher.sha256()).encode()).hexdigest(),
        "dtype": str(teacher_dtype(teacher, job)).removeprefix("torch."),
        "tokenizer": tokenizer_sha256(teacher.folder),
        "tokens": tokens.sha256,
        "vocabulary": min(_width(teacher), _width(job.checkpoint)),  # the larger one's last rows are padding
        "temperature": settings.temperature,
        "codec": wanted.written(),
    }


def _width(checkpoint: Checkpoint) -> int:
    return checkpoint.matrix_shape(checkpoint.head_tensor.removesuffix(".weight"))[0]


def _folder(wanted: Cache, job: Job, header: str) -> Path:
    """Where the recipe says; else with the run, where all stages that want the same find it."""
    if wanted.folder is not None:
        return Path(wanted.folder).absolute()
    if job.saves is None:
        raise UsageError("nothing says where the teacher cache should lie", hint="name a folder: cache: {folder: …}")
    return job.saves.folder(f"teacher-{hashlib.sha256(header.encode()).hexdigest()[:16]}")


def _fill(cache: TeacherCache, wanted: Cache, teacher: Any, settings: Settings, job: Job, tokens: Tokens) -> None:
    """Write the shards that are missing. A row goes through the teacher with the same others whenever it is written."""
    done, missing = cache.missing.start, cache.missing
    job.events(Started(STAGE, len(missing), "shard"))
    for number in missing:
        rows = cache.rows(number)
        found: dict[str, list[Tensor]] = {}
        for start in range(rows.start, rows.stop, settings.rows_at_once):
            part = range(start, min(start + settings.rows_at_once, rows.stop))
            for kept in _said(teacher, tokens, part, cache, wanted, settings.temperature):
                for name, value in kept.items():
                    found.setdefault(name, []).append(value)
        cache.add({name: torch.cat(values) for name, values in found.items()})
        job.events(Progress(STAGE, number + 1 - done, len(missing)))
    each = cache.bytes / max(1, cache.token_count)
    job.events(Finished(STAGE, f"{format_bytes(cache.bytes)}, {each:.1f} bytes a token"))


@torch.no_grad()
def _said(teacher: Any, tokens: Tokens, rows: range, cache: TeacherCache, wanted: Cache, temperature: float):
    """What is kept of the teacher's distributions in these rows, chunk by chunk."""
    ids_BT = tokens.ids[rows.start : rows.stop]
    lengths = cache.positions_R[rows.start : rows.stop]
    inside_BT = torch.arange(ids_BT.shape[1]) < lengths[:, None]
    random_NS = torch.cat([random_numbers(wanted, row, int(n)) for row, n in zip(rows, lengths, strict=True)])
    hidden_ND = hidden_states(teacher, ids_BT)[inside_BT.to(teacher.device)]
    chunk = max(1, CHUNK_NUMBERS // cache.vocabulary)
    for start in range(0, max(1, len(hidden_ND)), chunk):
        part = slice(start, start + chunk)
        logits_NV = head_of(teacher)(hidden_ND[part])[:, : cache.vocabulary].float() / temperature
        yield encode(wanted, logits_NV, random_NS[part])
