"""SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): column by column, later columns make up for what goes."""

from typing import ClassVar

from pydantic import Field

from compress.core.passes import Job
from prune._settings import UpdatingPruning


class SparseGPT(UpdatingPruning):
    """SparseGPT: weights go where that costs the outputs least, and those that are left take on what the others did."""

    paper: ClassVar = "Frantar & Alistarh, 2023, arXiv:2301.00774"

    block_size: int = Field(
        16, ge=1, le=4096, description="input channels whose weights are compared at a time, unless there is a pattern"
    )

    def solver_bytes(self, rows: int, width: int) -> int:
        return 4 * 4 * rows * width  # the weight twice, and what the sweep has left of it and its errors

    def run(self, job: Job) -> None:
        from compress.core.statistics import Hessian
        from prune._allocation import shares_of
        from prune._sparsegpt import Settings, prune_group

        shares = shares_of(self, job, by_inputs=True)
        settings = Settings(self.damping, self.block_size, self.spread)
        for block in job.walk(frozenset({Hessian}), self.order):
            for group in block.groups:
                sites = self.chosen(group)
                if sites:
                    prune_group(group, sites, shares, settings, job)
                group.release()
