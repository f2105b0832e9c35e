"""Sampling against plain readings of the definitions, one row at a time, with no cleverness.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.sampler
from runtime.logprobs import token_logprobs
from runtime.params import SamplingParams
from runtime.sampler import Picker, Uniforms, sample

VOCABULARY = 50


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def distribution(logits_V: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities by the definitions, in double precision."""
    scaled = logits_V.double().numpy() / params.temperature
    if params.top_k:
        border = np.sort(scaled)[::-1][min(params.top_k, len(scaled)) - 1]
        scaled = np.where(scaled >= border, scaled, -np.inf)
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        order = np.argsort(-probabilities)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0.0
    probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    return probabilities / probabilities.sum()


def frequencies(logits_V: torch.Tensor, params: SamplingParams, draws: int) -> np.ndarray:
    logits_RV = logits_V.expand(draws, -1)
    pickers = [Picker(params, [], seed=str(index)) for index in range(draws)]
    return np.bincount(sample(logits_RV, pickers), minlength=len(logits_V)) / draws


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 1},
    {"top_k": 500},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(filters: dict[str, float]) -> None:
    params = SamplingParams.of({"temperature": 1.0} | filters)
    logits_V = random_logits(1, seed=3)[0]
    expected = distribution(logits_V, params)
    draws = 4000
    found = frequencies(logits_V, params, draws)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    kept = expected > 0
    squares = (found[kept] - expected[kept]) ** 2 / expected[kept]
    degrees = int(kept.sum()) - 1
    assert draws * squares.sum() <= degrees + 4.5 * math.sqrt(2 * degrees) + 1e-6  # chi-square, 4.5 sigma


def test_top_p_is_right_where_the_candidates_do_not_hold_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(top_p=0.97)
    logits_RV = random_logits(40, seed=8, vocabulary=200, spread=0.5)
    pickers = [Picker(params, [], seed=str(row)) for row in range(40)]
    wide = sample(logits_RV, pickers)
    monkeypatch.setattr(runtime.sampler, "_CANDIDATES", 4)
    monkeypatch.setattr(runtime.sampler, "_MORE", 3)
    assert sample(logits_RV, [Picker(params, [], seed=str(row)) for row in range(40)]) == wide


@pytest.mark.parametrize("vocabulary", [1, 5, 255, 256, 257, 1000])
def test_large_vocabularies_are_drawn_from_evenly(vocabulary: int) -> None:
    """Every share of the whole leads to the token that a running sum over the whole vocabulary gives."""
    weight_RV = random_logits(1, seed=5, vocabulary=vocabulary).exp().expand(400, -1).contiguous()
    weight_RV[:, vocabulary // 3 : vocabulary // 2] = 0.0
    uniform_R1 = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None]
    running_V = weight_RV[0].double().cumsum(0)
    found = runtime.sampler._invert(weight_RV, uniform_R1)[:, 0].tolist()
    for share, index in zip(uniform_R1[:, 0].tolist(), found, strict=True):
        target = share * float(running_V[-1])
        assert weight_RV[0, index] > 0
        before = float(running_V[index - 1]) if index else 0.0
        assert before - 1e-6 * target <= target <= float(running_V[index]) * (1 + 1e-6)


def test_ties_at_the_border_are_all_kept() -> None:
    logits_V = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    found = frequencies(logits_V, SamplingParams(top_k=2), 600)
    assert (found[1:4] > 0.2).all()
    assert found[0] == found[4] == 0.0


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-4, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 49, 50, 51, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=7), st.integers(0, 1000))
def test_a_rows_tokens_do_not_depend_on_its_batch(rows: list[SamplingParams], seed: int) -> None:
    """Non-determinism: together and alone, over several tokens, the same tokens."""

    def run(chosen: list[int]) -> list[list[int | None]]:
        pickers = {row: Picker(rows[row], [row, 7], seed=str(row)) for row in chosen}
        tokens: list[list[int | None]] = [[] for _ in chosen]
        for index in range(3):
            logits_RV = random_logits(len(rows), seed=seed + index)[chosen]
            for found, token in zip(tokens, sample(logits_RV, list(pickers.values())), strict=True):
                found.append(token)
        return tokens

    together = run(list(range(len(rows))))
    alone = [run([row])[0] for row in range(len(rows))]
    assert together == alone


