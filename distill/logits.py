"""Distillation of next-token distributions: the student learns what the teacher would say, on given text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator

from compress.core.passes import Job, Plan
from compress.core.quantities import format_bytes
from distill._cache_settings import Cache
from distill._settings_taught import Taught

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from distill._losses import Loss


class Logits(Taught):
    """Train the whole model towards the distributions of a teacher, which sees the same text beside it."""

    paper: ClassVar = "Hinton et al., 2015, arXiv:1503.02531; Agarwal et al., 2024, arXiv:2306.13649"

    reads_caches: ClassVar[bool] = True
    can_shard: ClassVar = True
    can_compile: ClassVar = True

    cross_entropy: float = Field(0.0, ge=0, le=1, description="share of the loss that is the text's own next token")
    cache: Cache | None = Field(None, description="write what the teacher says once, and train without it beside")

    @field_validator("cache")
    @classmethod
    def _enough_for_the_divergence(cls, cache: Cache | None, found: ValidationInfo) -> Cache | None:
        divergence = found.data.get("divergence", "forward_kl")
        if cache is not None and not cls.reads_caches:
            raise ValueError("is read by method: logits alone: here the teacher itself is needed")
        if cache is not None and divergence != "forward_kl":
            raise ValueError(f"{divergence} needs the teacher's whole distribution, and a cache holds part of it")
        return cache

    @property
    def joins(self) -> bool:
        return self.cache is None  # one process fills a cache and reads it

    def located(self, base_folder: Path) -> Self:
        found = super().located(base_folder)
        if self.cache is None or self.cache.folder is None:
            return found
        folder = base_folder / Path(self.cache.folder).expanduser()
        return found.model_copy(update={"cache": self.cache.model_copy(update={"folder": str(folder)})})

    @property
    def loss(self) -> Loss:
        return replace(self.towards_teacher, cross_entropy=self.cross_entropy)

    def taught_tokens(self, calibration: Tokens | None) -> int:
        return super().taught_tokens(calibration) if self.cache is None else 0  # it is gone before the student comes

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        from distill._memory import reading_bytes, reading_minutes

        plan = super().planned(checkpoint, calibration, teacher)
        if self.cache is None or calibration is None or teacher is None:
            return plan
        self.cache.require_kept(checkpoint.config["vocab_size"])
        token_bytes = self.cache.token_bytes(checkpoint.config["vocab_size"])
        cache_bytes = token_bytes * (calibration.count - len(calibration.ids))
        minutes = reading_minutes(teacher, calibration.count)
        said = (
            f"the teacher cache takes up to {format_bytes(cache_bytes)}, {token_bytes} bytes a token, "
            f"and about {max(minutes, 0.1):.1f} minutes to write, unless it is there"
        )
        return replace(
            plan,
            peak_memory_bytes=max(plan.peak_memory_bytes, reading_bytes(teacher)),
            disk_bytes=plan.disk_bytes + cache_bytes,
            minutes=plan.minutes + minutes,
            notices=(*plan.notices, said),
        )

    def run(self, job: Job) -> None:
        if self.cache is not None:
            from distill._cached import train_on_cache

            train_on_cache(self, self.cache, job)
        else:
            from distill._logits import train_on_logits

            train_on_logits(self, job)
