"""ALPS (Meng et al., 2024, arXiv:2406.07831): masks by ADMM, then the weights that are left by conjugate gradients."""

from typing import ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from prune._settings import UpdatingPruning

_USUAL_ITERATIONS = 90  # until a mask stays as it is


class ALPS(UpdatingPruning):
    """ALPS: mask and weights of a layer are found together, for the least error of its outputs on calibration text."""

    paper: ClassVar = "Meng et al., 2024, arXiv:2406.07831"

    compare: Literal["row", "layer"] = Field(
        "layer", description="the same share of every output channel, or of the layer"
    )
    iterations: int = Field(300, ge=1, le=10_000, description="of ADMM at most; it ends when the mask stays as it is")
    refinements: int = Field(10, ge=0, le=1000, description="steps of conjugate gradients on the mask that was found")

    def solver_bytes(self, rows: int, width: int) -> int:
        return 8 * 4 * rows * width + 4 * 8 * width**2  # copies of the weight in ADMM; the eigenvectors, in fp64

    def solver_operations(self, rows: int, width: int) -> float:
        return 4 * rows * width**2 * (min(self.iterations, _USUAL_ITERATIONS) + self.refinements) + 20 * width**3

    def run(self, job: Job) -> None:
        from compress.core.statistics import Hessian
        from prune._allocation import shares_of
        from prune._alps import Settings, prune_group

        shares = shares_of(self, job, by_inputs=True)
        settings = Settings(self.damping, self.spread, self.compare, self.iterations, self.refinements)
        for block in job.walk(frozenset({Hessian}), self.order):
            for group in block.groups:
                sites = self.chosen(group)
                if sites:
                    prune_group(group, sites, shares, settings, job)
                group.release()
