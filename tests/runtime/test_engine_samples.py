"""Log-probabilities and samples in the engine."""

from __future__ import annotations

import pytest

from runtime.logprobs import TokenLogprobs
from runtime.params import SamplingParams
from tests.runtime.fake_model import VOCABULARY, greedy, make_engine, next_logits, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def expected_logprob(tokens: list[int], token: int) -> float:
    return float(next_logits(tokens).double().log_softmax(-1)[token])


@pytest.mark.parametrize("budget", [3, 7, 500])
def test_prompt_logprobs_come_whole_through_chunks_and_preemption(budget: int) -> None:
    prompt = [number % 11 for number in range(30)]
    engine = make_engine(pages=14, token_budget=budget, headroom_tokens=0)
    for number in range(3):
        params = SamplingParams(temperature=0.0, max_tokens=20, prompt_logprobs=2, logprobs=3)
        engine.add(prompt[: 30 - number], params, f"r{number}")
    told = run(engine)
    for number in range(3):
        its_prompt, result = prompt[: 30 - number], told[f"r{number}", 0]
        scores = result.prompt_logprobs
        assert scores is not None
        assert scores[0] is None and len(scores) == len(its_prompt)
        for position, entry in enumerate(scores[1:], 1):
            assert isinstance(entry, TokenLogprobs)
            assert entry.token == its_prompt[position]
            assert entry.logprob == pytest.approx(expected_logprob(its_prompt[:position], entry.token), abs=1e-5)
            assert len(entry.top) == 2
        tokens = list(its_prompt)
        for token, entry in zip(result.token_ids, result.logprobs, strict=True):
            assert (entry.token, entry.rank, entry.top[0][0]) == (token, 1, token)
            assert entry.logprob == pytest.approx(expected_logprob(tokens, token), abs=1e-5)
            tokens.append(token)


def test_prompt_logits_are_there_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [number % 7 for number in range(25)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    whole = make_engine()
    whole.add(prompt, params, "r")
    expected = run(whole)
    monkeypatch.setattr("runtime.runner._PIECE_LOGITS", 5 * VOCABULARY)
    engine = make_engine()
    engine.add(prompt, params, "r")
    assert run(engine) == expected
    assert (engine.runner.model.most_rows, whole.runner.model.most_rows) == (5, 24)


def test_prompt_logprobs_are_right_after_the_prompt_was_cached() -> None:
    """A prefix hit must not swallow the logits of the positions it covers."""
    prompt = [number % 7 for number in range(25)]
    engine = make_engine()
    engine.add(prompt, GREEDY, "first")
    run(engine)
    engine.add(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0), "second")
    scores = run(engine)["second", 0].prompt_logprobs
    assert scores is not None
    assert [entry is None for entry in scores] == [True] + [False] * 24
    assert all(
        entry.logprob == pytest.approx(expected_logprob(prompt[:position], prompt[position]), abs=1e-5)
        for position, entry in enumerate(scores)
        if entry is not None
    )


def test_each_request_gets_as_many_likeliest_tokens_as_it_asked_for() -> None:
    engine = make_engine()
    for number, top in enumerate([0, 5, 2]):
        params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=top, logprobs=top)
        engine.add([number, 1, 2, 3], params, f"r{number}")
    told = run(engine)
    for number, top in enumerate([0, 5, 2]):
        result = told[f"r{number}", 0]
        assert result.prompt_logprobs is not None
        entries = [*result.prompt_logprobs[1:], *result.logprobs]
        assert [len(entry.top) for entry in entries if entry is not None] == [top] * 6
        assert result.prompt_logprobs[3].logprob == pytest.approx(expected_logprob([number, 1, 2], 3), abs=1e-5)


def test_prompt_logprobs_from_a_position_on() -> None:
    prompt = [number % 7 for number in range(25)]
    engine = make_engine()
    engine.add(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=20), "r")
    scores = run(engine)["r", 0].prompt_logprobs
    assert scores is not None
    assert [entry is None for entry in scores] == [True] * 20 + [False] * 5
    assert scores[22].logprob == pytest.approx(expected_logprob(prompt[:22], prompt[22]), abs=1e-5)
    assert engine.runner.model.most_rows <= 6


