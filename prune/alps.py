"""ALPS (Meng et al., 2024, arXiv:2406.07831): masks by ADMM, then the weights that are left by conjugate gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from prune._settings import UpdatingPruning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.core.walk import Group, Site

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

    def prune_group(self, group: Group, sites: Sequence[Site], shares: Mapping[str, float], job: Job) -> None:
        from prune._alps import Settings, prune_group

        prune_group(
            group,
            sites,
            shares,
            Settings(self.damping, self.spread, self.compare, self.iterations, self.refinements),
            job,
        )
