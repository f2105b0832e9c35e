"""The reference of paged attention: tiles of queries times tiles of keys, with running max and sum, in fp32.

Every product has one fixed shape, and a row's place in its tile follows from its slot alone: a query in slot i of its
sequence is row i % QUERY_TILE of its tile, key tiles begin at multiples of KEY_TILE. Only the number of products done
at once varies. A tile of which a row sees nothing leaves that row's running values as they are, to the bit. So a row
meets the same arithmetic in any batch and under any chunking. Memory is independent of the sequences' lengths.

Shape suffixes: T tokens, H query heads, G key-value heads, R heads per group (H / G), D head width, P pages of a table,
L lanes (query tiles worked on at once), Q queries of a tile, K keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages

QUERY_TILE = 8
KEY_TILE = 128
_LANES = 32
UNITS = 1 << 32  # of a share of attention, so that sums of shares are exact
_FLOOR = -1e30  # running maximum before any key was seen: finite, so that differences to -inf are never NaN


@dataclass(frozen=True)
class _Lanes:
    """Query tiles worked on at once, the ones with the most key tiles first."""

    row: torch.Tensor  # flat rows of the batch …
    place: torch.Tensor  # … and where each lies in [L * Q]
    query_LQ: torch.Tensor  # its slot; -1 where there is no query
    sequence_L: torch.Tensor
    last_slot_L1: torch.Tensor
    first_tile_L1: torch.Tensor
    tiles: list[int]


class _Running:
    """Of each query, the largest score of the tiles so far, and the sum of their weights, which are e^(score - it)."""

    def __init__(self, q_LGQRD: torch.Tensor) -> None:
        self._top_LGQR = torch.full(q_LGQRD.shape[:-1], _FLOOR, device=q_LGQRD.device)
        self._sum_LGQR = torch.zeros_like(self._top_LGQR)

    def take(self, score_LGQRK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One more tile of the first lanes: its weights, in the place of the scores, and what those before fade by."""
        top_LGQR, sum_LGQR = (x_LGQR[: len(score_LGQRK)] for x_LGQR in (self._top_LGQR, self._sum_LGQR))
        new_LGQR = torch.maximum(top_LGQR, score_LGQRK.amax(-1))
        weight_LGQRK = score_LGQRK.sub_(new_LGQR[..., None]).exp_()
        fade_LGQR = (top_LGQR - new_LGQR).exp_()
        sum_LGQR.mul_(fade_LGQR).add_(weight_LGQRK.sum(-1))
        top_LGQR.copy_(new_LGQR)
        return weight_LGQRK, fade_LGQR

    @property
    def total_LGQR(self) -> torch.Tensor:
        """The sums of weights, never 0."""
        return self._sum_LGQR.clamp_min(torch.finfo(torch.float32).tiny)

    def shares(self, score_LGQRK: torch.Tensor) -> torch.Tensor:
        """A tile's shares of attention, once all have been taken."""
        lanes = slice(len(score_LGQRK))
        return (score_LGQRK - self._top_LGQR[lanes, ..., None]).exp_() / self.total_LGQR[lanes, ..., None]


