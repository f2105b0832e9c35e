"""Choosing the next token of every row of a batch.

A row's token is a function of its own logits, settings, history and random numbers: filters are thresholds on logits
and the draw runs along the vocabulary, so that neither ties nor neighbours in the batch change it.

Shape legend: R rows, V vocabulary, K candidates (the largest logits of a row, sorted), B blocks of the
vocabulary, W places in a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from runtime.params import SamplingParams

_UNIFORMS = 64  # random numbers drawn at a time
_CANDIDATES = 256  # how many of the largest logits top-p looks at first …
_MORE = 16  # … and by what factor more where those do not hold enough
_BLOCK = 256  # weights that are summed up before one of them is chosen


class Uniforms:
    """Random numbers in [0, 1) of one sequence, from its own generator."""

    def __init__(self, seed: str, index: int) -> None:
        self._seed = f"{seed} {index}"
        self._generator: torch.Generator | None = None
        self._drawn: list[float] = []

    def next(self) -> float:
        """The next number."""
        if self._generator is None:
            digest = hashlib.sha256(self._seed.encode()).digest()  # a generator uses 32 bits of its seed only
            self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        if not self._drawn:
            self._drawn = torch.rand(_UNIFORMS, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._drawn.pop()


class Picker:
    """What one sequence brings to sampling: its settings, its random numbers and the tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], seed: str, index: int = 0) -> None:
        self.params = params
        self._uniforms = Uniforms(seed, index)
        self._prompt = prompt
        self._counts_V: Tensor | None = None
        self._seen_V: Tensor | None = None

    def uniform(self) -> float:
        """The sequence's next random number in [0, 1)."""
        return self._uniforms.next()

    def saw(self, token: int) -> None:
        """Remember a generated token."""
        if self._counts_V is not None and self._seen_V is not None:
            self._counts_V[token] += 1
            self._seen_V[token] = True

    def penalize(self, logits_V: Tensor) -> Tensor:
        """Logits with the request's penalties; a new tensor."""
        params, (counts_V, seen_V) = self.params, self._history(logits_V)
        scaled_V = torch.where(logits_V > 0, logits_V / params.repetition_penalty, logits_V * params.repetition_penalty)
        repeated_V = torch.where(seen_V, scaled_V, logits_V)
        return repeated_V - params.frequency_penalty * counts_V - params.presence_penalty * (counts_V > 0)

    def _history(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        if self._counts_V is None or self._seen_V is None:
            self._counts_V = torch.zeros_like(logits_V)
            self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
            self._seen_V[torch.tensor(self._prompt, dtype=torch.int64, device=logits_V.device)] = True
        return self._counts_V, self._seen_V


def sample(logits_RV: Tensor, pickers: Sequence[Picker]) -> list[int | None]:
    """One token per row; None where the row's logits are broken (NaN, +inf, or nothing but -inf)."""
    logits_RV = logits_RV.float()
    sound = torch.isfinite(logits_RV.amax(-1)).tolist()  # amax hands NaN on
    tokens: list[int | None] = [None] * len(pickers)
    plain = [row for row, picker in enumerate(pickers) if sound[row] and _is_plain(picker.params)]
    for row, token in zip(plain, _greedy(logits_RV, plain), strict=True):
        tokens[row] = token
    others = [row for row, picker in enumerate(pickers) if sound[row] and not _is_plain(picker.params)]
    if others:
        for row, token in zip(others, _choose(_rows(logits_RV, others), [pickers[r] for r in others]), strict=True):
            tokens[row] = token
    for picker, token in zip(pickers, tokens, strict=True):
        if token is not None:
            picker.saw(token)
    return tokens


def _is_plain(params: SamplingParams) -> bool:
    return params.greedy and not params.penalizes


def _rows(logits_RV: Tensor, rows: list[int]) -> Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]


def _greedy(logits_RV: Tensor, rows: list[int]) -> list[int]:
    return _rows(logits_RV, rows).argmax(-1).tolist() if rows else []


def _choose(logits_RV: Tensor, pickers: list[Picker]) -> list[int]:
    if any(picker.params.penalizes for picker in pickers):
        logits_RV = torch.stack(
            [
                picker.penalize(logits_V) if picker.params.penalizes else logits_V
                for logits_V, picker in zip(logits_RV, pickers, strict=True)
            ]
        )
    greedy = [row for row, picker in enumerate(pickers) if picker.params.greedy]
    drawn = [row for row, picker in enumerate(pickers) if not picker.params.greedy]
    tokens = dict(zip(greedy, _greedy(logits_RV, greedy), strict=True))
    if drawn:
        chosen = [pickers[row] for row in drawn]
        tokens |= zip(drawn, _draw(_rows(logits_RV, drawn), chosen), strict=True)
    return [tokens[row] for row in range(len(pickers))]


