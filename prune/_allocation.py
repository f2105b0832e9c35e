"""How sparse each layer is to be, where that differs: found before any weight goes, on the original model.

Shape suffixes: R rows (output channels), K input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compress.core.events import Notice
from compress.core.passes import Job
from compress.core.statistics import SquaredMean
from compress.core.walk import Block
from prune._scored import score
from prune._sensitivity import by_sensitivity
from prune._settings import WeightPruning

_SHIFT = 19  # of the 31 bits of a positive float those of its exponent and four of its mantissa are left
_BINS = 1 << (31 - _SHIFT)


def shares_of(settings: WeightPruning, job: Job) -> dict[str, float]:
    """The share of zeros of every layer that is not left alone."""
    if settings.compares_all:
        return job.remember("sparsities", lambda: _global(settings, job))
    if settings.allocation == "owl":
        return job.remember("sparsities", lambda: _owl(settings, job))
    if settings.allocation == "sensitivity":
        return job.remember("sparsities", lambda: by_sensitivity(settings, job))
    names = (name for index in range(job.checkpoint.num_blocks) for name in job.checkpoint.sites(index))
    return dict.fromkeys(names, settings.share)


def _owl(settings: WeightPruning, job: Job) -> dict[str, float]:
    """OWL (Yin et al., 2024, arXiv:2310.05175): the more outliers a block has, the fewer of its weights go."""
    names: list[list[str]] = []
    outliers: list[float] = []
    for block in job.measure(frozenset({SquaredMean})):
        scores = dict(_scores(settings, block, by_inputs=True))
        mean = sum(float(score_RK.sum()) for score_RK in scores.values()) / _count(scores)
        beyond = sum(int((score_RK > settings.owl_outlier * mean).sum()) for score_RK in scores.values())
        names.append([*scores])
        outliers.append(beyond / _count(scores))
    found = torch.tensor(outliers, dtype=torch.float64)
    reach = found.max() - found.min()
    spared = torch.zeros_like(found) if reach == 0 else (found - found.min()) / reach * 2 * settings.owl_spread
    shares = (settings.share - (spared - spared.mean())).clamp(0, 1).tolist()
    told = ", ".join(f"{share:.3f}" for share in shares)
    job.events(Notice(f"outliers per block ask for sparsities of {told}", "owl"))
    return {name: share for block, share in zip(names, shares, strict=True) for name in block}


def _global(settings: WeightPruning, job: Job) -> dict[str, float]:
    """The shares at which one threshold cuts all layers: from counts of scores, which are exact but for the place of
    the threshold inside a bin of 6 %."""
    by_inputs = settings.needs_calibration
    statistics = frozenset({SquaredMean} if by_inputs else ())
    counts: dict[str, Tensor] = {}
    for block in job.measure(statistics, calibrate=by_inputs):
        for name, score_RK in _scores(settings, block, by_inputs=by_inputs):
            bins = score_RK.flatten().view(torch.int32) >> _SHIFT
            counts[name] = torch.bincount(bins, minlength=_BINS)
    total = torch.stack([*counts.values()]).sum(0)
    wanted = settings.share * int(total.sum())
    below = total.cumsum(0)
    last = int((below < wanted).sum())
    inside = (wanted - int(below[last] - total[last])) / int(total[last])
    return {
        name: (int(count[:last].sum()) + inside * int(count[last])) / int(count.sum()) for name, count in counts.items()
    }


def _scores(settings: WeightPruning, block: Block, *, by_inputs: bool) -> Iterator[tuple[str, Tensor]]:
    for group in block.groups:
        for site in settings.chosen(group):
            yield site.name, score(site.weight, group.statistics[SquaredMean] if by_inputs else None)
        group.release()


def _count(scores: dict[str, Any]) -> int:
    return sum(score_RK.numel() for score_RK in scores.values())
