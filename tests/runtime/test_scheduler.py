"""The scheduler: what goes into a step, and the bugs that other engines had, by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compress.core.errors import UsageError
from runtime.scheduler import QueueFull, RequestTooLong, SchedulerSettings, StepOutput
from tests.runtime.bench import Bench


def settings(**given) -> SchedulerSettings:
    return SchedulerSettings(**{"headroom_tokens": 0} | given)


def shape(step) -> list[tuple[int, int, bool]]:
    """(sequence, tokens, samples) of each row."""
    return [(row.sequence, len(row.tokens), row.samples) for row in step.rows]


# What goes into a step


def test_one_sequence_from_prompt_to_length() -> None:
    bench = Bench()
    sequence = bench.add([1, 2, 0, 1, 2], 3)
    assert shape(bench.step()) == [(0, 5, True)]
    assert shape(bench.step()) == [(0, 1, True)]
    assert shape(bench.step()) == [(0, 1, True)]
    assert bench.step() is None
    assert (sequence.status, sequence.finish_reason, len(sequence.generated)) == ("finished", "length", 3)
    assert bench.pool.statistics.owned == 0


def test_decodes_come_first_then_prefills_under_way_then_new_ones() -> None:
    bench = Bench(pages=40, settings=settings(token_budget=8))
    bench.add(4, 9)
    bench.step()
    bench.add(10, 2)
    assert shape(bench.step()) == [(0, 1, True), (1, 7, False)]
    bench.add(2, 2)
    assert shape(bench.step()) == [(0, 1, True), (1, 3, True), (2, 2, True)]
    assert shape(bench.step()) == [(0, 1, True), (1, 1, True), (2, 1, True)]


def test_every_running_sequence_can_decode_in_every_step() -> None:
    bench = Bench(pages=40, settings=settings(token_budget=3))
    for _ in range(6):
        bench.add(1, 4)
    bench.step()
    assert len(bench.scheduler.running) == 3  # not more than the budget has tokens
    assert shape(bench.step()) == [(0, 1, True), (1, 1, True), (2, 1, True)]
    assert all(len(tokens) == 4 for tokens in bench.run())


def test_unchunked_prompts_are_computed_whole() -> None:
    bench = Bench(pages=40, settings=settings(token_budget=8, chunked_prefill=False))
    bench.add(4, 9)
    bench.step()
    bench.add(20, 2)  # more than the budget: with the decodes, but alone of its kind
    bench.add(2, 2)
    assert shape(bench.step()) == [(0, 1, True), (1, 20, True)]
    assert shape(bench.step()) == [(0, 1, True), (1, 1, True), (2, 2, True)]


def test_a_prompt_only_to_be_read_samples_nothing() -> None:
    bench = Bench(max_length=12, settings=settings(token_budget=8))
    sequence = bench.add(12, 0)
    assert shape(bench.step()) == [(0, 8, False)]
    assert sequence.status == "running"
    assert shape(bench.step()) == [(0, 4, False)]
    assert (sequence.finish_reason, sequence.generated) == ("length", [])


def test_the_engine_decides_other_ends() -> None:
    bench = Bench()
    stopped, broken = bench.add([1, 2], 8), bench.add([2, 1], 8)
    step = bench.scheduler.schedule()
    ended = bench.scheduler.postprocess(step, StepOutput({0: 7}, {0: "stop", 1: "error"}))
    assert ended == [stopped, broken]
    assert (stopped.finish_reason, stopped.generated) == ("stop", [7])
    assert (broken.finish_reason, broken.generated) == ("error", [])
    assert not bench.scheduler.has_work


def test_rows_of_one_step_share_what_it_fills() -> None:
    bench = Bench()
    for _ in range(3):
        bench.add([1, 2, 0, 1, 2, 2, 1, 0, 1], 2)
    step = bench.step()
    assert shape(step) == [(0, 9, True), (1, 1, True), (2, 1, True)]
    assert len({row.table[:2] for row in step.rows}) == 1
    assert len({tuple(tokens) for tokens in bench.run()}) == 1


def test_what_an_aborted_prefill_did_not_reach_is_not_shared() -> None:
    bench = Bench(settings=settings(token_budget=5))
    prompt = [1, 2, 0, 1, 2, 2, 1, 0, 1]
    first = bench.add(prompt, 2)
    bench.step()
    bench.scheduler.abort(first.id)
    second = bench.add(prompt, 2)
    assert bench.step().rows[0].start == 4
    bench.run()
    assert second.finish_reason == "length"


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


# runtime_kv 7: aborts


def test_an_abort_frees_pages_before_the_next_step() -> None:
    bench = Bench(pages=4)
    running = bench.add(14, 2)
    bench.step()
    waiting = bench.add(13, 2)
    assert [row.sequence for row in bench.step().rows] == [running.id]
    bench.scheduler.abort(running.id)
    assert bench.pool.available == 4
    assert [row.sequence for row in bench.step().rows] == [waiting.id]


def test_an_abort_while_the_step_is_in_flight() -> None:
    bench = Bench(pages=4)
    running, other = bench.add(6, 9), bench.add(3, 9)
    bench.step()
    step = bench.scheduler.schedule()
    bench.scheduler.abort(running.id)
    assert bench.scheduler.postprocess(step, bench.compute(step)) == []
    assert running.finish_reason == "abort" and len(running.generated) == 1
    bench.check()
    bench.run()
    assert other.finish_reason == "length"


def test_an_abort_in_line_and_of_somebody_unknown() -> None:
    bench = Bench(settings=settings(max_sequences=1))
    bench.add(3, 2)
    bench.step()
    waiting = bench.add(3, 2)
    bench.scheduler.abort(waiting.id)
    bench.scheduler.abort(99)
    assert waiting.finish_reason == "abort" and bench.scheduler.waiting == []
    bench.check()


# runtime_kv 17 and 18: finish reasons, settings that make no sense, requests that poison others


def test_every_sequence_ends_with_a_reason() -> None:
    bench = Bench(pages=6, settings=settings())
    sequences = [bench.add(5, count) for count in (1, 2, 6)]
    bench.step()
    bench.scheduler.abort(2)
    bench.run()
    assert [sequence.finish_reason for sequence in sequences] == ["length", "length", "abort"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_budget", 0), ("max_sequences", 0), ("max_queue", -1), ("policy", "fair"), ("headroom_tokens", -1),
        ("input_weight", float("nan")), ("output_weight", -1.0),
        ("tenant_weights", {"a": 0.0}), ("tenant_weights", {"a": float("nan")}),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        SchedulerSettings(**{field: value})


def test_pages_of_a_request_with_an_error_are_not_shared() -> None:
    bench = Bench()
    prompt = [1, 2, 0, 1, 2]
    bench.add(prompt, 4)
    step = bench.scheduler.schedule()
    bench.scheduler.postprocess(step, StepOutput({}, {0: "error"}))
    bench.add(prompt, 4)
    assert shape(bench.step()) == [(1, 5, True)]
    bench.check()


def test_a_step_that_failed_ends_what_ran_and_nothing_else() -> None:
    bench = Bench(settings=settings(max_sequences=2))
    running = [bench.add([1, 2, 0, 1, 2], 4), bench.add([1, 2, 0, 1, 0], 4)]
    waiting = bench.add([1, 2, 0, 1, 2], 4)
    bench.scheduler.schedule()
    assert bench.scheduler.abandon() == running
    bench.check()
    assert [sequence.finish_reason for sequence in running] == ["error", "error"]
    assert bench.pool.available == bench.pool.statistics.free == bench.pool.pages
    bench.run()
    assert waiting.finish_reason == "length"


# Protocol


def test_steps_and_outputs_take_turns() -> None:
    bench = Bench()
    bench.add(3, 4)
    step = bench.scheduler.schedule()
    with pytest.raises(RuntimeError, match="step 0 is still in flight"):
        bench.scheduler.schedule()
    with pytest.raises(RuntimeError, match="no token for it"):
        bench.scheduler.postprocess(step, StepOutput())
    bench.scheduler.postprocess(step, StepOutput({0: 1}))
    with pytest.raises(RuntimeError, match="not in flight"):
        bench.scheduler.postprocess(step, StepOutput({0: 1}))


def test_a_sequence_enters_once() -> None:
    bench = Bench()
    sequence = bench.add(3, 1)
    with pytest.raises(UsageError, match="here already"):
        bench.scheduler.add(sequence)
    bench.run()
    with pytest.raises(UsageError, match="here already, or was"):
        bench.scheduler.add(sequence)


# Parallel samples


def test_samples_share_the_prompt_and_part_where_they_differ() -> None:
    bench = Bench()
    parent = bench.add([1, 2, 0, 1, 2, 2], 6)
    bench.step()
    children = [bench.fork(parent, last=token) for token in (10, 11)]
    assert bench.pool.statistics.owned == 2
    step = bench.step()
    assert len(step.copies) == 2 and len(step.rows) == 3  # the last writer keeps the page
    assert bench.pool.statistics.owned == 4
    bench.run()
    assert [child.generated[0] for child in children] == [10, 11]
    assert all(len(child.generated) == 6 for child in children)


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8])
def test_a_sample_may_choose_its_first_token_itself(prompt: int) -> None:
    bench = Bench()
    parent = bench.add([1, 2, 0, 1, 2, 2, 1, 0][:prompt], 6)
    bench.step()
    bench.fork(parent, fresh=True)
    first, second = bench.run()
    assert first == second  # greedy, after all


def test_samples_use_fewer_pages_than_requests_of_their_own() -> None:
    prompt = [1, 2, 0, 1, 2, 2, 1, 0] * 3
    shared, apart = (Bench(pages=40, settings=settings(prefix_cache=False)) for _ in range(2))
    parent = shared.add(prompt, 8)
    shared.step()
    for token in (10, 11):
        shared.fork(parent, last=token)
    for _ in range(3):
        apart.add(prompt, 8)
    apart.step()
    for bench in (shared, apart):
        bench.step()
    assert shared.pool.statistics.owned <= 0.6 * apart.pool.statistics.owned


def test_a_sample_gets_in_line_where_no_more_may_run() -> None:
    bench = Bench(settings=settings(max_sequences=1))
    parent = bench.add([1, 2, 0], 4)
    bench.step()
    child = bench.fork(parent)
    assert child.status == "waiting"
    first, second = bench.run()
    assert first == second


def test_a_sample_gets_in_line_while_its_parent_is_read() -> None:
    bench = Bench(settings=settings(token_budget=4))
    parent = bench.add([1, 2, 0, 1, 2, 2, 1], 4)
    bench.step()
    child = bench.fork(parent)
    assert (parent.computed, child.status) == (4, "waiting")
    first, second = bench.run()
    assert first == second


def test_a_sample_of_another_tenant_or_beginning_is_refused() -> None:
    bench = Bench()
    parent = bench.add([1, 2, 0], 4, tenant="a")
    bench.step()
    with pytest.raises(UsageError, match="does not begin like"):
        bench.scheduler.fork(parent, bench.sequence([1, 2, 0], 4, tenant="b"))
    with pytest.raises(UsageError, match="does not begin like"):
        bench.scheduler.fork(parent, bench.sequence([1, 1, 0], 4, tenant="a"))
    bench.check()


def test_bookkeeping_imports_no_torch() -> None:
    script = "import sys, runtime.simulator, runtime.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]).returncode == 0
