"""What methods with a teacher have in common: who teaches, and how far from it the student is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field

from compress.core.places import locate
from distill._divergences import Divergence
from distill._settings import Training

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from distill._losses import Loss


ORIGINAL = "original"


class Taught(Training):
    """Settings shared by the methods that compare the student with a teacher."""

    teacher: str = Field(ORIGINAL, description="original: the model that the run starts from; or a folder or hub id")
    divergence: Divergence = Field("forward_kl", description="between the teacher's distribution and the student's")
    temperature: float = Field(1.0, gt=0, le=100, description="of both distributions")
    mix: float = Field(0.5, ge=0, le=1, description="beta of jsd, alpha of skew_kl and skew_rkl")
    alpha: float = Field(0.2, gt=0, le=10, description="of alpha_beta")
    beta: float = Field(0.7, gt=0, le=10, description="of alpha_beta")

    def located(self, base_folder: Path) -> Self:
        return self.model_copy(update={"teacher": locate(self.teacher, "model", base_folder)})

    def teacher_for(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Checkpoint:
        from distill._teacher import named_teacher

        if self.teacher == ORIGINAL:
            return checkpoint.origin
        return named_teacher(self.teacher, checkpoint, None if calibration is None else calibration.ids.shape[1])

    @property
    def towards_teacher(self) -> Loss:
        """The divergence that is asked for."""
        from distill._losses import Loss

        return Loss(self.divergence, self.temperature, self.mix, self.alpha, self.beta)