def _draw(logits_RV: Tensor, pickers: list[Picker]) -> list[int]:
    settings = [picker.params for picker in pickers]
    temperature_R1 = _column([params.temperature for params in settings], logits_RV, torch.float32)
    # the maximum goes first: the largest becomes 0, and no temperature can make it overflow
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1
    weight_RV = scaled_RV.masked_fill(scaled_RV < _thresholds(scaled_RV, settings), -torch.inf).exp_()
    uniform_R1 = _column([picker.uniform() for picker in pickers], logits_RV, torch.float64)
    return _invert(weight_RV, uniform_R1)[:, 0].tolist()


def _invert(weight_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """The index [R, 1] where the running sum of a row's weights passes that share of their total.

    In two stages, blocks and then the one block: a running sum over the whole vocabulary takes many times as long.
    """
    vocabulary = weight_RV.shape[1]
    weight_RBW = functional.pad(weight_RV, (0, -vocabulary % _BLOCK)).unflatten(1, (-1, _BLOCK))
    running_RB = weight_RBW.sum(-1, dtype=torch.float64).cumsum(-1)
    target_R1 = _below(uniform_R1 * running_RB[:, -1:], running_RB)
    block_R1 = torch.searchsorted(running_RB, target_R1, right=True)
    before_R1 = functional.pad(running_RB, (1, 0)).gather(1, block_R1)
    weight_RW = weight_RBW[torch.arange(len(block_R1), device=block_R1.device), block_R1[:, 0]]
    running_RW = weight_RW.cumsum(-1, dtype=torch.float64)
    within_R1 = torch.searchsorted(running_RW, _below(target_R1 - before_R1, running_RW), right=True)
    return block_R1 * _BLOCK + within_R1


def _below(target_R1: Tensor, running_RX: Tensor) -> Tensor:
    """The target, at most just short of the total: rounding must not carry it past the last weight."""
    total_R1 = running_RX[:, -1:]
    return torch.minimum(target_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))


def _thresholds(scaled_RV: Tensor, settings: list[SamplingParams]) -> Tensor:
    """The least logit [R, 1] that top-k, top-p and min-p keep; ties at the border are all kept."""
    min_p_R1 = _column([params.min_p for params in settings], scaled_RV, torch.float32)
    least_R1 = min_p_R1.log()  # -inf where min_p is 0: the likeliest token's logit is 0
    narrow = [row for row, params in enumerate(settings) if params.top_k or params.top_p < 1.0]
    if narrow:
        found_R1 = _sorted_thresholds(_rows(scaled_RV, narrow), [settings[row] for row in narrow], _CANDIDATES)
        least_R1[narrow] = torch.maximum(least_R1[narrow], found_R1)
    return least_R1


def _sorted_thresholds(scaled_RV: Tensor, settings: list[SamplingParams], candidates: int) -> Tensor:
    vocabulary = scaled_RV.shape[1]
    tops = [min(params.top_k or vocabulary, vocabulary) for params in settings]
    width = min(vocabulary, max(candidates, *(params.top_k for params in settings)))
    values_RK = scaled_RV.topk(width, dim=-1).values
    running_RK = values_RK.exp().cumsum(-1, dtype=torch.float64)
    last_R1 = _column([min(top, width) - 1 for top in tops], scaled_RV, torch.int64)
    whole_R1 = scaled_RV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    is_top_k_R1 = _column([top < vocabulary for top in tops], scaled_RV, torch.bool)
    total_R1 = torch.where(is_top_k_R1, running_RK.gather(1, last_R1), whole_R1)
    top_p_R1 = _column([params.top_p for params in settings], scaled_RV, torch.float64)
    # a token stays while those before it hold less than top_p; the last one that stays is the border
    kept_R1 = (running_RK < top_p_R1 * total_R1).sum(-1, keepdim=True)
    border_R1 = torch.where(top_p_R1 < 1.0, torch.minimum(kept_R1, last_R1), last_R1)
    least_R1 = values_RK.gather(1, border_R1)
    short = ((kept_R1 >= width) & ~is_top_k_R1)[:, 0].nonzero()[:, 0].tolist() if width < vocabulary else []
    if short:  # the candidates do not hold top_p of the whole
        more_RV, their_settings = _rows(scaled_RV, short), [settings[row] for row in short]
        least_R1[short] = _sorted_thresholds(more_RV, their_settings, _MORE * candidates)
    return least_R1


def _column(values: list, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
