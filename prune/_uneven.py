"""Uneven widths: how many channels each block's feed-forward network keeps, so many in all.

Shape suffixes: K input channels of down, the inner channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from compress.core.passes import Job
from compress.core.statistics import Mean, SquaredMean, Statistic

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.walk import Group
    from prune._settings_width import Importance
    from prune.channels import Channels

_STATISTICS: dict[Importance, frozenset[type[Statistic]]] = {
    "osscar": frozenset({SquaredMean}),
    "activation": frozenset({SquaredMean}),
    "fluctuation": frozenset({SquaredMean, Mean}),
    "magnitude": frozenset(),
}


def uneven_widths(settings: Channels, job: Job, count: int) -> list[int]:
    """Widths of all blocks, as many channels as if each kept `count`: those that score highest in the whole model."""
    even = settings.even_widths(job.checkpoint, count)
    if even == settings.inner_widths(job.checkpoint) or any(width % settings.multiple for width in even):
        return even  # nothing goes, or steps of another size came before
    scores = []
    for block in job.measure(_STATISTICS[settings.importance], calibrate=settings.calibrated):
        (reader,) = (group for group in block.groups if group.name == "down")
        scores.append(comparable(settings.importance, reader))
    return shared_out(scores, sum(even), settings.multiple)


def comparable(importance: Importance, reader: Group) -> Tensor:
    """How much each channel counts, [K], on one scale for all layers: the energy of what it adds to the stream, over
    the root of its layer's. That lies half-way between energies, by which a few layers lose nearly all, and shares of
    the layer, which differ little. Energies standardised by layer, as FLAP (arXiv:2312.11983) compares its scores, did
    worse than equal widths where that was measured.
    """
    (site,) = reader.sites
    energy_K = site.weight.square().sum(0)
    if importance != "magnitude":
        energy_K = energy_K * reader.statistics[SquaredMean]
    if importance == "fluctuation":
        energy_K = energy_K - site.weight.square().sum(0) * reader.statistics[Mean].square()
    return energy_K / energy_K.sum().clamp_min(1e-30).sqrt()


def shared_out(scores: Sequence[Tensor], total: int, multiple: int) -> list[int]:
    """How many channels of each layer are among the `total` best, in steps of `multiple`, at least one: exact sum."""
    most = [len(score) // multiple for score in scores]
    best = torch.cat(list(scores)).argsort(descending=True, stable=True)[:total]
    layer = torch.repeat_interleave(torch.arange(len(scores)), torch.tensor([len(score) for score in scores]))
    wanted = (torch.bincount(layer[best], minlength=len(scores)) / multiple).tolist()
    units = [min(limit, max(1, int(want))) for want, limit in zip(wanted, most, strict=True)]
    left = total // multiple - sum(units)
    while left:
        sign = 1 if left > 0 else -1
        able = [i for i in range(len(units)) if (units[i] < most[i] if sign > 0 else units[i] > 1)]
        chosen = max(able, key=lambda i: (sign * (wanted[i] - units[i]), -i))
        units[chosen] += sign
        left -= sign
    return [number * multiple for number in units]
