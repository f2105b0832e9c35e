"""Random schedules: after every operation free + cached + owned = total, and every row reads its own tokens.

The bench's model fails when a page holds anything but what the sequence's tokens say. The volume comes from a seeded
driver; hypothesis drives the same operations to find short failing cases.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.policies import POLICIES
from runtime.scheduler import QueueFull, RequestTooLong, SchedulerSettings, Step
from tests.runtime.bench import Bench

OPERATIONS = 100_000
STEMS = ([1, 2, 0, 1, 2, 2, 1, 0, 0], [1, 2, 0, 2, 2, 2, 2, 2, 2], [0] * 9)  # begin alike, so that prefixes hit


class Driver:
    """Operations on a bench that are valid at any time."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.in_flight: Step | None = None
        self.counts = dict.fromkeys(("finished", "aborted", "forked", "failed", "refused"), 0)

    def add(self, stem: int, length: int, max_tokens: int, tenant: str, priority: int, no_lookup: bool) -> None:
        prompt = (STEMS[stem] + [stem, 2 - stem] * length)[:length]
        try:
            self.bench.add(prompt, max_tokens, tenant=tenant, priority=priority, no_lookup=no_lookup)
        except (RequestTooLong, QueueFull):
            del self.bench.sequences[len(self.bench.sequences) - 1]
            self.counts["refused"] += 1

    def begin_step(self) -> None:
        self.in_flight = self.bench.scheduler.schedule()

    def end_step(self, ends: set[int]) -> None:
        """Take in the output of the step; the engine stops the rows at the positions `ends`."""
        assert self.in_flight is not None
        output = self.bench.compute(self.in_flight)
        stopped = {row.sequence: "stop" for index, row in enumerate(self.in_flight.rows) if index in ends}
        step, self.in_flight = self.in_flight, None
        ended = self.bench.scheduler.postprocess(step, replace(output, finished=stopped))
        self.counts["finished"] += len(ended)

    def abandon(self) -> None:
        self.in_flight = None
        self.counts["failed"] += len(self.bench.scheduler.abandon())

    def alive(self) -> list[int]:
        return [s.id for s in (*self.bench.scheduler.running, *self.bench.scheduler.policy)]

    def abort(self, index: int) -> None:
        alive = self.alive()
        self.bench.scheduler.abort(alive[index % len(alive)])
        self.counts["aborted"] += 1

    def fork(self, index: int, last: int | None, fresh: bool) -> None:
        """Fork somebody alive; the child may have chosen its last token, if the parent has one, or none at all."""
        alive = self.alive()
        parent = self.bench.sequences[alive[index % len(alive)]]
        self.bench.fork(parent, last=None if fresh or not parent.generated else last, fresh=fresh)
        self.counts["forked"] += 1


def random_operation(driver: Driver, rng: random.Random) -> None:
    dice = rng.random()
    if driver.in_flight is not None:
        if dice < 0.9:
            driver.end_step({index for index in range(4) if rng.random() < 0.05})
        elif dice < 0.98 and driver.alive():
            driver.abort(rng.randrange(100))
        elif dice > 0.995:
            driver.abandon()
    elif dice < 0.70 and driver.alive():
        driver.begin_step()
    elif dice < 0.92 or not driver.alive():
        driver.add(
            rng.randrange(3), rng.randint(1, 14), rng.randint(0, 10), rng.choice("ab"), rng.randrange(3),
            rng.random() < 0.1,
        )  # fmt: skip
    elif dice < 0.97:
        driver.fork(rng.randrange(100), rng.choice([None, 0, 1]), rng.random() < 0.3)
    else:
        driver.abort(rng.randrange(100))


def drive(operations: int, seed: int, bench: Bench) -> Driver:
    rng, driver = random.Random(seed), Driver(bench)
    for _ in range(operations):
        random_operation(driver, rng)
        bench.check()
    return driver


CASES = [
    (policy, chunked, prefix_cache, page_tokens)
    for policy, chunked, prefix_cache in product(POLICIES, (True, False), (True, False))
    for page_tokens in (1, 3, 4)
]


