"""The scheduler: what goes into a step, and in which order it is told what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compress.core.errors import UsageError
from runtime.scheduler import StepOutput
from tests.runtime.bench import Bench, settings, shape

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


def test_bookkeeping_imports_no_torch() -> None:
    script = "import sys, runtime.simulator, runtime.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]).returncode == 0
