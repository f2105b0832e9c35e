"""The smallest weights go. Needs no data, and is the baseline that others have to beat."""

from typing import ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from prune._settings import WeightPruning


class Magnitude(WeightPruning):
    """Magnitude pruning: the weights with the least absolute value become zero; what is left does not change."""

    paper: ClassVar = "baseline; Han et al., 2015, arXiv:1506.02626"
    needs_calibration: ClassVar = False

    compare: Literal["row", "layer", "global"] = Field(
        "layer", description="the same share of every output channel, of every layer, or of all layers together"
    )

    def run(self, job: Job) -> None:
        from prune._allocation import shares_of
        from prune._scored import prune_by_score

        shares = shares_of(self, job, by_inputs=False)
        for block in job.walk(calibrate=False):
            for group in block.groups:
                for site in self.chosen(group):
                    prune_by_score(site, None, shares[site.name], self.spread, self.compare)
