"""Distillation of next-token distributions: the student learns what the teacher would say, on given text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.core.passes import Job
from distill._settings_taught import Taught

if TYPE_CHECKING:
    from distill._losses import Loss


class Logits(Taught):
    """Train the whole model towards the distributions of a teacher, which sees the same text beside it."""

    paper: ClassVar = "Hinton et al., 2015, arXiv:1503.02531; Agarwal et al., 2024, arXiv:2306.13649"

    joins: ClassVar = True

    cross_entropy: float = Field(0.0, ge=0, le=1, description="share of the loss that is the text's own next token")

    @property
    def loss(self) -> Loss:
        return replace(self.towards_teacher, cross_entropy=self.cross_entropy)

    def run(self, job: Job) -> None:
        from distill._logits import train_on_logits

        train_on_logits(self, job)
