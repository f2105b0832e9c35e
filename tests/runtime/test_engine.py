"""The engine over a model that reads its whole history back through the pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core.errors import UsageError
from runtime.logprobs import TokenLogprobs
from runtime.ops.batch import AttentionBatch
from runtime.params import SamplingParams
from runtime.runner import Runner
from runtime.scheduler import QueueFull, RequestTooLong
from runtime.trace import Recorder, replay
from tests.runtime.fake_model import POISON, VOCABULARY, greedy, make_engine, next_logits, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Letters:
    """Token t is one of 26 letters, or a space."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz "[token % 27] for token in ids)


def spelled(tokens: tuple[int, ...]) -> str:
    return Letters().decode(list(tokens))


def test_greedy_tokens_are_the_models() -> None:
    engine = make_engine()
    prompts = [[1, 2, 3], [5], [7] * 30, [1, 2, 3, 4, 5, 6, 7, 8]]
    names = [engine.add(prompt, GREEDY) for prompt in prompts]
    told = run(engine)
    for name, prompt in zip(names, prompts, strict=True):
        assert told[name, 0].token_ids == greedy(prompt, 8)
        assert told[name, 0].finish_reason == "length"


SCHEDULES = {
    "plain": {},
    "no chunks": {"chunked_prefill": False},
    "small chunks": {"token_budget": 5},
    "no prefix cache": {"prefix_cache": False},
    "one at a time": {"max_sequences": 1},
    "two at a time, small chunks, no prefix cache": {"max_sequences": 2, "token_budget": 3, "prefix_cache": False},
    "preempting": {"pages": 24, "headroom_tokens": 0},
    "preempting, small chunks": {"pages": 24, "token_budget": 7, "headroom_tokens": 0},
    "pages of one token": {"block_size": 1, "pages": 300},
    "priorities": {"policy": "priority", "token_budget": 9, "pages": 30},
    "fair": {"policy": "vtc", "token_budget": 9},
}

REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=40).filter(lambda prompt: prompt[0] != POISON),
        st.integers(1, 30),
        st.integers(0, 12),  # the step before which it comes
        st.sampled_from(["", "other"]),
        st.booleans(),  # sampled or greedy
        st.integers(1, 3),
        st.booleans(),  # prompt log-probabilities
        st.one_of(st.none(), st.integers(0, 20)),  # aborted after so many steps
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=10, deadline=None)
@given(REQUESTS)
def test_a_requests_tokens_do_not_depend_on_the_schedule(requests: list[tuple]) -> None:
    """Non-determinism: whatever is chunked, cached, preempted or batched, the same tokens come out."""
    results, preemptions = {}, 0
    for label, options in SCHEDULES.items():
        engine = make_engine(**options)
        told: dict[tuple[str, int], tuple] = {}
        step, due = 0, sorted(enumerate(requests), key=lambda item: item[1][2])
        aborts: dict[str, int] = {}
        while due or engine.has_work:
            while due and due[0][1][2] <= step:
                number, (prompt, count, _, tenant, sampled, n, scored, abort) = due.pop(0)
                params = SamplingParams(
                    max_tokens=count,
                    temperature=0.8 if sampled else 0.0,
                    top_p=0.9,
                    seed=number,
                    n=n,
                    logprobs=1,
                    prompt_logprobs=0 if scored else None,
                )
                name = engine.add(prompt, params, f"r{number}", tenant=tenant, priority=number % 3)
                if abort is not None:
                    aborts[name] = step + abort
            for name in [name for name, at in aborts.items() if at <= step]:
                engine.abort(name)
                del aborts[name]
            for update in engine.step():
                key = update.request, update.index
                tokens, logprobs, scores, reason = told.get(key, ((), (), None, None))
                assert reason is None
                told[key] = (
                    tokens + update.token_ids,
                    logprobs + update.logprobs,
                    scores or update.prompt_logprobs,
                    update.finish_reason,
                )
            engine.check_integrity()
            step += 1
        preemptions += engine.stats().preemptions
        assert engine.stats().pages.owned == 0
        results[label] = told
    reference = results.pop("plain")
    for label, told in results.items():
        assert told.keys() == reference.keys()
        for key, (tokens, logprobs, scores, reason) in told.items():
            expected = reference[key]
            if "abort" in (reason, expected[3]):
                shortest = min(len(tokens), len(expected[0]))
                assert tokens[:shortest] == expected[0][:shortest], label
            else:
                assert (tokens, logprobs, scores, reason) == expected, label
    for number, (prompt, count, _, _, sampled, n, _, abort) in enumerate(requests):
        for index in range(n):
            if not sampled and abort is None:
                assert reference[f"r{number}", index][0] == greedy(prompt, count)


def test_preemption_happens_and_changes_nothing() -> None:
    engine = make_engine(pages=20, headroom_tokens=0)
    prompts = [[number, 5, 5] for number in range(8)]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    names = [engine.add(prompt, params) for prompt in prompts]
    told = run(engine)
    assert engine.stats().preemptions > 0
    assert [told[name, 0].token_ids for name in names] == [greedy(prompt, 30) for prompt in prompts]


