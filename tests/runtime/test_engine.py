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
from runtime.ops.batch import AttentionBatch
from runtime.params import SamplingParams
from runtime.runner import Runner
from runtime.scheduler import QueueFull, RequestTooLong
from runtime.trace import Recorder, replay
from tests.runtime.fake_model import POISON, VOCABULARY, greedy, make_engine, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


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
    """Stands in for runtime.graphs and runtime.small_steps: logits of every row of a batch of decodes."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.replays = 0

    def covers(self, batch: AttentionBatch) -> bool:
        return batch.max_query == 1 and len(batch.kv_len) <= 4

    def run(self, ids_T: torch.Tensor, batch: AttentionBatch, rows: torch.Tensor) -> torch.Tensor:
        self.replays += 1
        return self.runner.model(ids_T, batch, self.runner.cache, rows)


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_decodes_that_can_be_done_whole_are(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens of a prompt, whose logits nobody wants, are covered too."""
    engine = make_engine(token_budget=budget)
    whole = ReplayedDecodes(engine.runner)
    monkeypatch.setattr(engine.runner, "whole", whole)
    prompts = [[number] * 5 for number in range(6)]
    names = [engine.add(prompt, GREEDY) for prompt in prompts]
    told = run(engine)
    assert [told[name, 0].token_ids for name in names] == [greedy(prompt, 8) for prompt in prompts]
    assert (whole.replays > 0) == (budget < 100)


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
