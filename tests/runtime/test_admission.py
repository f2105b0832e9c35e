"""The scheduler lets in what fits and refuses what never could: the bugs that other engines had, by name."""

from __future__ import annotations

import pytest

from compress.core.errors import UsageError
from runtime.scheduler import QueueFull, RequestTooLong, SchedulerSettings
from tests.runtime.bench import Bench, settings

# runtime_kv 1: requests that can never fit must fail at once


def test_a_request_that_can_never_fit_is_refused_with_the_exact_limit() -> None:
    bench = Bench(pages=4, page_tokens=4, max_length=100)
    with pytest.raises(RequestTooLong, match=r"1 more than the 17 tokens .* \(4 pages of 4\).* at most 7"):
        bench.add(10, 8)
    sequence = bench.add(10, 7)  # the last token is never stored: 16 slots do
    bench.run()
    assert sequence.finish_reason == "length"
    with pytest.raises(RequestTooLong, match="shorten the prompt"):
        bench.add(17, 1)
    with pytest.raises(RequestTooLong, match="17 tokens and max_tokens 0 are 1 more than the 16 "):
        bench.add(17, 0)
    bench.add(16, 0)
    bench.run()


def test_a_request_longer_than_the_model_is_refused_with_the_exact_limit() -> None:
    bench = Bench(pages=40, max_length=20)
    with pytest.raises(RequestTooLong, match=r"2 more than the 20 tokens .*max_length.* at most 5"):
        bench.add(15, 7)
    bench.add(15, 5)
    assert [len(tokens) for tokens in bench.run() if tokens] == [5]


def test_what_is_refused_leaves_nothing_behind() -> None:
    bench = Bench(pages=2)
    with pytest.raises(RequestTooLong):
        bench.add(100, 1)
    with pytest.raises(UsageError, match="needs a prompt"):
        bench.add([], 1)
    with pytest.raises(UsageError, match="needs a prompt"):
        bench.add([1], -1)
    assert not bench.scheduler.has_work and bench.scheduler.schedule() is None
    bench.check()


def test_nobody_waits_behind_a_request_that_can_never_fit() -> None:
    bench = Bench(pages=4)
    with pytest.raises(RequestTooLong):
        bench.add(30, 8)
    bench.add(4, 2)
    assert len(bench.run()[-1]) == 2


# runtime_kv 2: the engine stops admitting though memory is free


def test_admission_goes_on_as_long_as_memory_is_free() -> None:
    """The first in line needs the whole pool, and room for the others to grow would keep it out for ever."""
    bench = Bench(pages=4, settings=SchedulerSettings(headroom_tokens=1000))
    bench.add(2, 2)
    sequence = bench.add(15, 2)
    bench.run()
    assert sequence.finish_reason == "length"


def test_a_prompt_that_is_cached_and_fills_the_pool_is_admitted() -> None:
    """Its own cached pages are all there are: none is left to recompute the last token in, unless one is given up."""
    bench = Bench(pages=4)
    prompt = [1, 2, 0, 1] * 4
    bench.add(prompt, 1)
    bench.run()
    assert bench.pool.statistics.cached == 4
    bench.add(prompt, 1)
    first, second = bench.run()
    assert first == second and bench.pool.statistics.hits == 3


def test_aborting_everything_lets_the_next_one_in() -> None:
    bench = Bench(pages=4)
    running = [bench.add(7, 2) for _ in range(3)]
    bench.step()
    waiting = bench.add(16, 1)
    for sequence in running:
        bench.scheduler.abort(sequence.id)
    assert [row.sequence for row in bench.step().rows] == [waiting.id]


# runtime_kv 6: no back-pressure


def test_a_full_queue_refuses() -> None:
    bench = Bench(settings=settings(max_queue=2, max_sequences=1))
    bench.add(3, 2)
    bench.step()
    bench.add(3, 2)
    bench.add(3, 2)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        bench.add(3, 2)
    bench.run()
    bench.add(3, 2)  # room again


def test_a_preempted_sequence_is_not_refused_by_a_full_queue() -> None:
    bench = Bench(pages=4, settings=settings(max_queue=1))
    bench.add(7, 9)
    bench.step()
    second = bench.add(7, 9)
    bench.step()
    bench.add(7, 1)
    while not second.preemptions:
        bench.step()
    assert len(bench.scheduler.waiting) == 2
    bench.run()
    bench.check()
