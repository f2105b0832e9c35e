"""AWQ (Lin et al., 2023, arXiv:2306.00978): scales that protect the channels with large inputs, then rounding."""

from typing import ClassVar

from pydantic import Field

from compress.core.passes import Job
from quantize._settings import WeightQuantization
from quantize.prepare._transform import Transform
from quantize.prepare.awq_scale import AWQScale


class AWQ(WeightQuantization):
    """Activation-aware weight quantization: the transform awq_scale, then round-to-nearest with the span of each group
    searched for the least error of the layer's outputs."""

    paper: ClassVar = "Lin et al., 2023, arXiv:2306.00978"
    needs_calibration: ClassVar = True
    prepares: ClassVar = True

    steps: int = Field(20, ge=2, le=200, description="exponents of the scales that are tried, from 0 to 1")

    def own_problem(self) -> str | None:
        taken = next((step.name for step in self.prepare if step.transform.balances), None)
        return f"prepare: {taken} moves the scales that awq itself searches" if taken else None

    @property
    def first_steps(self) -> tuple[Transform, ...]:
        return (*super().first_steps, AWQScale(steps=self.steps))

    @property
    def transforms(self) -> tuple[str, ...]:
        return (*super().transforms, "awq_scale")

    def run(self, job: Job) -> None:
        from compress.core.statistics import Hessian
        from quantize._awq import round_group

        for block in self.blocks(job, frozenset({Hessian})):
            for group in block.groups:
                sites = self.chosen(group)
                if sites:
                    round_group(group, sites, self.clip, job)
                group.release()
