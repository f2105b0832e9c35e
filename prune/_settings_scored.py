"""What the methods have in common whose weights that stay do not change: a score for each weight, the lowest go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.core.passes import Job
from prune._settings import WeightPruning

Compare = Literal["row", "layer", "global"]
COMPARE = "the same share of every output channel, of every layer, or of all layers together"


class ScoredPruning(WeightPruning):
    """Settings of the methods that score weights; with inputs, if they are calibrated."""

    compare: Compare = Field("layer", description=COMPARE)

    @property
    def compares_all(self) -> bool:
        return self.compare == "global" and self.spread is None

    def run(self, job: Job) -> None:
        from compress.core.statistics import SquaredMean
        from prune._allocation import shares_of
        from prune._scored import prune_by_score

        shares = shares_of(self, job)
        by_inputs = self.needs_calibration
        for block in job.walk(frozenset({SquaredMean} if by_inputs else ()), calibrate=by_inputs):
            for group in block.groups:
                for site in self.chosen(group):
                    prune_by_score(site, group if by_inputs else None, shares[site.name], self.spread, self.compare)
                group.release()
