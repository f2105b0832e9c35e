"""SparseGPT's maths. Shape suffixes: R rows (output channels), K input channels, B of a block, S of a run in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.events import Notice
from compress.core.passes import Job
from compress.core.solve import ByColumn, Columns, factorise, sweep
from compress.core.statistics import Hessian
from compress.core.walk import Group, Site
from prune._masks import keep
from prune._pattern import Spread
from prune._prune import TINY, put, relative_loss, weighted
from prune._scored import score

_SWEPT_AT_ONCE = 128
UNUSABLE = "its Hessian could not be factorised at any damping"


@dataclass(frozen=True, slots=True)
class Settings:
    """What SparseGPT takes from its recipe, without the sparsities."""

    damping: float
    block_size: int
    spread: Spread | None

    @property
    def run(self) -> int:
        """Columns whose weights are compared at a time."""
        return self.block_size if self.spread is None else self.spread.among


def prune_group(group: Group, sites: Sequence[Site], shares: Mapping[str, float], settings: Settings, job: Job) -> None:
    """Prune sites that share the group's input: one Hessian, one factorisation, a sweep for each."""
    hessian_KK = group.statistics[Hessian]
    square_K = hessian_KK.diagonal().clone()
    power = {site.name: weighted(site.weight, hessian_KK) for site in sites}
    factor = factorise(hessian_KK, damping=settings.damping, activation_order=False)
    for site in sites:
        share = shares[site.name]
        if factor is None:
            fall_back(site, square_K, share, settings.spread, group.tokens, job)
            continue
        weight_RK = site.weight
        chosen = Chosen(share, settings.spread, settings.run)
        loss_R = sweep(weight_RK, factor, chosen, settings.run * max(1, _SWEPT_AT_ONCE // settings.run))
        error = float(loss_R.sum()) / max(power[site.name], TINY)
        put(site, weight_RK, method="sparsegpt", error=error, tokens=group.tokens)


def fall_back(site: Site, square_K: Tensor, share: float, spread: Spread | None, tokens: int, job: Job) -> None:
    """Prune a site as Wanda does for want of better, and say why."""
    job.events(Notice(f"pruned without an update: {UNUSABLE}", site.name, level="warning"))
    weight_RK = site.weight
    score_RK = score(weight_RK, square_K.nan_to_num(0).clamp(min=0))
    kept_RK = keep(score_RK, share, spread, "row")
    error = relative_loss(score_RK, kept_RK)
    put(site, weight_RK.masked_fill_(~kept_RK, 0), method="wanda", error=error, tokens=tokens, fallback=UNUSABLE)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Lets those weights of `run` columns go that cost least now that columns before them erred. What stays becomes
    what the sweep wants it to be; zeros stay zeros."""

    share: float
    spread: Spread | None
    run: int

    def round_block(self, columns: Columns, error_BR: Tensor, loss_R: Tensor) -> None:
        for end in range(len(error_BR), 0, -self.run):
            at = slice(max(0, end - self.run), end)
            target_SR = torch.addmm(columns.target_BR[at], columns.feedback_BB[at, end:], error_BR[end:])
            run = Columns(
                channel_B=torch.arange(at.start, end) - at.start,
                original_BR=columns.original_BR[at],
                target_BR=target_SR,
                feedback_BB=columns.feedback_BB[at, at],
                cost_B=columns.cost_B[at],
            )
            ByColumn(self._mask(run)).round_block(run, error_BR[at], loss_R)

    def _mask(self, run: Columns) -> Callable[[int, Tensor], Tensor]:
        zero_SR = run.original_BR == 0
        score_SR = (free_weights(run).square() * run.cost_B[:, None]).masked_fill_(zero_SR, -1)
        kept_SR = keep(score_SR.t(), self.share, self.spread, "layer").t() & ~zero_SR
        return lambda i, target_R: target_R * kept_SR[i]


def free_weights(run: Columns) -> Tensor:
    """What the columns of a run become, [S, R], if all of them may make up for columns before it. (A target of the
    sweep is what a column becomes when those behind it in the run have been dealt with.)"""
    asked_SR = run.target_BR - run.original_BR
    free_SR = torch.linalg.solve_triangular(run.feedback_BB, asked_SR, upper=True, unitriangular=True)
    return free_SR.add_(run.original_BR)
