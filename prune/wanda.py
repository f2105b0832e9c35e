"""Wanda (Sun et al., 2023, arXiv:2306.11695): weights count as much as their inputs are large."""

from typing import ClassVar

from pydantic import Field

from prune._settings_scored import COMPARE, Compare, ScoredPruning


class Wanda(ScoredPruning):
    """Pruning by |weight| x norm of its input, compared within each output channel; what is left does not change."""

    paper: ClassVar = "Sun et al., 2023, arXiv:2306.11695"
    needs_calibration: ClassVar = True

    compare: Compare = Field("row", description=COMPARE)