def test_random_schedules_keep_every_page_accounted_for() -> None:
    totals: dict[str, int] = dict.fromkeys(("operations", "preemptions", "hits", "evictions", "copies"), 0)
    rounds, each = 12, 250
    assert len(CASES) * rounds * each >= OPERATIONS
    for seed, (policy, chunked, prefix_cache, page_tokens) in enumerate(CASES * rounds):
        scheduling = SchedulerSettings(
            token_budget=4 + seed % 9, max_sequences=1 + seed % 6, max_queue=5, policy=policy, chunked_prefill=chunked,
            prefix_cache=prefix_cache, headroom_tokens=seed % 5,
        )  # fmt: skip
        bench = Bench(24 // page_tokens, page_tokens, max_length=22, settings=scheduling)
        driver = drive(each, seed, bench)
        counts = bench.pool.statistics
        found = driver.counts | {
            "operations": each, "preemptions": bench.scheduler.preemptions, "hits": counts.hits,
            "evictions": counts.evictions, "copies": sum(len(step.copies) for step in bench.steps),
        }  # fmt: skip
        totals = {name: totals.get(name, 0) + number for name, number in found.items()}
    assert totals["operations"] >= OPERATIONS
    # The walk is worth nothing unless it went everywhere.
    assert all(number > 100 for number in totals.values()), totals


class Schedules(RuleBasedStateMachine):
    """The same operations, in any order that hypothesis thinks of."""

    @initialize(
        pages=st.integers(3, 10), page_tokens=st.integers(1, 4), budget=st.integers(1, 12), most=st.integers(1, 5),
        policy=st.sampled_from(POLICIES), chunked=st.booleans(), prefix_cache=st.booleans(), headroom=st.integers(0, 6),
    )  # fmt: skip
    def begin(self, pages, page_tokens, budget, most, policy, chunked, prefix_cache, headroom) -> None:
        scheduling = SchedulerSettings(
            token_budget=budget, max_sequences=most, max_queue=4, policy=policy, chunked_prefill=chunked,
            prefix_cache=prefix_cache, headroom_tokens=headroom,
        )  # fmt: skip
        self.driver = Driver(Bench(pages, page_tokens, max_length=20, settings=scheduling))

    @rule(
        stem=st.integers(0, 2), length=st.integers(1, 12), max_tokens=st.integers(0, 9), tenant=st.sampled_from("ab"),
        priority=st.integers(0, 2), no_lookup=st.booleans(),
    )  # fmt: skip
    def add(self, stem, length, max_tokens, tenant, priority, no_lookup) -> None:
        self.driver.add(stem, length, max_tokens, tenant, priority, no_lookup)

    @precondition(lambda self: self.driver.in_flight is None)
    @rule()
    def begin_step(self) -> None:
        work = self.driver.bench.scheduler.has_work
        self.driver.begin_step()
        assert (self.driver.in_flight is not None) == work  # never idle while there is work

    @precondition(lambda self: self.driver.in_flight is not None)
    @rule(ends=st.sets(st.integers(0, 4), max_size=2))
    def end_step(self, ends) -> None:
        self.driver.end_step(ends)

    @precondition(lambda self: self.driver.alive())
    @rule(index=st.integers(0, 10))
    def abort(self, index) -> None:
        self.driver.abort(index)

    @precondition(lambda self: self.driver.in_flight is None and self.driver.alive())
    @rule(index=st.integers(0, 10), last=st.sampled_from([None, 0, 1]), fresh=st.booleans())
    def fork(self, index, last, fresh) -> None:
        self.driver.fork(index, last, fresh)

    @precondition(lambda self: self.driver.in_flight is not None)
    @rule()
    def abandon(self) -> None:
        self.driver.abandon()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if hasattr(self, "driver"):
            self.driver.bench.check()

    def teardown(self) -> None:
        """Whatever has happened, all that is left can be served, and then every page can be had."""
        if hasattr(self, "driver"):
            if self.driver.in_flight is not None:
                self.driver.end_step(set())
            bench = self.driver.bench
            bench.run()
            assert all(sequence.status == "finished" for sequence in bench.sequences.values())
            assert bench.pool.available == bench.pool.pages
            assert not any(bench.scheduler.meter._promised.values())


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("seed", range(12))
def test_tokens_do_not_depend_on_how_they_are_scheduled(seed: int) -> None:
    """Greedy tokens of the bench's model, with each of chunking, prefix cache, preemption and batching on and off."""
    rng = random.Random(seed)
    requests = [((STEMS[rng.randrange(3)] * 2)[: rng.randint(1, 16)], rng.randint(1, 8)) for _ in range(8)]
    outcomes, preempted = [], 0
    for chunked, prefix_cache, pages, most in product((True, False), (True, False), (200, 7), (8, 1)):
        scheduling = SchedulerSettings(
            token_budget=8, max_sequences=most, chunked_prefill=chunked, prefix_cache=prefix_cache, headroom_tokens=0
        )
        bench = Bench(pages, 4, settings=scheduling)
        for prompt, max_tokens in requests:
            bench.add(prompt, max_tokens)
        outcomes.append(bench.run())
        preempted += bench.scheduler.preemptions
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert preempted > 0