class ReplayedDecodes:
    """Stands in for captured graphs: logits of every row of a batch of decodes."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.replays = 0

    def covers(self, batch: AttentionBatch) -> bool:
        return batch.max_query == 1 and len(batch.kv_len) <= 4

    def run(self, ids_T: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        self.replays += 1
        return self.runner.model(ids_T, batch, self.runner.cache, torch.arange(len(ids_T)))


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_steps_that_graphs_cover_go_through_them(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens of a prompt, whose logits nobody wants, are covered too."""
    engine = make_engine(token_budget=budget)
    graphs = ReplayedDecodes(engine.runner)
    monkeypatch.setattr(engine.runner, "_graphs", graphs)
    prompts = [[number] * 5 for number in range(6)]
    names = [engine.add(prompt, GREEDY) for prompt in prompts]
    told = run(engine)
    assert [told[name, 0].token_ids for name in names] == [greedy(prompt, 8) for prompt in prompts]
    assert (graphs.replays > 0) == (budget < 100)


# Ends


def test_abort_frees_pages_within_a_step() -> None:
    engine = make_engine(token_budget=6)
    keep = engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=20))
    decoding = engine.add([4, 5, 6], SamplingParams(temperature=0.0, max_tokens=20, n=2))
    for _ in range(4):
        engine.step()
    prefilling = engine.add([7] * 40, GREEDY)
    waiting = engine.add([8] * 40, GREEDY)
    engine.step()
    before = engine.stats().pages.owned
    engine.abort(decoding)
    engine.abort(prefilling)
    engine.abort(waiting)
    engine.check_integrity()
    assert engine.stats().pages.owned == 2 < before
    updates = engine.step()
    ended = {(update.request, update.index): update.finish_reason for update in updates if update.finish_reason}
    assert ended == dict.fromkeys(((decoding, 0), (decoding, 1), (prefilling, 0), (waiting, 0)), "abort")
    told = run(engine)
    assert set(told) == {(keep, 0)}


def test_abort_before_the_prompt_is_computed_ends_all_samples() -> None:
    engine = make_engine(token_budget=4)
    name = engine.add([1] * 20, SamplingParams(n=3, max_tokens=4))
    engine.step()
    engine.abort(name)
    assert {key: told.finish_reason for key, told in run(engine).items()} == {(name, i): "abort" for i in range(3)}


def test_abort_of_nobody_is_harmless() -> None:
    engine = make_engine()
    engine.abort("never heard of")
    assert not engine.has_work


def test_every_request_ends_with_a_reason() -> None:
    """Accepted-but-ignored parameters: finish_reason is never left open, and says what happened."""
    prompt = [1, 2, 3]
    tokens = greedy(prompt, 12)
    engine = make_engine(tokenizer=Letters(), end_tokens=(tokens[5],), max_length=10)
    cases = {
        "length": SamplingParams(temperature=0.0, max_tokens=3),
        "end": SamplingParams(temperature=0.0, max_tokens=7),
        "ignored end": SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True),
        "stop token": SamplingParams(temperature=0.0, max_tokens=7, stop_token_ids=(tokens[3],)),
        "stop token though end is ignored": SamplingParams(
            temperature=0.0, max_tokens=7, stop_token_ids=(tokens[3],), ignore_eos=True
        ),
        "stop string": SamplingParams(temperature=0.0, max_tokens=7, stop=(spelled(tokens[1:3]),)),
    }
    for name, params in cases.items():
        engine.add(prompt, params, name)
    engine.add([POISON, 2], GREEDY, "nan")
    told = {name: result for (name, _), result in run(engine).items()}
    reasons = {name: result.finish_reason for name, result in told.items()}
    assert reasons == dict.fromkeys(cases, "stop") | {"length": "length", "ignored end": "length", "nan": "error"}
    assert told["length"].token_ids == tokens[:3]
    assert told["end"].token_ids == tokens[:6]
    assert told["ignored end"].token_ids == tokens[:7]
    assert told["stop token"].token_ids == told["stop token though end is ignored"].token_ids == tokens[:4]
    assert told["stop token"].text == spelled(tokens[:3])
    assert told["stop string"].token_ids == tokens[:3]
    assert told["stop string"].text == spelled(tokens[:1])
    assert told["nan"].token_ids == ()


def test_text_held_back_comes_out_when_the_request_ends() -> None:
    tokens = greedy([4], 5)
    engine = make_engine(tokenizer=Letters())
    engine.add([4], SamplingParams(temperature=0.0, max_tokens=5, stop=(spelled(tokens[3:5]) + "?",)), "r")
    assert run(engine)["r", 0].text == spelled(tokens)


def test_stop_text_never_leaks_into_the_stream() -> None:
    tokens = greedy([4], 9)
    stop = spelled(tokens[4:7])
    engine = make_engine(tokenizer=Letters())
    engine.add([4], SamplingParams(temperature=0.0, max_tokens=9, stop=(stop,)), "r")
    streamed = ""
    while engine.has_work:
        for update in engine.step():
            streamed += update.text
            assert spelled(tokens[:4]).startswith(streamed)
    assert streamed == spelled(tokens[:4])


