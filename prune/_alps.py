"""ALPS's maths: min ½ tr((W - Ŵ) H (W - Ŵ)ᵀ) over sparse W, Ŵ the dense weight.

A copy D of W has the mask, and ADMM brings the two together under a growing penalty ρ. Inputs are scaled so that H has
a diagonal of ones. One eigendecomposition of H serves every ρ and all layers that read the input.

Shape suffixes: R rows (output channels), K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.passes import Job
from compress.core.statistics import Hessian
from compress.core.walk import Group, Site
from prune._masks import Compare, keep
from prune._pattern import Spread
from prune._prune import TINY, put, weighted
from prune._sparsegpt import fall_back

_FIRST_PENALTY = 0.1
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # change of the mask, as a share of what is kept: factor of ρ
_UPDATED_EVERY = 3  # iterations between two looks at the mask

Project = Callable[[Tensor], Tensor]
"""Scores [R, K] to the mask of what stays."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What ALPS takes from its recipe, without the sparsities."""

    damping: float
    spread: Spread | None
    compare: Compare
    iterations: int
    refinements: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """H = Q diag(λ) Qᵀ of scaled inputs, fp32, with ones on its diagonal: x = scale * the scaled x."""

    hessian_KK: Tensor
    vectors_KK: Tensor
    values_K: Tensor
    scale_K: Tensor

    @classmethod
    def of(cls, hessian_KK: Tensor, damping: float) -> Inputs | None:
        """From second moments fp32; None if they are not finite, or all zero."""
        diagonal_K = hessian_KK.diagonal().double()
        if not bool(diagonal_K.isfinite().all()) or not bool((diagonal_K > 0).any()):
            return None
        scale_K = (diagonal_K + damping * diagonal_K.mean()).sqrt()
        scaled_KK = hessian_KK.double() / scale_K / scale_K[:, None]
        scaled_KK.diagonal().fill_(1)
        values_K, vectors_KK = torch.linalg.eigh(scaled_KK)
        return cls(scaled_KK.float(), vectors_KK.float(), values_K.clamp_(min=0).float(), scale_K.float())


def prune_group(group: Group, sites: Sequence[Site], shares: Mapping[str, float], settings: Settings, job: Job) -> None:
    """Prune sites that share the group's input: one eigendecomposition for all of them."""
    hessian_KK = group.statistics[Hessian]
    inputs = Inputs.of(hessian_KK, settings.damping)
    for site in sites:
        share = shares[site.name]
        if inputs is None:
            fall_back(site, hessian_KK.diagonal(), share, settings.spread, group.tokens, job)
            continue
        weight_RK = site.weight
        pruned_RK = solve(weight_RK, inputs, share, settings)
        error = weighted(weight_RK - pruned_RK, hessian_KK) / max(weighted(weight_RK, hessian_KK), TINY)
        put(site, pruned_RK, method="alps", error=error, tokens=group.tokens)


def solve(weight_RK: Tensor, inputs: Inputs, share: float, settings: Settings) -> Tensor:
    """The sparse weight, fp32 [R, K]. Zeros of `weight_RK` stay zeros."""
    zero_RK = weight_RK == 0
    aim_RK = weight_RK * inputs.scale_K

    def project(score_RK: Tensor) -> Tensor:
        score_RK = score_RK.masked_fill(zero_RK, -1)
        return keep(score_RK, share, settings.spread, settings.compare) & ~zero_RK

    kept_RK, start_RK = find_mask(aim_RK, inputs, project, settings.iterations)
    return refine(start_RK, aim_RK, inputs.hessian_KK, kept_RK, settings.refinements).div_(inputs.scale_K)


def find_mask(aim_RK: Tensor, inputs: Inputs, project: Project, iterations: int) -> tuple[Tensor, Tensor]:
    """ADMM from the dense weight: bool [R, K] of what stays, and its values."""
    vectors_KK, values_K = inputs.vectors_KK, inputs.values_K
    pull_RK = (aim_RK @ vectors_KK).mul_(values_K)
    penalty = _FIRST_PENALTY
    kept_RK = project(aim_RK.square())
    looked_at_RK = kept_RK
    sparse_RK = aim_RK * kept_RK
    dual_RK = torch.zeros_like(aim_RK)
    for iteration in range(1, iterations + 1):
        dense_RK = (sparse_RK * penalty).sub_(dual_RK) @ vectors_KK
        dense_RK = dense_RK.add_(pull_RK).div_(values_K + penalty) @ vectors_KK.t()
        candidate_RK = dense_RK + dual_RK / penalty
        kept_RK = project(candidate_RK.square())
        sparse_RK = candidate_RK.mul_(kept_RK)
        dual_RK.add_(dense_RK.sub_(sparse_RK), alpha=penalty)
        if iteration % _UPDATED_EVERY == 0:
            changed = int((kept_RK ^ looked_at_RK).sum()) / max(int(kept_RK.sum()), 1)
            if changed == 0 and iteration > _UPDATED_EVERY:
                break
            looked_at_RK = kept_RK
            penalty *= next(factor for least, factor in _GROWTH if changed >= least)
    return kept_RK, sparse_RK


def refine(start_RK: Tensor, aim_RK: Tensor, hessian_KK: Tensor, kept_RK: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on what is kept, every row for itself; H has ones on its diagonal, which precondition it."""
    found_RK = start_RK * kept_RK
    rest_RK = ((aim_RK - found_RK) @ hessian_KK).mul_(kept_RK)
    step_RK = rest_RK.clone()
    size_R1 = rest_RK.square().sum(1, keepdim=True)
    for _ in range(steps):
        change_RK = (step_RK @ hessian_KK).mul_(kept_RK)
        length_R1 = size_R1 / (step_RK * change_RK).sum(1, keepdim=True).clamp_(min=TINY)
        found_RK.addcmul_(step_RK, length_R1)
        rest_RK.addcmul_(change_RK, length_R1, value=-1)
        before_R1, size_R1 = size_R1, rest_RK.square().sum(1, keepdim=True)
        step_RK = step_RK.mul_(size_R1 / before_R1.clamp(min=TINY)).add_(rest_RK)
    return found_RK
