"""What the tokens of a row attend to where keys and values are coded page by page: each finds some coded, others not.

Rows are computed whole, as transformers does; which tokens lie in coded pages when a query comes is worked out from its
position (kv_compress._coded_pages), so that the result is what the runtime computes, however it cuts the row.

Shape suffixes: B rows, G key-value heads, M coded pages of N tokens, T tokens that ask, S tokens asked about, D
channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_compress._channels import decode_channels, encode_channels
from kv_compress._coded_pages import CodingPoints
from kv_compress._coding import round_trip
from kv_compress._observed import Seen
from kv_compress.policy import FULL, Coding, LayerPolicy


def coded_rows(coding: Coding, x_BGSD: Tensor) -> Tensor:
    """Keys or values whose tokens are all coded, each by itself."""
    scale_G = torch.tensor(coding.scale, device=x_BGSD.device) if coding.scale else None
    x_BSGD = x_BGSD.transpose(1, 2).contiguous()
    return round_trip(coding.codec, x_BSGD, scale_G, rotate=coding.rotate).transpose(1, 2)


def attend_paged(seen: Seen, layer: LayerPolicy, points: CodingPoints) -> Tensor:
    """Attention's result [B, H, T, D] where pages are coded at such points."""
    rows = seen.k_BGSD.shape[2]
    keys, values = _paged(layer.keys, seen.k_BGSD, points), _paged(layer.values, seen.v_BGSD, points)
    return seen.attend_mixed(keys, values, _found_coded(points, rows, seen.k_BGSD.device))


def _found_coded(points: CodingPoints, rows: int, device: torch.device) -> Tensor:
    """[T, S]: whether a token finds another one in a coded page."""
    ends_T = [points.sinks + points.coded(position) * points.page_tokens for position in range(rows)]
    token_S = torch.arange(rows, device=device)
    return (token_S >= points.sinks) & (token_S < torch.tensor(ends_T, device=device)[:, None])


def _paged(coding: Coding, x_BGSD: Tensor, points: CodingPoints) -> Tensor:
    """Keys or values with those tokens coded that the row's last one finds so."""
    pages = points.coded(x_BGSD.shape[2] - 1)
    if coding.codec == FULL or not pages:
        return x_BGSD
    before, between, behind = x_BGSD.float().tensor_split(
        (points.sinks, points.sinks + pages * points.page_tokens), dim=2
    )
    if coding.per == "token":
        return torch.cat([before, coded_rows(coding, between), behind], 2)
    x_BGMND = between.unflatten(2, (pages, points.page_tokens))
    x_NRD = x_BGMND.movedim(3, 0).flatten(1, 3)  # pages side by side, as if they were heads of one
    codes_NRC, numbers_2RD = encode_channels(coding.codec, x_NRD)
    found_NRD = decode_channels(coding.codec, codes_NRC, numbers_2RD.expand(len(x_NRD), -1, -1, -1))
    found_BGSD = found_NRD.unflatten(1, x_BGMND.shape[:3]).movedim(0, 3).flatten(2, 3)
    return torch.cat([before, found_BGSD, behind], 2)