# Broken models


def test_nan_logits_end_one_request_and_poison_nobody() -> None:
    """Bad sampling inputs: the neighbours' tokens are what they would have been."""
    engine = make_engine()
    for number in range(4):
        engine.add([number, 3], SamplingParams(temperature=1.0, seed=number, max_tokens=6), f"r{number}")
    alone = run(engine)
    engine = make_engine()
    for number in range(4):
        engine.add([POISON, number], SamplingParams(temperature=number / 2, prompt_logprobs=1, n=2), f"bad{number}")
        engine.add([number, 3], SamplingParams(temperature=1.0, seed=number, max_tokens=6), f"r{number}")
    told = run(engine)
    assert {key: told[key] for key in alone} == alone
    bad = {key: result.finish_reason for key, result in told.items() if key not in alone}
    assert bad == {(f"bad{number}", index): "error" for number in range(4) for index in range(2)}


def test_a_broken_prompt_that_is_only_read_ends_with_error() -> None:
    engine = make_engine()
    engine.add([POISON, 1, 2, 3], SamplingParams(max_tokens=0, prompt_logprobs=0), "bad")
    engine.add([1, 1, 2, 3], SamplingParams(max_tokens=0, prompt_logprobs=0), "good")
    told = run(engine)
    assert (told["bad", 0].finish_reason, told["good", 0].finish_reason) == ("error", "length")


def test_a_failing_model_ends_what_runs_and_the_engine_goes_on() -> None:
    engine = make_engine(max_sequences=2)
    for number in range(3):
        engine.add([number], SamplingParams(temperature=0.0, max_tokens=4, n=2 if number == 0 else 1), f"r{number}")
    engine.runner.model.fail_at = 1
    with pytest.raises(RuntimeError, match="on fire"):
        engine.step()
    engine.check_integrity()
    told = run(engine)
    assert {key: result.finish_reason for key, result in told.items()} == {
        ("r0", 0): "error",
        ("r0", 1): "error",
        ("r1", 0): "error",
        ("r2", 0): "length",
    }
    assert told["r2", 0].token_ids == greedy([2], 4)


# Log-probabilities and samples


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


# What is refused


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    engine = make_engine()
    for prompt in ([VOCABULARY], [-1], [1.0], [True], ["a"], []):
        with pytest.raises(UsageError, match="prompt"):
            engine.add(prompt, GREEDY)
    with pytest.raises(UsageError, match="stop_token_ids"):
        engine.add([1], SamplingParams(stop_token_ids=(VOCABULARY,)))
    assert not engine.has_work


def test_what_can_never_fit_is_refused_with_the_limit() -> None:
    engine = make_engine(pages=5, block_size=4, max_length=200)
    with pytest.raises(RequestTooLong, match="21"):
        engine.add([1] * 10, SamplingParams(max_tokens=12))
    engine.add([1] * 10, SamplingParams(temperature=0.0, max_tokens=11), "r")
    assert run(engine)["r", 0].token_ids == greedy([1] * 10, 11)


def test_a_full_queue_refuses_and_takes_again() -> None:
    engine = make_engine(max_queue=2, max_sequences=1)
    engine.add([1], GREEDY)
    engine.add([2], GREEDY)
    with pytest.raises(QueueFull):
        engine.add([3], GREEDY)
    engine.step()
    engine.add([3], GREEDY)
    assert len(run(engine)) == 3


def test_a_name_is_taken_until_its_request_ends() -> None:
    engine = make_engine()
    engine.add([1], GREEDY, "r")
    with pytest.raises(UsageError, match="'r'"):
        engine.add([2], GREEDY, "r")
    run(engine)
    engine.add([2], GREEDY, "r")
    assert run(engine)["r", 0].token_ids == greedy([2], 8)


def test_forgotten_requests_say_nothing_more() -> None:
    engine = make_engine()
    engine.add([1], GREEDY, "r")
    engine.step()
    engine.forget("r")
    assert not engine.has_work
    assert engine.stats().pages.owned == 0


def test_the_engine_needs_neither_transformers_nor_pydantic() -> None:
    """It runs on bare GPU machines."""
    script = (
        "import sys, runtime.engine, runtime.memory, runtime.trace\n"
        "sys.exit(', '.join({'transformers', 'tokenizers', 'pydantic', 'datasets', 'psutil'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stderr


def test_steps_are_recorded_and_replayed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with Recorder(path) as recorder:
        engine = make_engine(pages=20, token_budget=9, recorder=recorder, headroom_tokens=0)
        for number in range(6):
            engine.add([number] * (number + 3), SamplingParams(max_tokens=12, n=1 + number % 2), f"r{number}")
        engine.step()
        engine.abort("r2")
        run(engine)
    steps = list(replay(path))
    assert len(steps) == engine.stats().steps > 10
