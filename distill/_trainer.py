"""The loop: a batch, its loss in parts of few rows, a step of the optimizer; then the trained weights are written.

A step's batch follows from its number and the student as it is, there is no other randomness, and gradients are summed
in a fixed order: a run that was killed and started again ends with the same weights, on a CPU to the bit.

Several processes each take their share of a step's rows and add up their gradients, so that each makes the step that
one process would make; the main one makes the batches, saves and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.events import Finished, Metric, Progress, Started
from compress.core.passes import Job
from compress.core.processes import Processes, others_are_there
from compress.core.replaced import ReplacedCheckpoint
from distill._batches import Batch, Batches
from distill._student import Student

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from distill._settings import Training

STAGE = "train"

BatchLoss = Callable[[Batch], Tensor]
"""The mean loss of a batch over its positions with a target, with a graph down to the student's parameters."""


def text_of(job: Job) -> Tokens:
    """The calibration text; InputError if there is none."""
    if job.calibration is None:
        raise InputError("there is no text to train on")
    return job.calibration


def train(settings: Training, job: Job, student: Student, batches: Batches, loss: BatchLoss, total: int) -> None:
    """`total` steps, from where the newest save is, and the trained weights in place of the stage's."""
    learn(settings, job, student, batches, loss, total)
    if job.processes.is_main:
        write(job, student.tensors())


def learn(
    settings: Training,
    job: Job,
    student: Student,
    batches: Batches,
    loss: BatchLoss,
    total: int,
    figures: Callable[[], Mapping[str, float]] = dict,
) -> None:
    """`total` steps, from where the newest save is. `figures`: what else is known of a step when it has its loss."""
    job.events(Started(STAGE, total, "step"))
    for step in range(student.resume(), total):
        batch = agreed(job.processes, batches, step)
        scored, value = max(batch.scored, 1), 0.0
        with others_are_there(among_others=True):
            for part in parts_of(batch, settings, job.processes):
                with precision(settings, student.model.device):
                    share = student.loss(loss, part) * (part.scored / scored)
                share.backward()
                value += float(share.detach())
        value = student.add_up(value)
        for name, figure in figures().items():
            student.figures.setdefault(name, []).append(figure)
            job.events(Metric(STAGE, name, figure, f"step {step + 1}"))
        student.update(step, total, value)
        job.events(Metric(STAGE, "loss", value, f"step {step + 1}"))
        job.events(Progress(STAGE, step + 1, total))
    job.events(Finished(STAGE, f"{total} steps" + (f", loss {student.losses[-1]:.4f}" if student.losses else "")))


def parts_of(batch: Batch, settings: Training, processes: Processes) -> Iterator[Batch]:
    """What this process computes of a batch, a few rows at a time. Where all gather a model together it is as many
    times as the others: rows without a target stand in for those that it does not have."""
    mine = batch.share(processes.rank, processes.count)
    yield from mine.split(settings.rows_at_once)
    if settings.sharded:
        at_once, most = settings.rows_at_once, math.ceil(len(batch.ids_BT) / processes.count)
        for _ in range(math.ceil(most / at_once) - math.ceil(len(mine.ids_BT) / at_once)):
            yield batch.silent()


def agreed(processes: Processes, batches: Batches, step: int) -> Batch:
    """The batch of a step, as the main process makes it."""
    if processes.count == 1:
        return batches(step)
    _, tensors = processes.share(lambda: ({}, batches(step).tensors()))
    return Batch(tensors["ids"], tensors["target"], tensors.get("rows"))


def precision(settings: Training, device: torch.device) -> torch.autocast:
    """What forwards compute in: fp32, or bf16 where that keeps sense (weights, norms and losses stay fp32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def write(job: Job, tensors: dict[str, Tensor]) -> None:
    """These tensors, by their names on disk, in place of the stage's."""
    for _ in job.onto(ReplacedCheckpoint(job.checkpoint, tensors)).walk(calibrate=False):
        pass
