"""On-policy distillation: the student writes, and the teacher says of each token how likely it would have been."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from distill._divergences import Divergence
from distill._settings_completing import Completing
from distill._settings_taught import Taught

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost


class OnPolicy(Completing, Taught):
    """Generalised distillation: train on what the student as it is now writes behind the beginnings of the calibration
    rows, in some steps, and on given text in the others, each time towards the teacher's distributions."""

    paper: ClassVar = "Agarwal et al., 2024, arXiv:2306.13649"

    divergence: Divergence = Field("reverse_kl", description="between the teacher's distribution and the student's")
    student_share: float = Field(0.5, ge=0, le=1, description="lambda: how often a step is on what the student writes")
    otherwise: Literal["text", "teacher"] = Field(
        "text",
        description="what the other steps are on: the calibration rows, or their beginnings as the teacher goes on",
    )
    offpolicy: float = Field(0.0, ge=0, le=1, description="share of the steps that come first and are on those alone")

    def steps(self, tokens: Tokens) -> int:
        student = self._student_steps
        other = self.completed_tokens if self.otherwise == "teacher" else tokens.ids.shape[1]
        mean_tokens = student * self.completed_tokens + (1 - student) * other
        return max(1, round(self.tokens / (self.batch * mean_tokens)))

    def longest(self, tokens: Tokens) -> int:
        rows = 0 if self.otherwise == "teacher" else tokens.ids.shape[1]
        return max(rows, self.completed_tokens if self._student_steps or not rows else 0)

    @property
    def _student_steps(self) -> float:
        """Share of all steps that are on what the student writes, as far as that can be known."""
        return (1 - self.offpolicy) * self.student_share

    def generating(self, checkpoint: Checkpoint, teacher: Checkpoint, tokens: Tokens) -> list[tuple[Cost, bool]]:
        from compress.core.generating import generating_cost

        prompts = round(self.steps(tokens) * self._student_steps * self.batch)
        costs = []
        if prompts:
            costs.append((generating_cost(checkpoint, self.sampling(self.batch), prompts), True))
        if self.otherwise == "teacher":
            costs.append((self.written_once(teacher, len(tokens.ids)), False))
        return costs

    def run(self, job: Job) -> None:
        from distill._onpolicy import train_on_policy

        train_on_policy(self, job)
