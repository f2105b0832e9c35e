"""What recovery does with weights of each kind: pairs that are merged, codes, or pairs beside codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from compress.core.passes import Job
from compress.core.replaced import ReplacedCheckpoint
from distill._adapter import attach_adapter
from distill._batches import text_batches
from distill._codes import CodedLayers
from distill._compensation import compensations
from distill._logits import online_loss
from distill._low_rank import Pairs
from distill._optimizers import equally
from distill._patches import Attach, made_once
from distill._student import Student
from distill._teacher import open_teacher, require_dense_original
from distill._trainer import learn, text_of, write

if TYPE_CHECKING:
    from distill.recover import Recover


def recover(settings: Recover, job: Job) -> None:
    """Train pairs or codes of job.checkpoint towards a teacher, and write what became of it."""
    if job.checkpoint.kind != "quantized":
        pairs = Pairs(settings, job.checkpoint)
        _learn(settings, job, pairs.attach)
        write(job, pairs.merged())
    elif settings.keep == "merged":
        coded = CodedLayers(settings, job)
        rates = {"learning_rate": settings.code_rate, "weight_decay": 0.0}  # a place near zero is no smaller model
        _learn(settings.model_copy(update=rates), job, coded.attach, coded.share)
        write_codes(job, coded, "recover")
    else:
        pairs = Pairs(settings, job.checkpoint, fused=False)
        starts = compensations(settings, job)

        def attach(model: object) -> dict[str, torch.nn.Parameter]:
            trained = dict(pairs.attach(model))
            for name, start in starts.items():
                pairs.by_name[name].begin(*start)
            return trained

        _learn(settings, job, attach)
        attach_adapter(settings, job, pairs)
        write(job, {})


def _learn(settings: Recover, job: Job, attach: Attach, share: Callable[[str], float] = equally) -> None:
    """Train what `attach` puts into the model, each at its share of the learning rate."""
    require_dense_original(settings.teacher, job)
    tokens = text_of(job)
    student = Student(job, settings, instead=attach, share=share)
    total = settings.steps(tokens)
    if total:
        loss = made_once(online_loss(settings.loss, student.model, open_teacher(settings, job)))
        learn(settings, job, student, text_batches(settings, tokens), loss, total)


def write_codes(job: Job, coded: CodedLayers, method: str) -> None:
    """Packed tensors in place of the stage's, noted as `method`'s, and what was trained beside them."""
    packed = coded.packed()
    for block in job.onto(ReplacedCheckpoint(job.checkpoint, coded.rest.tensors())).walk(calibrate=False):
        for site in block.sites:
            if site.name in packed:
                tensor = packed[site.name]
                site.replace(tensor)
                site.note(method=method, bits=tensor.scheme.bits, group_size=tensor.scheme.group_size)
