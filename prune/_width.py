"""Heads and channels: which go, and what becomes of the layer that reads them.

Shape suffixes: R rows (output channels), K input channels, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.core.checkpoint import Checkpoint
from compress.core.passes import Job
from compress.core.statistics import Hessian, Mean, SquaredMean, Statistic
from compress.core.walk import Block, Group, Site
from prune._osscar import Problem
from prune._prune import relative_loss
from prune._settings_width import Importance, WidthPruning
from prune._surgery import Heads, channel_cuts, expert_prefixes, head_cuts
from prune._uneven import uneven_widths
from prune._units import Units
from prune.channels import Channels
from prune.heads import Heads as HeadPruning

_STATISTICS: dict[Importance, frozenset[type[Statistic]]] = {
    "osscar": frozenset({Hessian}),
    "activation": frozenset({SquaredMean}),
    "fluctuation": frozenset({SquaredMean, Mean}),
    "magnitude": frozenset(),
}


def prune_channels(settings: Channels, job: Job, count: int) -> None:
    """Narrow every feed-forward network to `count` channels (dense blocks beside experts: in proportion), or as many
    in all where widths are uneven."""
    checkpoint = job.checkpoint
    uneven = settings.widths == "uneven"
    widths = job.remember("widths", lambda: uneven_widths(settings, job, count)) if uneven else None

    def work(block: Block) -> None:
        groups = {group.name: group for group in block.groups}
        for prefix in expert_prefixes(checkpoint, block.index):
            reader = groups[f"{prefix}down"]
            keep = settings.width_for(checkpoint, reader.width, count) if widths is None else widths[block.index]
            units = Units.alike(reader.width, 1, keep)
            kept = _narrow(settings, block, reader, groups[f"{prefix}gate_up"], units, job)
            block.cuts |= channel_cuts(checkpoint, block.index, prefix, kept)

    left = settings.shrunk(checkpoint, count) if widths is None else settings.narrowed(checkpoint, widths)
    _walk(settings, job, left, work)


def prune_heads(settings: HeadPruning, job: Job, count: int) -> None:
    """Leave `count` key-value heads with their queries, or `count` query heads, in every block."""
    checkpoint = job.checkpoint
    heads = Heads.of(checkpoint)

    def work(block: Block) -> None:
        groups = {group.name: group for group in block.groups}
        kept = _narrow(settings, block, groups["o"], groups["qkv"], _head_units(settings, heads, count), job)
        block.cuts |= head_cuts(checkpoint, block.index, *_heads_of(settings, heads, kept))

    _walk(settings, job, settings.shrunk(checkpoint, count), work)


def _head_units(settings: HeadPruning, heads: Heads, count: int) -> Units:
    if settings.unit == "groups":
        return Units.alike(heads.groups, heads.sharing * heads.size, count)
    channels = torch.arange(heads.queries * heads.size).view(heads.queries, heads.size)
    pools = tuple(head // heads.sharing for head in range(heads.queries))
    return Units(channels, pools, count // heads.groups)


def _heads_of(settings: HeadPruning, heads: Heads, kept: Sequence[int]) -> tuple[list[int], list[int]]:
    """Query heads and key-value heads that stay."""
    if settings.unit == "queries":
        return list(kept), list(range(heads.groups))
    return [group * heads.sharing + place for group in kept for place in range(heads.sharing)], list(kept)


def _walk(settings: WidthPruning, job: Job, left: Checkpoint, work: Callable[[Block], None]) -> None:
    """Work on every block, then write `left`."""
    added = settings.added_biases(job.checkpoint)
    for block in job.walk(_STATISTICS[settings.importance], "groups", calibrate=settings.calibrated):
        for site in block.sites:
            if f"{site.name}.bias" in added:
                block.add_bias(site, torch.zeros(site.shape[0]))
        work(block)
    job.onto(left)


def _narrow(settings: WidthPruning, block: Block, reader: Group, makers: Group, units: Units, job: Job) -> list[int]:
    """Choose the units of the reader's inputs that stay and let its weight be without the others."""
    (site,) = reader.sites
    if units.keep == units.count:
        return list(range(units.count))
    if settings.importance == "osscar":
        return _by_error(settings, site, reader, units)
    weight_RK = site.weight
    kept = units.best(_score(settings.importance, weight_RK, reader, makers, units))
    kept_K = torch.zeros(units.columns_UC.numel(), dtype=torch.bool)
    kept_K[units.channels(kept)] = True
    if settings.importance == "fluctuation" and settings.bias_key(job.checkpoint):
        bias = block.parameters[f"{site.name}.bias"]
        bias.replace(bias.value + weight_RK[:, ~kept_K] @ reader.statistics[Mean][~kept_K])
    size_RK = weight_RK if not settings.calibrated else weight_RK * reader.statistics[SquaredMean].sqrt()
    error = relative_loss(size_RK, kept_K.expand_as(size_RK))
    site.replace(weight_RK.masked_fill_(~kept_K, 0).to(site.original.dtype))
    site.note(method=settings.importance, error=error, tokens=reader.tokens)
    reader.release()
    return kept


def _by_error(settings: WidthPruning, site: Site, reader: Group, units: Units) -> list[int]:
    problem = Problem(site.weight, reader.statistics[Hessian], units, settings.damping)
    tokens = reader.tokens
    reader.release()
    found = problem.solve(settings.rounds, settings.swaps)
    site.replace(found.weight_RK.float())
    site.note(method="osscar", error=found.error, damping=settings.damping, tokens=tokens)
    return list(found.kept)


def _score(importance: Importance, weight_RK: Tensor, reader: Group, makers: Group, units: Units) -> Tensor:
    """How much each unit counts, [U]."""
    if importance == "activation":
        channel_K = reader.statistics[SquaredMean]
    elif importance == "fluctuation":
        variance_K = reader.statistics[SquaredMean] - reader.statistics[Mean].square()
        channel_K = variance_K * weight_RK.square().sum(0)
    else:
        channel_K = weight_RK.square().sum(0)
        for site in makers.sites if importance == "magnitude" else ():
            if site.shape[0] == reader.width:  # no fused layer, nor keys that several heads share
                channel_K = channel_K + site.weight.square().sum(1)
    return channel_K[units.columns_UC].sum(1)
