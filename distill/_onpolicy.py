"""On-policy distillation, as batches that the student writes.

Shape suffixes: B rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.core.passes import Job
from compress.core.replaced import ReplacedCheckpoint
from compress.core.services import Sampler
from distill._batches import Batch, batch_rows, text_batches
from distill._completions import completed, number_of, prompts_of, sampler_of, teacher_batches
from distill._logits import online_loss
from distill._student import Student
from distill._teacher import open_teacher
from distill._trainer import text_of, train

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from distill.onpolicy import OnPolicy


def train_on_policy(settings: OnPolicy, job: Job) -> None:
    """Train job.checkpoint on what it writes itself and on given text, and write what became of it."""
    tokens = text_of(job)
    others = text_batches(settings, tokens) if settings.otherwise == "text" else teacher_batches(settings, job, tokens)
    student, total = Student(job, settings), settings.steps(tokens)
    own = StudentBatches(settings, job, student, tokens)

    def batches(step: int) -> Batch:
        return own(step) if is_student_step(settings, step, total) else others(step)

    loss = online_loss(settings.towards_teacher, student.model, open_teacher(settings, job))
    train(settings, job, student, batches, loss, total)


def is_student_step(settings: OnPolicy, step: int, total: int) -> bool:
    """Whether a step is on what the student writes: drawn from the seed and its number alone."""
    drawn = number_of("policy", settings.seed, step) / 2**62
    return step >= round(settings.offpolicy * total) and drawn < settings.student_share


class StudentBatches:
    """What the student as it is now says behind the beginnings of a step's rows. It is loaded into the runtime when
    the first of these steps comes, and gets its weights anew in each."""

    def __init__(self, settings: OnPolicy, job: Job, student: Student, tokens: Tokens) -> None:
        self._settings = settings
        self._job = job
        self._student = student
        self._tokens = tokens
        self._sampler: Sampler | None = None

    def __call__(self, step: int) -> Batch:
        settings = self._settings
        sampler = self._with_weights_of_now()
        rows_B = batch_rows(settings, len(self._tokens.ids), step)
        prompts = prompts_of(self._tokens, rows_B, settings.prompt_tokens, sampler.end_tokens)
        seeds = [number_of("student", settings.seed, step, place) for place in range(len(prompts))]
        return completed(prompts, sampler.complete(prompts, seeds))

    def _with_weights_of_now(self) -> Sampler:
        now = self._student.weights()
        if self._sampler is None:
            own = {name: value.clone() for name, value in now.items()}  # the runtime uses fp32 tensors where they lie
            source = ReplacedCheckpoint(self._job.checkpoint, own)
            self._sampler = sampler_of(self._job, source, self._settings.sampling(self._settings.batch))
        else:
            self._sampler.refresh(ReplacedCheckpoint(self._job.checkpoint, now))
        return self._sampler