def attend_tiled(
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`paged_attention`, its rows independent of batch and chunking to the bit."""
    key = "tiled", window
    if key not in batch.plans:
        batch.plans[key] = list(_plan(batch, window))
    out_THD = torch.empty_like(q_THD)
    for lanes in batch.plans[key]:
        _attend_lanes(out_THD, q_THD, k, v, batch, lanes, scale, window, softcap)
    return out_THD


def add_shares(
    total_PBG: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Add to each slot the shares of attention that it gets from the batch's queries, those of a group's heads
    together; slots that the batch has just stored begin at 0. `total_PBG`: int64, in UNITS. Whole numbers add up to the
    same in any order, and the shares themselves are those of `attend_tiled`."""
    key = "tiled", window
    if key not in batch.plans:
        batch.plans[key] = list(_plan(batch, window))
    total = total_PBG.flatten(0, 1)
    total[batch.slot_T] = 0
    for lanes in batch.plans[key]:
        _add_lanes(total, q_THD, k, batch, lanes, scale, window, softcap)


def _plan(batch: AttentionBatch, window: int | None) -> Iterator[_Lanes]:
    """Cut every sequence's queries at multiples of QUERY_TILE and sort the pieces by their number of key tiles."""
    pieces = []  # (key tiles, first key tile, sequence, first row, end row)
    for sequence, kv_len in enumerate(batch.kv_len):
        row, end = batch.starts[sequence], batch.starts[sequence + 1]
        while row < end:
            slot = batch.indices[row]
            stop = min(end, row + QUERY_TILE - slot % QUERY_TILE)
            first = 0 if window is None else max(0, slot - window + 1) // KEY_TILE
            seen = min(kv_len, batch.indices[stop - 1] + 1)
            pieces.append((-(-seen // KEY_TILE) - first, first, sequence, row, stop))
            row = stop
    pieces.sort(key=lambda piece: -piece[0])
    for start in range(0, len(pieces), _LANES):
        yield _lanes(batch, pieces[start : start + _LANES])


def _lanes(batch: AttentionBatch, pieces: list[tuple[int, int, int, int, int]]) -> _Lanes:
    device = batch.table_SP.device
    rows, places = [], []
    for lane, (_, _, _, row, stop) in enumerate(pieces):
        rows += range(row, stop)
        places += [lane * QUERY_TILE + batch.indices[at] % QUERY_TILE for at in range(row, stop)]
    row, place = torch.tensor([rows, places], device=device)
    query = torch.full((len(pieces) * QUERY_TILE,), -1, device=device)
    query[place] = batch.index_T[row]
    sequences = torch.tensor([sequence for _, _, sequence, _, _ in pieces], device=device)
    return _Lanes(
        row=row,
        place=place,
        query_LQ=query.view(-1, QUERY_TILE),
        sequence_L=sequences,
        last_slot_L1=batch.kv_len_S[sequences].long()[:, None] - 1,
        first_tile_L1=torch.tensor([[first] for _, first, _, _, _ in pieces], device=device),
        tiles=[tiles for tiles, *_ in pieces],
    )


def _attend_lanes(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    v: Pages,
    batch: AttentionBatch,
    lanes: _Lanes,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Write the results of the lanes' queries into `out_THD`."""
    heads, width = q_THD.shape[1:]
    q_LGQRD = _placed(q_THD, lanes, k.groups)
    acc_LGQRD, running = torch.zeros_like(q_LGQRD), _Running(q_LGQRD)
    for tile in range(lanes.tiles[0]):
        score_LGQRK, slot_LK = _scores(q_LGQRD, k, batch, lanes, tile, scale, window, softcap)
        weight_LGQRK, fade_LGQR = running.take(score_LGQRK)
        part_LGQRD = acc_LGQRD[: len(fade_LGQR)].mul_(fade_LGQR[..., None])
        part_LGQRD += _product(weight_LGQRK, _gather(v, slot_LK))
    result = acc_LGQRD / running.total_LGQR[..., None]
    result = result.transpose(1, 2).reshape(-1, heads, width)
    out_THD[lanes.row] = result[lanes.place].to(out_THD.dtype)


def _add_lanes(
    total: torch.Tensor,
    q_THD: torch.Tensor,
    k: Pages,
    batch: AttentionBatch,
    lanes: _Lanes,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Once over the keys for each query's largest score and its sum, and once more for the shares."""
    q_LGQRD = _placed(q_THD, lanes, k.groups)
    running = _Running(q_LGQRD)
    for tile in range(lanes.tiles[0]):
        running.take(_scores(q_LGQRD, k, batch, lanes, tile, scale, window, softcap)[0])
    for tile in range(lanes.tiles[0]):
        score_LGQRK, slot_LK = _scores(q_LGQRD, k, batch, lanes, tile, scale, window, softcap)
        share_LGQRK = running.shares(score_LGQRK)
        units_LGK = (share_LGQRK * UNITS).round_().long().sum((2, 3))
        total.index_add_(0, slot_LK.flatten(), units_LGK.transpose(1, 2).flatten(0, 1))


def _placed(q_THD: torch.Tensor, lanes: _Lanes, groups: int) -> torch.Tensor:
    """The lanes' queries [L, G, Q, R, D] in fp32, zeros where there is none."""
    heads, width = q_THD.shape[1:]
    placed = q_THD.new_zeros((len(lanes.tiles) * QUERY_TILE, heads, width), dtype=torch.float32)
    placed[lanes.place] = q_THD[lanes.row].float()
    return placed.view(-1, QUERY_TILE, groups, heads // groups, width).transpose(1, 2).contiguous()


def _scores(
    q_LGQRD: torch.Tensor,
    k: Pages,
    batch: AttentionBatch,
    lanes: _Lanes,
    tile: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [L, G, Q, R, K] of one key tile, -inf where a query sees nothing, and the slots [L, K]; of those lanes
    that have so many tiles."""
    active = sum(tiles > tile for tiles in lanes.tiles)
    key_LK, slot_LK = _key_tile(batch, lanes, active, tile, k.block)
    score_LGQRK = _product(q_LGQRD[:active], _gather(k, slot_LK).transpose(2, 3)) * scale
    if softcap is not None:
        score_LGQRK = softcap * torch.tanh(score_LGQRK / softcap)
    hidden_LQK = _hidden(lanes.query_LQ[:active], key_LK, window)
    return score_LGQRK.masked_fill_(hidden_LQK[:, None, :, None], float("-inf")), slot_LK


def _key_tile(
    batch: AttentionBatch, lanes: _Lanes, active: int, tile: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in the sequence [L, K] and in the pool [L, K] of each lane's next keys.

    Past a sequence's end the slot is its last one: finite numbers, which the mask hides.
    """
    within = torch.arange(KEY_TILE, device=lanes.sequence_L.device)
    index_LK = (lanes.first_tile_L1[:active] + tile) * KEY_TILE + within
    stored_LK = torch.minimum(index_LK, lanes.last_slot_L1[:active])
    return index_LK, batch.pool_slots(lanes.sequence_L[:active], stored_LK, block)


def _hidden(query_LQ: torch.Tensor, key_LK: torch.Tensor, window: int | None) -> torch.Tensor:
    ahead_LQK = query_LQ[:, :, None] - key_LK[:, None, :]  # how far the query is ahead of the key
    hidden_LQK = ahead_LQK < 0
    return hidden_LQK if window is None else hidden_LQK | (ahead_LQK >= window)


def _gather(pages: Pages, slot_LK: torch.Tensor) -> torch.Tensor:
    """fp32 [L, G, K, D], contiguous."""
    lanes, keys = slot_LK.shape
    rows = pages.read(slot_LK.reshape(-1))
    return rows.view(lanes, keys, *rows.shape[1:]).transpose(1, 2).float().contiguous()


def _product(a_LGQRX: torch.Tensor, b_LGXY: torch.Tensor) -> torch.Tensor:
    """Each lane's and group's [Q * R, X] times [X, Y]: the one shape of product there is."""
    lanes, groups, queries, repeats, inner = a_LGQRX.shape
    a = a_LGQRX.reshape(lanes * groups, queries * repeats, inner)
    product = torch.bmm(a, b_LGXY.flatten(0, 1))
    return product.view(lanes, groups, queries, repeats, -1)
