"""What methods with a teacher have in common: who teaches, and how far from it the student is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, ValidationInfo, field_validator

from compress.core.places import locate
from distill._divergences import Divergence
from distill._settings import Training

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from distill._losses import Loss


ORIGINAL = "original"


class Led(Training):
    """Settings shared by the methods with a teacher."""

    teacher: str = Field(ORIGINAL, description="original: the model that the run starts from; or a folder or hub id")

    def located(self, base_folder: Path) -> Self:
        return self.model_copy(update={"teacher": locate(self.teacher, "model", base_folder)})

    def teacher_for(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Checkpoint:
        from distill._teacher import named_teacher

        if self.teacher == ORIGINAL:
            return checkpoint.origin
        return named_teacher(self.teacher, checkpoint, None if calibration is None else calibration.ids.shape[1])


class Taught(Led):
    """Settings shared by the methods that compare the student's distributions with a teacher's, on so many tokens."""

    tokens: int = Field(1_000_000, ge=1, description="tokens to train on: those of calibration, as often as it takes")
    divergence: Divergence = Field("forward_kl", description="between the teacher's distribution and the student's")
    temperature: float = Field(1.0, gt=0, le=100, description="of both distributions")
    mix: float = Field(0.5, ge=0, le=1, description="beta of jsd, alpha of skew_kl and skew_rkl")
    alpha: float = Field(0.2, gt=0, le=10, description="of alpha_beta")
    beta: float = Field(0.7, gt=0, le=10, description="of alpha_beta")

    @field_validator("mix")
    @classmethod
    def _leaves_a_divergence(cls, mix: float, found: ValidationInfo) -> float:
        """The ends of the range compare a distribution with itself."""
        divergence = found.data.get("divergence")
        if (divergence == "jsd" and mix in (0, 1)) or (divergence in ("skew_kl", "skew_rkl") and mix == 1):
            raise ValueError(f"with {mix:g} {divergence} is 0 whatever the student says")
        return mix

    def steps(self, tokens: Tokens) -> int:
        """How many steps these tokens are."""
        return max(1, round(self.tokens / (self.batch * tokens.ids.shape[1])))

    def trained_tokens(self, tokens: Tokens | None) -> int:
        return self.tokens

    @property
    def towards_teacher(self) -> Loss:
        """The divergence that is asked for."""
        from distill._losses import Loss

        return Loss(self.divergence, self.temperature, self.mix, self.alpha, self.beta)
