"""What queries to come are expected to attend to stays, weighted with the length of its value.

Devoto et al., 2025, Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution,
arXiv:2510.00636. Queries are taken to be normally distributed before rotation, with the mean and covariance of the
observed ones; the rotation is the mean of those of the positions to come. The expectation of exp(q k) is then
exp(mean k + k covariance k / 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kv_compress._scores import Observed

QUERIES = "recent"
_TO_COME = 512  # positions whose rotation is averaged


def score(observed: Observed) -> Tensor:
    """Expected attention times the norm of the value [G, S]; the sinks, which are protected, take no part."""
    import torch

    first = observed.protected[0]
    groups, _, width = observed.k_GSD.shape
    k_GSD, v_GSD = observed.k_GSD[:, first:], observed.v_GSD[:, first:]
    queries = observed.q_HWD.shape[1]
    ahead_W = torch.arange(observed.position - queries, observed.position, device=k_GSD.device)
    plain_HWD = _turn(observed.q_HWD, *_angles(-ahead_W, observed.frequency_F))
    mean_H1D = plain_HWD.mean(dim=1, keepdim=True)
    spread_HWD = plain_HWD - mean_H1D
    covariance_HDD = spread_HWD.transpose(1, 2) @ spread_HWD / queries
    to_come = torch.arange(observed.position, observed.position + _TO_COME, device=k_GSD.device)
    turn = tuple(angles.mean(dim=0) for angles in _angles(to_come, observed.frequency_F))
    mean_GRD = _turn(mean_H1D, *turn).view(groups, -1, width)
    covariance_HDD = _turn(_turn(covariance_HDD, *turn).transpose(1, 2), *turn)
    covariance_GRDD = covariance_HDD.view(groups, -1, width, width)
    expected_GRS = (mean_GRD @ k_GSD.transpose(1, 2)) * observed.scale
    folded_GRSD = k_GSD[:, None] @ covariance_GRDD
    expected_GRS += (folded_GRSD * k_GSD[:, None]).sum(-1) * (observed.scale**2 / 2)
    scores_GS = expected_GRS.softmax(-1).mean(dim=1) * v_GSD.norm(dim=-1)
    return torch.nn.functional.pad(scores_GS, (first, 0))


def _angles(position_T: Tensor, frequency_F: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F]."""
    angle_TF = position_T[:, None].float() * frequency_F
    return angle_TF.cos(), angle_TF.sin()


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the first 2 F of the last dimension's channels, halves against each other."""
    import torch

    half = cosine.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine, rest), dim=-1)
