"""The scheduler takes pages back and gives them again: the bugs that other engines had, by name."""

from __future__ import annotations

import pytest

from runtime.scheduler import SchedulerSettings
from tests.runtime.bench import Bench, settings

# runtime_kv 3: double free and leaks


def test_no_double_free_when_an_abort_meets_a_finish() -> None:
    bench = Bench()
    sequence = bench.add([1, 2, 0], 1)
    step = bench.scheduler.schedule()
    output = bench.compute(step)
    bench.scheduler.abort(sequence.id)
    assert bench.scheduler.postprocess(step, output) == []
    bench.scheduler.abort(sequence.id)
    bench.check()
    assert bench.pool.available == bench.pool.pages and sequence.finish_reason == "abort"


def test_no_leak_when_a_preempted_sequence_is_aborted() -> None:
    bench = Bench(pages=4, settings=settings())
    first, second = bench.add(7, 9), bench.add(7, 9)
    while not second.preemptions:
        bench.step()
    assert second.status == "waiting"
    bench.scheduler.abort(second.id)
    bench.check()
    bench.run()
    assert first.finish_reason == "length" and bench.pool.available == bench.pool.pages


# runtime_kv 4: preemption and prefix hits


def test_a_full_prefix_hit_still_computes_a_token() -> None:
    bench = Bench()
    prompt = [1, 2, 0, 1, 2, 2, 1, 0]
    bench.add(prompt, 3)
    bench.run()
    bench.add(prompt, 3)
    row = bench.step().rows[0]
    assert 1 <= len(row.tokens) <= 4 and row.start == row.kv_len == 4 and row.samples
    first, second = bench.run()
    assert first == second


@pytest.mark.parametrize("prompt", range(1, 14))
@pytest.mark.parametrize("budget", [1, 3, 4, 5, 8])
def test_chunk_boundaries(prompt: int, budget: int) -> None:
    """Chunks that end before, at and behind the end of a page, or of the prompt."""
    tokens = [1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2, 1, 0][:prompt]
    whole, chunked = Bench(), Bench(settings=settings(token_budget=budget))
    for bench in (whole, chunked):
        bench.add(tokens, 6)
        bench.run()
    assert whole.sequences[0].generated == chunked.sequences[0].generated
    assert [len(step.rows[0].tokens) for step in chunked.steps] == [
        *([budget] * (prompt // budget)), *([prompt % budget] if prompt % budget else []), *([1] * 5),
    ]  # fmt: skip


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    prompts = [[1, 2, 0, 1, 2, 2, 1], [2, 2, 2, 0, 1], [0, 0, 1, 2, 1, 1]]
    roomy, tight = Bench(pages=40), Bench(pages=5, settings=settings())
    for bench in (roomy, tight):
        for prompt in prompts:
            bench.add(prompt, 10)
    assert roomy.run() == tight.run()
    assert roomy.scheduler.preemptions == 0 and tight.scheduler.preemptions > 0


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    bench = Bench(pages=5, settings=settings())
    bench.add(7, 10)
    second = bench.add(11, 5)
    bench.run()
    assert second.preemptions and bench.pool.statistics.hit_tokens > 0


def test_the_newest_is_preempted_and_keeps_its_place_in_line() -> None:
    bench = Bench(pages=6, settings=settings())
    first, second, third = (bench.add(7, 9) for _ in range(3))
    while not bench.scheduler.preemptions:
        bench.step()
    assert (first.preemptions, second.preemptions, third.preemptions) == (0, 0, 1)
    bench.add(1, 1)
    assert bench.scheduler.waiting[0] is third


def test_a_low_priority_is_preempted_before_a_newer_one() -> None:
    bench = Bench(pages=4, settings=settings(policy="priority"))
    low, high = bench.add(7, 9, priority=0), bench.add(7, 9, priority=1)
    bench.run()
    assert low.preemptions > 0 and high.preemptions == 0


# runtime_kv 5: preemption storms


def storm(headroom_tokens: int) -> Bench:
    """Many short prompts that all grow to a fifth of the pool."""
    bench = Bench(pages=160, max_length=200, settings=SchedulerSettings(headroom_tokens=headroom_tokens))
    for _ in range(40):
        bench.add(8, 120)
    bench.run()
    return bench


def test_hysteresis_ends_preemption_storms() -> None:
    calm, stormy = storm(32), storm(0)
    assert all(sequence.finish_reason == "length" for sequence in calm.sequences.values())
    assert calm.scheduler.preemptions < 0.4 * stormy.scheduler.preemptions
    computed, wasted = (sum(step.tokens for step in bench.steps) for bench in (calm, stormy))
    assert computed < 0.8 * wasted


def test_a_storm_does_not_stop_decodes() -> None:
    """Even without hysteresis, every step takes the oldest on, and all get to their end."""
    bench = storm(0)
    oldest = [min(row.sequence for row in step.rows) for step in bench.steps]
    assert oldest == sorted(oldest)
    assert all(sequence.finish_reason == "length" for sequence in bench.sequences.values())
