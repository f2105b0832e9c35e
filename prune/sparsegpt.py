"""SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): column by column, later columns make up for what goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.core.passes import Job
from prune._settings import UpdatingPruning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.core.walk import Group, Site


class SparseGPT(UpdatingPruning):
    """SparseGPT: weights go where that costs the outputs least, and those that are left take on what the others did."""

    paper: ClassVar = "Frantar & Alistarh, 2023, arXiv:2301.00774"

    block_size: int = Field(
        16, ge=1, le=4096, description="input channels whose weights are compared at a time, unless there is a pattern"
    )

    def solver_bytes(self, rows: int, width: int) -> int:
        return 4 * 4 * rows * width  # the weight twice, and what the sweep has left of it and its errors

    def prune_group(self, group: Group, sites: Sequence[Site], shares: Mapping[str, float], job: Job) -> None:
        from prune._sparsegpt import Settings, prune_group

        prune_group(group, sites, shares, Settings(self.damping, self.block_size, self.spread), job)
