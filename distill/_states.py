"""How far what goes on inside a student is from what goes on inside its teacher. All in fp32.

Shape suffixes: B rows, T positions, D width of hidden states, C width of queries, keys or values, H relation heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill._losses import kl


def distance(student_BTD: Tensor, teacher_BTD: Tensor, counted_BT: Tensor, measure: Literal["mse", "cosine"]) -> Tensor:
    """Mean over the counted positions of |s - t|² / |t|², or of 1 - cos(s, t); 0 if no position counts.

    Over its own length at each position, since hidden states grow from layer to layer, and a few tokens have states a
    hundred times as long as the others'."""
    ours_ND, theirs_ND = student_BTD[counted_BT].float(), teacher_BTD[counted_BT].float()
    if measure == "cosine":
        far_N = 1 - torch.cosine_similarity(ours_ND, theirs_ND, dim=-1)
    else:
        lengths_N = theirs_ND.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        far_N = (ours_ND - theirs_ND).square().sum(-1) / lengths_N
    return far_N.sum() / max(len(far_N), 1)


def relation_divergence(student_BTC: Tensor, teacher_BTC: Tensor, counted_BT: Tensor, heads: int) -> Tensor:
    """KL of the teacher's self-relations to the student's, the mean over heads and counted positions (Wang et al.,
    2021, arXiv:2012.15828): softmax(X Xᵀ / √d) of queries, keys or values X, cut into `heads` of d channels each.

    A position is related to itself and those before it, as in the model's attention. Widths C may differ. One row at
    a time, and again on the way back: relations [H, T, T] of more than one row are never held."""
    total = student_BTC.new_zeros((), dtype=torch.float32)
    for ours_TC, theirs_TC, counted_T in zip(student_BTC, teacher_BTC, counted_BT, strict=True):
        total = total + checkpoint(_row, ours_TC, theirs_TC, counted_T, heads, use_reentrant=False)
    return total / (heads * max(int(counted_BT.sum()), 1))


def _row(ours_TC: Tensor, theirs_TC: Tensor, counted_T: Tensor, heads: int) -> Tensor:
    with torch.no_grad():
        log_p_HTT = _log_relations(theirs_TC, heads)
    return kl(log_p_HTT, _log_relations(ours_TC, heads))[:, counted_T].sum()


def _log_relations(x_TC: Tensor, heads: int) -> Tensor:
    x_HTC = x_TC.float().unflatten(-1, (heads, -1)).transpose(0, 1)
    scores_HTT = x_HTC @ x_HTC.transpose(1, 2) / math.sqrt(x_HTC.shape[-1])
    later_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool, device=x_TC.device).triu(1)
    return torch.log_softmax(scores_HTT.masked_fill(later_TT, -math.inf), dim=-1)
