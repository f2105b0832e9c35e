"""Distillation of next-token distributions: the student learns what the teacher would say, on given text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.core.passes import Job
from distill._divergences import Divergence
from distill._settings import Training

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from distill._losses import Loss


class Logits(Training):
    """Train the whole model towards the distributions of a teacher, which sees the same text beside it."""

    paper: ClassVar = "Hinton et al., 2015, arXiv:1503.02531; Agarwal et al., 2024, arXiv:2306.13649"

    joins: ClassVar = True

    teacher: str = Field("original", description="original: the model that the run starts from; or a folder or hub id")
    divergence: Divergence = Field("forward_kl", description="between the teacher's distribution and the student's")
    temperature: float = Field(1.0, gt=0, le=100, description="of both distributions")
    mix: float = Field(0.5, ge=0, le=1, description="beta of jsd, alpha of skew_kl and skew_rkl")
    alpha: float = Field(0.2, gt=0, le=10, description="of alpha_beta")
    beta: float = Field(0.7, gt=0, le=10, description="of alpha_beta")
    cross_entropy: float = Field(0.0, ge=0, le=1, description="share of the loss that is the text's own next token")

    @property
    def loss(self) -> Loss:
        from distill._losses import Loss

        return Loss(self.divergence, self.temperature, self.mix, self.alpha, self.beta, self.cross_entropy)

    def teacher_bytes(self, checkpoint: Checkpoint) -> int:
        return 4 * sum(info.bytes for info in checkpoint.tensors.values()) // checkpoint.dtype.itemsize

    def run(self, job: Job) -> None:
        from distill._logits import train_on_logits

        train_on_logits(self, job)
