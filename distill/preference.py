"""Preference recovery: the compressed model learns to prefer the original's answers to its own. Nobody labels them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import EnvironmentRefused, UsageError
from compress.core.passes import Job, Plan, WeightKind
from compress.core.patterns import Pattern
from compress.core.processes import launched
from distill._settings_completing import Completing
from distill._settings_parts import Parts

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost

INSTALL = "pip install 'compress-llm[preference]', or pip install trl"


class Preference(Completing, Parts):
    """Direct preference optimization with TRL: of each prompt the original's answer is chosen and the compressed
    model's own is rejected, and the model that reaches the stage is the reference."""

    takes: ClassVar = frozenset({"dense", "masked", "quantized"})
    paper: ClassVar = "Rafailov et al., 2023, arXiv:2305.18290; Lee et al., 2024, arXiv:2407.03051"

    pairs: int | None = Field(
        None, ge=1, description="prompts: beginnings of so many rows of the calibration text; of all, unless given"
    )
    until: str | None = Field(
        None,
        min_length=1,
        description="a prompt is a row up to this text, such as '<|im_start|>assistant\\n' in a chat",
    )
    epochs: float = Field(1.0, gt=0, le=100, description="how often each pair is trained on")
    loss: Literal["sigmoid", "ipo", "hinge", "sigmoid_norm", "apo_zero"] = Field(
        "sigmoid", description="TRL's name of it: sigmoid is DPO; ipo and sigmoid_norm go by log-probabilities a token"
    )
    beta: float = Field(0.1, gt=0, le=100, description="how dear it is to leave the reference")
    sampling_temperature: float = Field(0.0, ge=0, le=100, description="of answers; 0 takes the likeliest token")
    batch: int = Field(16, ge=1, description="pairs in a step")
    rows_at_once: int = Field(4, ge=1, description="pairs that go through the model together: memory, not the result")
    learning_rate: float = Field(5e-6, gt=0, le=1, description="of weights, or of low-rank pairs, at its highest")
    layers: tuple[Pattern, ...] = Field(
        ("*",), min_length=1, description="with rank and of quantized models: layers that are trained, by name pattern"
    )

    def refusal(self, kind: WeightKind) -> str | None:
        if kind == "quantized" and self.rank is not None:
            return "takes dense or masked weights with rank, for of quantized ones the codes are trained"
        return super().refusal(kind)

    def prompts(self, tokens: Tokens) -> int:
        """How many rows of the text are begun."""
        return len(tokens.ids) if self.pairs is None else self.pairs

    def trained_tokens(self, tokens: Tokens | None) -> int:
        return 0 if tokens is None else round(self.epochs * self.prompts(tokens) * 2 * self.completed_tokens)

    def longest(self, tokens: Tokens) -> int:
        return 2 * self.completed_tokens  # a pair is two rows

    def taught_tokens(self, calibration: Tokens | None) -> int:
        return 0  # the original has written before the student comes

    def generating(self, checkpoint: Checkpoint, teacher: Checkpoint, tokens: Tokens) -> list[tuple[Cost, bool]]:
        return [(self.written_once(model, self.prompts(tokens)), False) for model in (teacher, checkpoint)]

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        """As that of training, for as many pairs as there are prompts: those of equal answers drop out."""
        require_trl()
        if launched() > 1:
            raise UsageError("preference trains in one process", hint="start this run without a launcher")
        rows = 0 if calibration is None else len(calibration.ids)
        if self.pairs is not None and self.pairs > rows:
            raise UsageError(
                f"pairs are {self.pairs}, and the calibration text has {rows} rows to begin",
                where="distill.pairs",
                hint="raise calibration.samples, or leave pairs out",
            )
        plan = super().planned(checkpoint, calibration, teacher)
        return replace(plan, notices=(*plan.notices, "pairs of equal answers drop out, so it may take less"))

    def run(self, job: Job) -> None:
        from distill._preference import prefer

        require_trl()
        prefer(self, job)


def require_trl() -> None:
    """EnvironmentRefused without TRL, which is no dependency of everybody's."""
    if importlib.util.find_spec("trl") is None:
        raise EnvironmentRefused("method: preference needs the package trl", hint=INSTALL)
