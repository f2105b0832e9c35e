"""What methods that train on generated text have in common: how texts are begun and completed, and what that costs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Plan
from compress.core.services import Sampling
from distill._settings_taught import Led

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost

MOST_AT_ONCE = 64  # prompts of the teacher's that are completed together


class Completing(Led):
    """Settings shared by the methods that let a model complete the beginnings of calibration rows."""

    prompt_tokens: int = Field(64, ge=1, description="tokens of a calibration row that are completed")
    new_tokens: int = Field(128, ge=1, description="tokens that are put behind them at most, up to an end of text")
    sampling_temperature: float = Field(1.0, ge=0, le=100, description="of completions; 0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="completions come from the likeliest tokens with this share")

    @property
    def completed_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.new_tokens

    def text_tokens(self, tokens: Tokens) -> int:
        return len(tokens.ids) * self.completed_tokens

    def sampling(self, at_once: int) -> Sampling:
        """The settings in the runtime's terms."""
        return Sampling(self.prompt_tokens, self.new_tokens, self.sampling_temperature, self.top_p, at_once)

    @abstractmethod
    def generating(self, checkpoint: Checkpoint, teacher: Checkpoint, tokens: Tokens) -> list[tuple[Cost, bool]]:
        """What completions cost, and whether the student and the teacher are held beside the model that makes them."""

    def written_once(self, model: Checkpoint, rows: int) -> Cost:
        """What it costs to let a model complete so many rows, once, and to keep that as 64-bit numbers."""
        from compress.core.generating import generating_cost

        cost = generating_cost(model, self.sampling(MOST_AT_ONCE), rows)
        return replace(cost, spill_bytes=8 * rows * self.completed_tokens)

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        """That of training, and of generation: in the same process, before or in between."""
        from compress.core.memory import IMPORTS_BYTES

        limit = checkpoint.config.get("max_position_embeddings")
        if isinstance(limit, int) and self.completed_tokens > limit:
            raise UsageError(
                f"prompt_tokens and new_tokens are {self.completed_tokens} together, "
                f"and the model has {limit} positions",
                where="distill.new_tokens",
            )
        plan = super().planned(checkpoint, calibration, teacher)
        costs = []
        if calibration is not None and teacher is not None:
            costs = self.generating(checkpoint, teacher, calibration)
        beside = sum(cost.memory_bytes for cost, stays in costs if stays)
        before = max((cost.memory_bytes for cost, stays in costs if not stays), default=0)
        return replace(
            plan,
            peak_memory_bytes=max(plan.peak_memory_bytes + beside, IMPORTS_BYTES + before),
            disk_bytes=plan.disk_bytes + sum(cost.spill_bytes for cost, _ in costs),
            minutes=plan.minutes + sum(cost.minutes for cost, _ in costs),
        )
