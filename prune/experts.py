"""Experts: whole experts of every mixture go, with their rows of the router."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job
from compress.core.sizes import sizes_of, with_defaults
from prune._structure import StructuredPruning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.core.checkpoint import Checkpoint
    from compress.core.reshaped import ReshapedCheckpoint


class Experts(StructuredPruning):
    """Fewer experts, as many in all blocks that have any. Those that stay are left as they are, and so is the number of
    experts that a token goes to."""

    paper: ClassVar = "Lasby et al., 2025, arXiv:2510.13999"
    needs_calibration: ClassVar = True
    only_reads: ClassVar = True

    importance: Literal["reap", "frequency"] = Field(
        "reap",
        description="by how much an expert adds to the tokens that reach it: router weight times the length of its "
        "output, on average (REAP); by how many tokens reach it (a baseline)",
    )

    @property
    def what(self) -> str:
        return "experts"

    def total(self, checkpoint: Checkpoint) -> int:
        if not any(checkpoint.expert_count(index) for index in range(checkpoint.num_blocks)):
            family = checkpoint.architecture.experts is None
            whose = f"{checkpoint.model_type} models have" if family else "this model has"
            raise UsageError(f"{whose} no experts", where="prune.method", hint="channels makes their layers narrower")
        return sizes_of(checkpoint.config)["experts"]

    def count(self, checkpoint: Checkpoint) -> int:
        count, active = super().count(checkpoint), self._active(checkpoint)
        if count < active:
            target = next((name for name in ("keep", "parameters", "max_size") if getattr(self, name)), "ratio")
            raise UsageError(
                f"{count} of {self.total(checkpoint)} experts would stay, but every token goes to {active} of them "
                "(num_experts_per_tok)",
                where=f"prune.{target}",
                hint=f"at least {active} have to stay",
            )
        return count

    def _active(self, checkpoint: Checkpoint) -> int:
        return with_defaults(checkpoint.config).get("num_experts_per_tok", 1)

    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        return self.without(checkpoint, dict.fromkeys(range(checkpoint.num_blocks), range(count)))

    def without(self, checkpoint: Checkpoint, kept: Mapping[int, Sequence[int]]) -> ReshapedCheckpoint:
        """The model with these experts of each block, as many everywhere, in that order."""
        from compress.core.reshaped import ReshapedCheckpoint
        from prune._surgery import expert_cuts, expert_names

        mixtures = {block: stay for block, stay in kept.items() if checkpoint.expert_count(block)}
        cuts = {}
        for block, stay in mixtures.items():
            cuts |= expert_cuts(checkpoint, block, stay)
        stated = with_defaults(checkpoint.config)
        keys = [key for key in ("num_experts", "num_local_experts") if key in stated]
        config = dict.fromkeys(keys, max(map(len, mixtures.values())))
        return ReshapedCheckpoint(checkpoint, config, cuts=cuts, names=expert_names(checkpoint, mixtures))

    def run(self, job: Job) -> None:
        from prune._routing import choose_experts

        count = self.count(job.checkpoint)
        kept = job.remember("kept", lambda: choose_experts(job, count, self.importance))
        job = job.onto(self.without(job.checkpoint, dict(enumerate(kept))))
        for block in job.walk(calibrate=False):
            for site in (site for group in block.groups if group.routed for site in group.sites):
                site.note(method=self.importance)
