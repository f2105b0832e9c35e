"""Preference recovery: pairs, the reference, training, and what came of it.

Shape suffixes: N pairs, 2 its chosen and its rejected answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress.core.events import Finished, Notice, Started
from compress.core.passes import Job
from distill._codes import CodedLayers
from distill._low_rank import Pairs
from distill._patches import made_once
from distill._preference_pairs import Pair, answered, pair_batches, steps_of
from distill._recover import write_codes
from distill._student import Student
from distill._trainer import learn, write

if TYPE_CHECKING:
    from distill.preference import Preference

STAGE = "preference"


def prefer(settings: Preference, job: Job) -> None:
    """Train job.checkpoint to prefer the original's answers to its own, and write what became of it."""
    pairs, prompts = answered(settings, job)
    said = f"{len(pairs):,} of {prompts:,} prompts are answered otherwise than by the original"
    job.events(Notice(said if pairs else f"{said}: nothing is trained", STAGE))
    if not pairs:
        write(job, {})
        return
    settings, student, finish = trained_part(settings, job)
    train_on_pairs(settings, job, student, pairs)
    finish()


def train_on_pairs(settings: Preference, job: Job, student: Student, pairs: list[Pair]) -> None:
    """Train the student, and say how often the chosen answer gained on the rejected one."""
    from distill._preference_trl import Objective

    objective = Objective(settings, student.model, pairs)
    reference_N2 = job.keep("reference", lambda: {"log_p": objective.log_probabilities()})["log_p"]
    loss, total = made_once(objective.loss(reference_N2)), steps_of(settings, len(pairs))
    learn(settings, job, student, pair_batches(settings, len(pairs)), loss, total, objective.figures)
    job.events(Started(STAGE, len(pairs), "pair"))
    found = job.remember("preference", lambda: judged(reference_N2, objective.log_probabilities()))
    words = f"the original's answer gained on the other in {found['accuracy']:.1%} of {len(pairs):,} pairs"
    job.events(Finished(STAGE, words))


def judged(before_N2: Tensor, after_N2: Tensor) -> dict[str, float]:
    """Over pairs, in six digits: in which share the chosen answer gained on the rejected one (DPO's reward accuracy),
    by how many nats in the mean, and by how many nats the chosen answer alone became likelier."""
    gained_N2 = (after_N2 - before_N2).double()
    margin_N = gained_N2[:, 0] - gained_N2[:, 1]
    found = {"accuracy": (margin_N > 0).double().mean(), "margin": margin_N.mean(), "chosen": gained_N2[:, 0].mean()}
    return {name: float(f"{float(value):.6g}") for name, value in found.items()}


def trained_part(settings: Preference, job: Job) -> tuple[Preference, Student, Callable[[], Any]]:
    """What is trained: the settings with its learning rate, the student, and what writes it in the end."""
    if job.checkpoint.kind == "quantized":
        coded = CodedLayers(settings, job)
        rates = {"learning_rate": settings.code_rate, "weight_decay": 0.0}  # a place near zero is no smaller model
        settings = settings.model_copy(update=rates)
        student = Student(job, settings, instead=coded.attach, share=coded.share)
        return settings, student, lambda: write_codes(job, coded, "preference")
    if settings.rank is not None:
        low_rank = Pairs(settings, job.checkpoint)
        return settings, Student(job, settings, instead=low_rank.attach), lambda: write(job, low_rank.merged())
    student = Student(job, settings)
    return settings, student, lambda: write(job, student.tensors())
