"""The smallest weights go. Needs no data, and is the baseline that others have to beat."""

from typing import ClassVar

from prune._settings_scored import ScoredPruning


class Magnitude(ScoredPruning):
    """Magnitude pruning: the weights with the least absolute value become zero; what is left does not change."""

    paper: ClassVar = "baseline; Han et al., 2015, arXiv:1506.02626"
    needs_calibration: ClassVar = False
