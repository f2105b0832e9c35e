"""How requests end in the engine: aborts, stop texts, models that break down."""

from __future__ import annotations

import pytest

from runtime.params import SamplingParams
from tests.runtime.fake_model import POISON, greedy, make_engine, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Letters:
    """Token t is one of 26 letters, or a space."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz "[token % 27] for token in ids)


def spelled(tokens: tuple[int, ...]) -> str:
    return Letters().decode(list(tokens))


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
