"""Distillation of sequences, as training on completions.

Shape suffixes: N tokens, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress.core.passes import Job
from distill._batches import NO_TARGET, Batch
from distill._completions import teacher_batches
from distill._logits import chunk_tokens, head_of, hidden_states, online_loss
from distill._student import Student
from distill._teacher import open_teacher
from distill._trainer import BatchLoss, text_of, train

if TYPE_CHECKING:
    from distill.sequence import Sequence


def train_on_completions(settings: Sequence, job: Job) -> None:
    """Train job.checkpoint on what its teacher writes, and write what became of it."""
    tokens = text_of(job)
    batches = teacher_batches(settings, job, tokens)
    student = Student(job, settings)
    if settings.loss == "text":
        loss = text_loss(student.model)
    else:
        loss = online_loss(settings.towards_teacher, student.model, open_teacher(settings, job))
    train(settings, job, student, batches, loss, settings.steps(tokens))


def text_loss(student: Any) -> BatchLoss:
    """Cross entropy to the tokens of the text, a chunk of tokens at a time."""
    head = head_of(student)

    def part(hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        logits_NV = head(hidden_ND).float()
        return torch.nn.functional.cross_entropy(logits_NV, target_N, ignore_index=NO_TARGET, reduction="sum")

    def of_batch(batch: Batch) -> Tensor:
        hidden_ND = hidden_states(student, batch.ids_BT).flatten(0, 1)
        target_N = batch.target_BT.flatten().to(hidden_ND.device)
        total = hidden_ND.new_zeros(())
        rows = chunk_tokens(student)
        for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True):
            total = total + checkpoint(part, hidden, target, use_reentrant=False)
        return total / max(batch.scored, 1)

    return of_batch
