"""Distillation of next-token distributions, as a loss of a batch.

Shape suffixes: B rows, T positions; N tokens, V vocabulary, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core.passes import Job
from distill._batches import Batch, text_batches
from distill._losses import Logits, Loss, chunked
from distill._student import Student
from distill._teacher import open_teacher
from distill._trainer import BatchLoss, text_of, train

if TYPE_CHECKING:
    from distill.logits import Logits as Settings

CHUNK_TOKENS = 1024
LOGITS_AT_ONCE = 1 << 25  # numbers; a loss holds several copies of them


def train_on_logits(settings: Settings, job: Job) -> None:
    """Train job.checkpoint towards a teacher, and write what became of it."""
    tokens = text_of(job)
    student = Student(job, settings)
    loss = online_loss(settings.loss, student.model, open_teacher(settings, job))
    train(settings, job, student, text_batches(settings, tokens), loss, settings.steps(tokens))


def online_loss(loss: Loss, student: Any, teacher: Any) -> BatchLoss:
    """The divergence from what the teacher says on the same ids, right now."""

    def of_batch(batch: Batch) -> Tensor:
        with torch.no_grad():
            taught_ND = hidden_states(teacher, batch.ids_BT).flatten(0, 1)
        hidden_ND = hidden_states(student, batch.ids_BT).flatten(0, 1)
        pairs = (hidden_ND, head_of(student)), (taught_ND, head_of(teacher))
        return chunked(loss, *pairs, batch.target_BT.flatten().to(hidden_ND.device), chunk_tokens(student))

    return of_batch


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits are made at a time."""
    return max(1, min(CHUNK_TOKENS, LOGITS_AT_ONCE // vocabulary))


def chunk_tokens(model: Any) -> int:
    """The same for a model, whose head may have more rows than there are tokens."""
    return tokens_at_once(model.get_output_embeddings().weight.shape[0])


def hidden_states(model: Any, ids_BT: Tensor) -> Tensor:
    """What the head reads, [B, T, D]."""
    return model.model(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state


def head_of(model: Any) -> Logits:
    """Hidden states to logits, with the soft cap that some families put on them."""
    cap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden_ND: Tensor) -> Tensor:
        logits_NV = model.get_output_embeddings()(hidden_ND)
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    return head
