"""Sparsities by sensitivity: fewer zeros where the model minds them, chosen by an exact knapsack.

Each layer may get one of some sparsities around the one that is asked for. What each costs is the growth of the KL
divergence that the errors of its weights cause, to second order (compress.core.curvature, one backward pass); together
the layers have as many zeros as with the same sparsity everywhere.

The pass goes through the model that Wanda leaves with the same sparsity everywhere, not through the dense one: with
many zeros the second order around the dense model says two to three times too little of early layers, whose errors the
later ones enlarge.

Shapes: R rows of a piece of a weight, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from compress.core.checkpoint import Checkpoint
from compress.core.curvature import Curvature
from compress.core.errors import UsageError
from compress.core.events import Notice
from compress.core.knapsack import knapsack
from compress.core.passes import Job
from compress.core.patterns import covered
from compress.core.reshaped import Change, ReshapedCheckpoint
from compress.core.statistics import SquaredMean
from prune._masks import keep
from prune._scored import score
from prune._settings import WeightPruning

_STEPS = 4  # of sparsities to each side of the one that is asked for
_AT_ONCE = 4 << 20  # weights that are judged together


@dataclass(slots=True)
class Item:
    """Layers that get one sparsity (the same layer of all experts of a block): nats a token that each choice costs."""

    losses: list[float]
    layers: list[str] = field(default_factory=list)
    weights: int = 0


def choices(share: float, spread: float) -> tuple[float, ...]:
    """Sparsities to choose among, evenly around `share` and inside of 0 … 1; `share` is one of them."""
    around = (share + spread * step / _STEPS for step in range(-_STEPS, _STEPS + 1))
    return tuple(round(choice, 9) for choice in around if 0 < round(choice, 9) < 1)


def by_sensitivity(settings: WeightPruning, job: Job) -> dict[str, float]:
    """The sparsity of every layer that is not left alone."""
    shares = choices(settings.share, settings.sensitivity_spread)
    items = _measured(settings, job, shares)
    picked = pick([item.losses for item in items], [item.weights for item in items], shares, settings.share)
    even = shares.index(round(settings.share, 9))
    before, after = (
        sum(item.losses[choice] for item, choice in zip(items, chosen, strict=True))
        for chosen in ([even] * len(items), picked)
    )
    found = {layer: shares[choice] for item, choice in zip(items, picked, strict=True) for layer in item.layers}
    told = ", ".join(f"{block:.3f}" for block in _by_block(job.checkpoint, found))
    message = f"sensitivities ask for sparsities per block of {told}: expected KL {after:.3g} instead of {before:.3g}"
    job.events(Notice(message, "sensitivity"))
    return found


def pick(losses: Sequence[Sequence[float]], weights: Sequence[int], shares: Sequence[float], share: float) -> list[int]:
    """For each item the choice, of `shares`, with which all of them lose least and have `share` of zeros at least."""
    kept = [[(1 - choice) * count for choice in shares] for count in weights]
    picked = knapsack(losses, kept, (1 - share) * sum(weights) * (1 + 1e-9))
    if picked is None:  # never: the share itself is among the choices
        raise UsageError(f"no choice of sparsities leaves {share:g} of zeros", where="prune.sparsity")
    return picked


def _measured(settings: WeightPruning, job: Job, shares: Sequence[float]) -> list[Item]:
    if job.calibration is None:
        raise UsageError("needs calibration text to measure sensitivities on")
    tokens = job.calibration.first(settings.sensitivity_tokens)
    pruned = replace(job, calibration=tokens, checkpoint=_pruned(settings, replace(job, calibration=tokens)))
    found: dict[str, Item] = {}
    for curvature in pruned.curvatures(tokens, vocabulary=False):
        for name in curvature.outputs:
            if covered(name, settings.ignore):
                continue
            item = found.setdefault(f"{curvature.family}.{name.rpartition('.')[2]}", Item([0.0] * len(shares)))
            item.layers.append(name)
            item.weights += math.prod(job.checkpoint.matrix_shape(name))
            for number, loss in enumerate(_losses(job.checkpoint, curvature, name, shares)):
                item.losses[number] += loss
    return list(found.values())


def _pruned(settings: WeightPruning, job: Job) -> Checkpoint:
    """The model as Wanda leaves it, pruned while it is read."""
    changes: dict[str, Change] = {}
    for block in job.measure(frozenset({SquaredMean})):
        for group in block.groups:
            square_K = group.statistics[SquaredMean].cpu().clone()
            changes |= {
                f"{site.name}.weight": partial(_zeroed, square_K, settings.share) for site in settings.chosen(group)
            }
            group.release()
    return ReshapedCheckpoint(job.checkpoint, {}, changes=changes)


def _zeroed(square_K: Tensor, share: float, weight_RK: Tensor) -> Tensor:
    kept_RK = keep(score(weight_RK.float(), square_K), share, None, "row")
    return weight_RK.masked_fill(~kept_RK, 0)


def _losses(checkpoint: Checkpoint, curvature: Curvature, name: str, shares: Sequence[float]) -> list[float]:
    rows, width = checkpoint.matrix_shape(name)
    square_K = curvature.inputs if curvature.inputs.dim() == 1 else curvature.inputs.diagonal()
    losses = [0.0] * len(shares)
    for row_ids in torch.arange(rows).split(max(1, _AT_ONCE // width)):
        piece = slice(int(row_ids[0]), int(row_ids[-1]) + 1)
        weight_RK = checkpoint.rows(f"{name}.weight", row_ids).to(square_K.device, torch.float32)
        score_RK = score(weight_RK, square_K)
        for number, share in enumerate(shares):
            kept_RK = keep(score_RK, share, None, "row")
            losses[number] += curvature.loss(name, weight_RK.masked_fill(kept_RK, 0), piece)
    return losses


def _by_block(checkpoint: Checkpoint, shares: dict[str, float]) -> list[float]:
    """The sparsity of each block that has pruned layers."""
    found = []
    for index in range(checkpoint.num_blocks):
        sizes = {name: math.prod(checkpoint.matrix_shape(name)) for name in checkpoint.sites(index) if name in shares}
        if sizes:
            found.append(sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values()))
    return found
