"""Wanda (Sun et al., 2023, arXiv:2306.11695): weights count as much as their inputs are large."""

from typing import ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from prune._settings import WeightPruning


class Wanda(WeightPruning):
    """Pruning by |weight| x norm of its input, compared within each output channel; what is left does not change."""

    paper: ClassVar = "Sun et al., 2023, arXiv:2306.11695"
    needs_calibration: ClassVar = True

    compare: Literal["row", "layer", "global"] = Field(
        "row", description="the same share of every output channel, of every layer, or of all layers together"
    )

    def run(self, job: Job) -> None:
        from compress.core.statistics import SquaredMean
        from prune._allocation import shares_of
        from prune._scored import prune_by_score

        shares = shares_of(self, job, by_inputs=True)
        for block in job.walk(frozenset({SquaredMean})):
            for group in block.groups:
                for site in self.chosen(group):
                    prune_by_score(site, group, shares[site.name], self.spread, self.compare)
                group.release()
