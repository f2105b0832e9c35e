"""Distillation of next-token distributions: the student learns what the teacher would say, on given text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from compress.core.passes import Job, Plan
from compress.core.quantities import format_bytes
from distill._cache_settings import Cache
from distill._divergences import Divergence
from distill._settings import Training

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from distill._losses import Loss


class Logits(Training):
    """Train the whole model towards the distributions of a teacher, which sees the same text beside it."""

    paper: ClassVar = "Hinton et al., 2015, arXiv:1503.02531; Agarwal et al., 2024, arXiv:2306.13649"

    teacher: str = Field("original", description="original: the model that the run starts from; or a folder or hub id")
    divergence: Divergence = Field("forward_kl", description="between the teacher's distribution and the student's")
    temperature: float = Field(1.0, gt=0, le=100, description="of both distributions")
    mix: float = Field(0.5, ge=0, le=1, description="beta of jsd, alpha of skew_kl and skew_rkl")
    alpha: float = Field(0.2, gt=0, le=10, description="of alpha_beta")
    beta: float = Field(0.7, gt=0, le=10, description="of alpha_beta")
    cross_entropy: float = Field(0.0, ge=0, le=1, description="share of the loss that is the text's own next token")
    cache: Cache | None = Field(None, description="write what the teacher says once, and train without it beside")

    @field_validator("cache")
    @classmethod
    def _enough_for_the_divergence(cls, cache: Cache | None, found: ValidationInfo) -> Cache | None:
        divergence = found.data.get("divergence", "forward_kl")
        if cache is not None and divergence != "forward_kl":
            raise ValueError(f"{divergence} needs the teacher's whole distribution, and a cache holds part of it")
        return cache

    @property
    def loss(self) -> Loss:
        from distill._losses import Loss

        return Loss(self.divergence, self.temperature, self.mix, self.alpha, self.beta, self.cross_entropy)

    def teacher_bytes(self, checkpoint: Checkpoint) -> int:
        if self.cache is not None:
            return 0  # it is gone before there is a student
        return 4 * sum(info.bytes for info in checkpoint.tensors.values()) // checkpoint.dtype.itemsize

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        plan = super().plan(checkpoint, calibration)
        if self.cache is None or calibration is None:
            return plan
        token_bytes = self.cache.token_bytes(checkpoint.config["vocab_size"])
        cache_bytes = token_bytes * (calibration.count - len(calibration.ids))
        said = f"the teacher cache takes up to {format_bytes(cache_bytes)}, {token_bytes} bytes a token"
        return replace(plan, disk_bytes=plan.disk_bytes + cache_bytes, notices=(*plan.notices, said))

    def run(self, job: Job) -> None:
        if self.cache is not None:
            from distill._cached import train_on_cache

            train_on_cache(self, self.cache, job)
        else:
            from distill._logits import train_on_logits

            train_on_logits(self, job)
