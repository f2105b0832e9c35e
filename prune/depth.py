"""Whole blocks: those that change the hidden states least, or that the calibration text misses least."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from prune._structure import StructuredPruning

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost
    from compress.core.reshaped import ReshapedCheckpoint


class Depth(StructuredPruning):
    """Fewer blocks. Those that stay are as they were, so that masked weights stay masked."""

    takes: ClassVar = frozenset({"dense", "masked"})
    gives: ClassVar = None
    paper: ClassVar = (
        "Gromov et al., 2024, arXiv:2403.17887; Men et al., 2024, arXiv:2403.03853; Kim et al., 2024, arXiv:2402.02834"
    )
    needs_calibration: ClassVar = True
    renumbers_blocks: ClassVar = True

    importance: Literal["influence", "perplexity"] = Field(
        "influence",
        description="by how far hidden states turn between input and output (one look at the model), or by the "
        "perplexity of the calibration text without the blocks (one look for each choice)",
    )
    contiguous: bool = Field(
        True,
        description="whether neighbouring blocks go together; false: those that count least each by itself, wherever",
    )
    order: Literal["once", "one_by_one"] = Field(
        "once",
        description="without contiguous: all blocks are judged in the whole model, or again after each one that went",
    )

    def model_post_init(self, context: object) -> None:
        super().model_post_init(context)
        if self.contiguous and self.order == "one_by_one":
            raise ValueError("neighbouring blocks go together: order one_by_one needs contiguous: false")

    @property
    def what(self) -> str:
        return "blocks"

    def total(self, checkpoint: Checkpoint) -> int:
        return checkpoint.num_blocks

    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        from prune._depth import without_others

        sizes = _sizes(checkpoint)
        largest = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:count]
        return without_others(checkpoint, sorted(largest))

    def notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        alike = len(set(_sizes(checkpoint))) == 1
        return () if alike else ("blocks differ in size: what stays is at most as large as planned",)

    def cost(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Cost:
        from prune._depth import choice_cost

        return choice_cost(self, checkpoint, calibration, self.count(checkpoint))

    def run(self, job: Job) -> None:
        from prune._depth import choose, without_others

        count = self.count(job.checkpoint)
        kept = job.remember("kept", lambda: choose(self, job, count))
        job = job.onto(without_others(job.checkpoint, kept))
        for _ in job.walk(calibrate=False):
            pass


def _sizes(checkpoint: Checkpoint) -> list[int]:
    """Bytes of each block."""
    blocks = range(checkpoint.num_blocks)
    return [sum(checkpoint.info(name).bytes for name in checkpoint.block_tensors(index)) for index in blocks]
