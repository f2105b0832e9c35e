"""Distillation of sequences: the student learns from texts that the teacher has written."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from distill._settings_completing import Completing
from distill._settings_taught import Taught

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost


class Sequence(Completing, Taught):
    """Let the teacher complete the beginnings of the calibration rows, once, and train the student on what it says."""

    paper: ClassVar = "Kim and Rush, 2016, arXiv:1606.07947"
    can_shard: ClassVar = True

    loss: Literal["text", "logits"] = Field(
        "text",
        description="text: cross entropy to the tokens that it wrote; logits: divergence from its distributions there",
    )

    @property
    def joins(self) -> bool:
        return True

    def steps(self, tokens: Tokens) -> int:
        return max(1, round(self.tokens / (self.batch * self.completed_tokens)))

    def longest(self, tokens: Tokens) -> int:
        return self.completed_tokens

    def taught_tokens(self, calibration: Tokens | None) -> int:
        return self.tokens if self.loss == "logits" else 0

    def generating(self, checkpoint: Checkpoint, teacher: Checkpoint, tokens: Tokens) -> list[tuple[Cost, bool]]:
        return [(self.written_once(teacher, len(tokens.ids)), False)]

    def run(self, job: Job) -> None:
        from distill._sequence import train_on_completions

        train_on_completions(self, job)
