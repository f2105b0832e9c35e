"""Virtual time: the same scheduler and pool, with steps that take what a model of them says."""

from __future__ import annotations

import random

import pytest

from runtime.blocks import BlockPool
from runtime.page import PageType
from runtime.scheduler import SchedulerSettings
from runtime.simulator import Arrival, Simulator, StepTime
from runtime.step import Row, Step

PAGE = PageType("float32", 1024, 16)


def simulator(step_time: StepTime, pages: int = 1000, **settings) -> Simulator:
    return Simulator(BlockPool(pages, PAGE), SchedulerSettings(**settings), step_time, max_length=16 * pages)


def step(*rows: tuple[int, int]) -> Step:
    """Rows of (slots stored before, tokens)."""
    return Step(0, tuple(Row(id, kv, (0,) * tokens, kv, (), True) for id, (kv, tokens) in enumerate(rows)))


def test_a_step_takes_what_its_model_says() -> None:
    assert StepTime(1.0, 0.1, 0.01).seconds(step((10, 1), (0, 5))) == pytest.approx(1 + 0.1 * 6 + 0.01 * 16)


def test_a_model_is_found_again_in_its_own_times() -> None:
    truth, rng = StepTime(0.02, 1e-4, 1e-6), random.Random(0)
    steps = [step((rng.randint(0, 5000), rng.randint(1, 500)), (rng.randint(0, 900), 1)) for _ in range(50)]
    samples = [(s.tokens, sum(row.kv_len + len(row.tokens) for row in s.rows), truth.seconds(s)) for s in steps]
    found = StepTime.fit(samples)
    assert [found.base_s, found.token_s, found.slot_s] == pytest.approx([0.02, 1e-4, 1e-6], rel=1e-6)


def test_a_fitted_model_has_no_negative_term() -> None:
    samples = [(tokens, slots, 1.0 + tokens - 1e-3 * slots) for tokens in (1, 5, 9) for slots in (10, 100, 300)]
    found = StepTime.fit(samples)
    assert found.slot_s == 0.0 and found.token_s > 0 and found.base_s >= 0


def test_tokens_come_at_the_ends_of_steps() -> None:
    served = simulator(StepTime(1.0)).run([Arrival(0.0, 5, 3), Arrival(2.5, 5, 2), Arrival(20.0, 5, 1)])
    assert [one.token_times for one in served] == [[1, 2, 3], [4, 5], [21]]
    assert [one.finish_reason for one in served] == ["length"] * 3


def test_the_clock_can_be_stopped_and_goes_on() -> None:
    clock = simulator(StepTime(1.0))
    served = clock.run([Arrival(0.0, 5, 6)], until=3)
    assert len(served[0].token_times) == 3 and served[0].finish_reason is None
    clock.run([])
    assert served[0].token_times == [1, 2, 3, 4, 5, 6]


def test_a_budget_keeps_steps_within_a_factor() -> None:
    step_time = StepTime(0.01, 1e-4, 1e-7)
    budget = step_time.token_budget(decodes=16, slots=16 * 500, prompt=4096, factor=1.4)
    decodes = [(499, 1)] * 16
    full = step_time.seconds(step(*decodes, (4096 - budget + 16, budget - 16)))
    assert 1.38 < full / step_time.seconds(step(*decodes)) < 1.41


def gaps(chunked: bool) -> tuple[float, float]:
    """Steady gap between tokens of 16 decodes, and the largest while a prompt of 4,096 tokens comes among them."""
    step_time = StepTime(0.01, 1e-4, 1e-7)
    budget = step_time.token_budget(decodes=16, slots=16 * 500, prompt=4096, factor=1.4)
    clock = simulator(step_time, token_budget=budget, chunked_prefill=chunked)
    served = clock.run([*(Arrival(0.0, 20, 900) for _ in range(16)), Arrival(3.0, 4096, 4)])
    times = served[0].token_times
    before = [b - a for a, b in zip(times, times[1:], strict=False) if 1.0 < b < 3.0]
    after = [b - a for a, b in zip(times, times[1:], strict=False) if b >= 3.0]
    assert served[16].finish_reason == "length"
    return max(before), max(after)


def test_a_long_prompt_does_not_stop_decodes() -> None:
    steady, largest = gaps(chunked=True)
    assert largest <= 1.5 * steady
    steady, largest = gaps(chunked=False)
    assert largest >= 5 * steady


@pytest.mark.parametrize("batch", [8, 16])
def test_continuous_batching_gains_what_theory_says(batch: int) -> None:
    """Static batches last as long as their longest: E[max of B] / E[length] = 1 + 1/2 + … + 1/B if exponential."""
    rng, step_time = random.Random(7), StepTime(1.0)
    arrivals = [Arrival(0.0, 1, 1 + int(rng.expovariate(1 / 40))) for _ in range(batch * 100)]
    static, continuous = (simulator(step_time, 600, max_sequences=batch, max_queue=5000) for _ in range(2))
    for first in range(0, len(arrivals), batch):
        static.run(arrivals[first : first + batch])
    continuous.run(arrivals)
    harmonic = sum(1 / n for n in range(1, batch + 1))
    assert static.now / continuous.now == pytest.approx(harmonic, rel=0.1)
