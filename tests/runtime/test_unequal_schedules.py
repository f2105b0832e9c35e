"""Random schedules where layers and heads keep unequal numbers of slots: no sub-page is lost, and what is stored
follows from tokens and policy alone.

`python -m tests.runtime.test_unequal_schedules 160` walks further than a test has time for.
"""

from __future__ import annotations

import random
import sys
from functools import partial

from kv_compress.eviction import Budget, EvictionSettings
from runtime.policies import POLICIES
from runtime.scheduler import SchedulerSettings
from tests.runtime._schedules import EVERYWHERE, most, scheduled_otherwise
from tests.runtime.group_bench import GroupBench
from tests.runtime.test_random_schedules import STEMS, drive

EACH = 250


def some_eviction(rng: random.Random) -> EvictionSettings:
    sinks, recent = rng.randint(0, 2), rng.randint(1, 3)
    budget = Budget(tokens=sinks + recent + rng.randint(0, 4)) if rng.random() < 0.7 else Budget(ratio=0.6)
    when = rng.choice([EVERYWHERE, EVERYWHERE, ("prefill_end", "decode"), ("prefill_end",), ("decode",)])
    method, more = rng.choice(["adakv", "adakv", "pyramidkv"]), {}
    if when != ("prefill_end",):
        more["every"] = rng.randint(1, 6)
    if method == "pyramidkv":
        more["beta"] = rng.choice([1.5, 20])
    return EvictionSettings(method=method, budget=budget, sinks=sinks, recent=recent, when=when, **more)


def walk(rounds: int) -> dict[str, int]:
    """Rounds of random operations, each with its own settings."""
    totals: dict[str, int] = {}
    for seed in range(rounds):
        rng = random.Random(seed)
        page_tokens = rng.choice([1, 2, 3, 4])
        scheduling = SchedulerSettings(
            token_budget=rng.randint(4, 12), max_sequences=rng.randint(1, 6), max_queue=5,
            policy=rng.choice(POLICIES), chunked_prefill=rng.random() < 0.7, prefix_cache=rng.random() < 0.7,
            headroom_tokens=rng.randrange(5),
        )  # fmt: skip
        pages = rng.choice([16, 20, 28]) // page_tokens
        bench = GroupBench(pages, page_tokens, max_length=26, settings=scheduling, eviction=some_eviction(rng))
        driver = drive(EACH, seed, bench)
        counts = bench.pool.statistics
        done = [(done, step) for step in bench.steps for done in step.compressions]
        found = driver.counts | {
            "operations": EACH, "preemptions": bench.scheduler.preemptions, "hits": counts.hits,
            "copies": sum(len(step.copies) for step in bench.steps), "evictions": len(done),
            "first evictions": sum(bool(each.source) for each, _ in done),
            "chunks of the seated": sum(row.seat >= 0 and len(row.tokens) > 1 for _, s in done for row in s.rows),
            "decodes of the seated": sum(row.seat >= 0 for step in bench.steps for row in step.rows),
        }  # fmt: skip
        totals = {name: totals.get(name, 0) + number for name, number in found.items()}
    return totals


def test_random_schedules_with_unequal_evictions() -> None:
    totals = walk(24)
    assert all(number > 4 for number in totals.values()), totals


def bench_of(eviction: EvictionSettings, pages: int, scheduling: SchedulerSettings) -> GroupBench:
    return GroupBench(pages, 4, settings=scheduling, eviction=eviction)


def test_tokens_do_not_depend_on_how_they_are_scheduled() -> None:
    """Chunking, prefix cache, preemption and batching on and off."""
    preempted = hits = 0
    for seed in (0, 3):
        rng = random.Random(seed)
        eviction = EvictionSettings(
            method=("adakv", "pyramidkv")[seed // 2], budget=Budget(tokens=6), sinks=1, recent=rng.randint(1, 4),
            every=rng.randint(3, 6), when=EVERYWHERE if seed % 2 else ("prefill_end", "decode"),
        )  # fmt: skip
        requests = [((STEMS[rng.randrange(3)] * 2)[: rng.randint(1, 16)], rng.randint(1, 12)) for _ in range(8)]
        benches = scheduled_otherwise(partial(bench_of, eviction), requests, (2, 100), (200, 6))
        preempted += sum(bench.scheduler.preemptions for bench in benches)
        hits += sum(bench.pool.statistics.hits for bench in benches)
    assert preempted > 10 and hits > 10


def test_what_is_simulated_needs_no_model() -> None:
    """Then heads share a layer's budget equally: sequences that a pool holds, and what long prompts own."""
    quarter = EvictionSettings(method="pyramidkv", budget=Budget(tokens=112), every=16)
    assert most([448] * 48, 8 * 32, quarter)[0] >= 24
    eviction = EvictionSettings(method="adakv", budget=Budget(tokens=512), every=512, when=EVERYWHERE)
    wasted = 1  # page, that unequal counts might
    assert {most([length], 70, eviction)[1] for length in (2048, 16384, 65536)} == {(512 + 512) // 16 + wasted}


if __name__ == "__main__":
    print(walk(int(sys.argv[1])))