def test_nan_logits_break_their_own_row_only() -> None:
    logits_RV = random_logits(6, seed=1)
    params = [SamplingParams(temperature=0.0), SamplingParams(top_p=0.9, top_k=9, frequency_penalty=1.0, min_p=0.1)] * 3
    healthy = sample(logits_RV, [Picker(p, [], seed="1") for p in params])
    broken_RV = logits_RV.clone()
    broken_RV[0, 5] = math.nan
    broken_RV[1, 0] = math.inf
    broken_RV[2] = -math.inf
    broken_RV[3] = math.nan
    tokens = sample(broken_RV, [Picker(p, [], seed="1") for p in params])
    assert tokens == [None] * 4 + healthy[4:]


def test_masked_tokens_are_never_drawn() -> None:
    logits_RV = torch.full((1, 9), -math.inf)
    logits_RV[0, 4] = 0.0
    assert sample(logits_RV, [Picker(SamplingParams(top_p=0.5), [], seed="0")]) == [4]


def test_penalties_by_their_definitions() -> None:
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3)
    picker = Picker(params, [0, 1], seed="0")
    logits_V = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.5])
    picker.penalize(logits_V)
    for token in (2, 3, 3):
        picker.saw(token)
    found = picker.penalize(logits_V).tolist()
    assert found == pytest.approx([2 / 1.5, -2 * 1.5, 1 / 1.5 - 0.4 - 0.3, -1 * 1.5 - 0.4 - 0.6, 0.5])
    assert logits_V.tolist() == [2.0, -2.0, 1.0, -1.0, 0.5]


def test_penalties_stop_a_loop() -> None:
    logits_RV = torch.tensor([[3.0, 2.0, 1.0]])
    picker = Picker(SamplingParams(temperature=0.0, frequency_penalty=0.6), [], seed="0")
    tokens = [sample(logits_RV, [picker])[0] for _ in range(6)]
    assert tokens == [0, 0, 1, 0, 1, 0] or set(tokens) == {0, 1}
    assert tokens[:3] == [0, 0, 1]


def test_seeds_and_samples_have_their_own_numbers() -> None:
    streams = [Uniforms(str(seed), index) for seed, index in itertools.product([0, 1, 1 << 40], [0, 1])]
    drawn = [[stream.next() for _ in range(100)] for stream in streams]
    assert len({tuple(numbers) for numbers in drawn}) == len(streams)
    again = Uniforms("0", 0)
    assert [again.next() for _ in range(100)] == drawn[0]
    assert all(0.0 <= number < 1.0 for numbers in drawn for number in numbers)


def test_the_callers_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    sample(random_logits(4), [Picker(SamplingParams(top_p=0.5), [], seed=str(i)) for i in range(4)])
    assert torch.equal(torch.get_rng_state(), before)


def test_logprobs_are_the_models_own() -> None:
    logits_RV = random_logits(5, seed=2)
    expected_RV = logits_RV.double().log_softmax(-1)
    tokens = [0, 3, int(logits_RV[2].argmax()), 49, 10]
    for row, found in enumerate(token_logprobs(logits_RV, tokens, top=4)):
        assert found.token == tokens[row]
        assert found.logprob == pytest.approx(float(expected_RV[row, tokens[row]]), abs=1e-5)
        order = expected_RV[row].argsort(descending=True).tolist()
        assert found.rank == order.index(tokens[row]) + 1
        assert [token for token, _ in found.top] == order[:4]
        assert [value for _, value in found.top] == pytest.approx(expected_RV[row, order[:4]].tolist(), abs=1e-5)
