"""HQQ (Badri & Shaji, 2023, mobiusml.github.io/hqq_blog): grids for a norm that forgives outliers, without data."""

from typing import ClassVar

from pydantic import Field

from compress.core.passes import Job
from quantize._settings import WeightQuantization


class HQQ(WeightQuantization):
    """Half-quadratic quantization, calibration-free, ending on grids that stock formats hold."""

    paper: ClassVar = "Badri & Shaji, 2023, mobiusml.github.io/hqq_blog"
    needs_calibration: ClassVar = False
    prepares: ClassVar = True

    norm: float = Field(
        0.7, gt=0, le=1, description="p of the error Σ|w - ŵ|ᵖ that is minimised: below 1 outliers count less"
    )
    iterations: int = Field(20, ge=1, le=1000, description="rounds of shrinking the error and solving for the grid")

    def run(self, job: Job) -> None:
        from quantize._hqq import solve_site

        for block in self.blocks(job):
            for group in block.groups:
                for site, scheme in self.chosen(group):
                    solve_site(site, scheme, job.checkpoint.dtype, self.clip, self.norm, self.iterations)