def test_scored_requests_share_the_context_before_what_is_scored() -> None:
    """The answers of a multiple-choice question: the question is computed once."""
    context = [number % 7 for number in range(40)]
    engine = make_engine(block_size=4)
    answers = [[number, number + 1, 3] for number in range(6)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=len(context))
    for number, answer in enumerate(answers):
        engine.add(context + answer, params, f"r{number}")
    told = run(engine)
    assert engine.stats().computed_tokens == 43 + 5 * (43 - 36)
    for number, answer in enumerate(answers):
        scores = told[f"r{number}", 0].prompt_logprobs
        assert scores is not None
        for position, entry in enumerate(scores[40:], 40):
            expected = expected_logprob((context + answer)[:position], answer[position - 40])
            assert entry.logprob == pytest.approx(expected, abs=1e-5)


def test_samples_of_one_prompt_share_it() -> None:
    prompt = list(range(10, 30))
    params = SamplingParams(temperature=1.0, max_tokens=7, n=5, seed=11)
    engine = make_engine(prefix_cache=False)
    engine.add(prompt, params, "r")
    told = run(engine)
    assert len({told["r", index].token_ids for index in range(5)}) == 5
    assert engine.stats().computed_tokens == len(prompt) + 5 * 6
    for index in range(5):
        tokens = list(prompt)
        assert len(told["r", index].token_ids) == 7
        for token in told["r", index].token_ids:
            assert float(next_logits(tokens).softmax(-1)[token]) > 1e-5
            tokens.append(token)


@pytest.mark.parametrize(("max_tokens", "room"), [(1, {}), (5, {}), (5, {"max_sequences": 1})])
def test_a_tenant_pays_for_every_token_of_every_sample(max_tokens: int, room: dict[str, int]) -> None:
    engine = make_engine(policy="vtc", **room)
    name = engine.add([1, 2, 3], SamplingParams(max_tokens=max_tokens, n=3, seed=1), tenant="a")
    told = run(engine)
    tokens = sum(len(told[name, index].token_ids) for index in range(3))
    assert tokens == 3 * max_tokens
    assert engine.scheduler.meter.service["a"] == engine.scheduler.policy.counters["a"] == 3 + 2 * tokens


def test_one_sample_is_the_first_of_many() -> None:
    first = {}
    for n in (1, 4):
        engine = make_engine()
        engine.add([3, 1, 4], SamplingParams(temperature=1.0, max_tokens=9, n=n, seed=5), "r")
        first[n] = run(engine)["r", 0]
    assert first[1] == first[4]


def test_greedy_samples_are_equal() -> None:
    engine = make_engine(pages=12, headroom_tokens=0)
    engine.add([3, 1, 4], SamplingParams(temperature=0.0, max_tokens=9, n=3), "r")
    engine.add([3, 1, 4], SamplingParams(temperature=0.0, max_tokens=1, n=3), "s")
    told = run(engine)
    assert {told["r", index].token_ids for index in range(3)} == {greedy([3, 1, 4], 9)}
    assert {(told["s", i].token_ids, told["s", i].finish_reason) for i in range(3)} == {
        (greedy([3, 1, 4], 1), "length")
    }


def test_seeds() -> None:
    def tokens(seed: int | None, engine_seed: int | None) -> tuple[int, ...]:
        engine = make_engine(seed=engine_seed)
        engine.add([1], SamplingParams(temperature=5.0, max_tokens=20, seed=seed), "r")
        return run(engine)["r", 0].token_ids

    assert tokens(3, 0) == tokens(3, 1) == tokens(3, None)
    assert tokens(3, 0) != tokens(4, 0)
    assert tokens(None, 7) == tokens(None, 7) != tokens(None, 8)
    assert tokens(None, None) != tokens(None, None)
