"""How sequences end in the scheduler: aborts, reasons, errors: the bugs that other engines had, by name."""

from __future__ import annotations

import pytest

from compress.core.errors import UsageError
from runtime.scheduler import SchedulerSettings, StepOutput
from tests.runtime.bench import Bench, settings, shape

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
