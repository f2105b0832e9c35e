"""The vocabulary: tokens that the text hardly uses lose their rows in embedding and head, and their place in the
tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job, Plan
from prune._structure import StructuredPruning

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost
    from compress.core.reshaped import ReshapedCheckpoint


class Vocabulary(StructuredPruning):
    """Fewer tokens. Special tokens and bytes stay, so that any text can still be written; and so does what a token that
    stays is merged from, so that text of such tokens is cut as before."""

    takes: ClassVar = frozenset({"dense", "masked"})
    gives: ClassVar = None
    paper: ClassVar = "Ushio et al., 2023, arXiv:2305.15020"
    needs_calibration: ClassVar = True
    renumbers_tokens: ClassVar = True

    min_count: int | None = Field(
        None,
        ge=1,
        description="what occurs so often in the calibration text must stay: a target without room is refused",
    )
    multiple: int = Field(8, ge=1, le=65536, description="what stays is a multiple of this: what kernels like")

    @property
    def what(self) -> str:
        return "tokens"

    def total(self, checkpoint: Checkpoint) -> int:
        return checkpoint.config["vocab_size"]

    def step(self, checkpoint: Checkpoint) -> int:
        return self.multiple

    def count(self, checkpoint: Checkpoint) -> int:
        from prune._vocabulary import always_kept

        count, least = super().count(checkpoint), len(always_kept(checkpoint))
        if count < least:
            raise UsageError(
                f"{count} of {self.total(checkpoint)} tokens would stay, but {least} must: bytes or letters, special "
                "tokens and what they are merged from",
                where="prune",
                hint=f"keep {-(-least // self.multiple) * self.multiple} or more",
            )
        return count

    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        from prune._vocabulary import with_rows

        return with_rows(checkpoint, range(count))

    def cost(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Cost:
        from compress.core.memory import reading_cost

        embedding = checkpoint.info(checkpoint.embedding_tensor).bytes
        return reading_cost(checkpoint, None, blocks=0, heads=0, beside_bytes=embedding)

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """As others; UsageError if tokens that must stay have no room."""
        from prune._vocabulary import choose

        if calibration is not None and int(calibration.ids.max()) < self.total(checkpoint):
            choose(self, checkpoint, calibration, self.count(checkpoint))
        return super().plan(checkpoint, calibration)

    def run(self, job: Job) -> None:
        from prune._vocabulary import choose, with_tokens

        count = self.count(job.checkpoint)
        kept = job.remember("kept", lambda: choose(self, job.checkpoint, job.calibration, count))
        job = job.onto(with_tokens(job.checkpoint, kept))
        for _ in job.walk(calibrate=False):
            pass
