"""Random schedules with evictions: no page is lost, and what is stored follows from tokens and policy alone.

`python -m tests.runtime.test_eviction_schedules 600` walks further than a test has time for.
"""

from __future__ import annotations

import random
import sys
from functools import partial

from kv_compress.eviction import Budget, EvictionSettings
from runtime.policies import POLICIES
from runtime.scheduler import SchedulerSettings
from tests.runtime._schedules import EVERYWHERE, most, scheduled_otherwise
from tests.runtime.bench import Bench
from tests.runtime.test_random_schedules import STEMS, drive

EACH = 250


def some_eviction(rng: random.Random) -> EvictionSettings:
    sinks, recent = rng.randint(0, 2), rng.randint(1, 3)
    budget = Budget(tokens=sinks + recent + rng.randint(0, 3)) if rng.random() < 0.7 else Budget(ratio=0.5)
    when = rng.choice([EVERYWHERE, EVERYWHERE, ("prefill_end", "decode"), ("prefill_end",), ("decode",)])
    method = rng.choice(["snapkv", "streaming", "h2o"])
    every = {"every": rng.randint(1, 6)} if when != ("prefill_end",) else {}
    return EvictionSettings(method=method, budget=budget, sinks=sinks, recent=recent, when=when, **every)


def walk(rounds: int) -> dict[str, int]:
    """Rounds of random operations, each with its own settings."""
    names = ("operations", "preemptions", "hits", "pool evictions", "copies", "evictions", "compressed hits", "moved")
    totals = dict.fromkeys(names, 0)
    for seed in range(rounds):
        rng = random.Random(seed)
        page_tokens = rng.choice([1, 2, 3, 4])
        scheduling = SchedulerSettings(
            token_budget=rng.randint(4, 12), max_sequences=rng.randint(1, 6), max_queue=5,
            policy=rng.choice(POLICIES), chunked_prefill=rng.random() < 0.7, prefix_cache=rng.random() < 0.7,
            headroom_tokens=rng.randrange(5),
        )  # fmt: skip
        pages = rng.choice([12, 16, 24]) // page_tokens
        bench = Bench(pages, page_tokens, max_length=26, settings=scheduling, eviction=some_eviction(rng))
        driver = drive(EACH, seed, bench)
        counts = bench.pool.statistics
        rows = [row for step in bench.steps for row in step.rows]
        found = driver.counts | {
            "operations": EACH, "preemptions": bench.scheduler.preemptions, "hits": counts.hits,
            "pool evictions": counts.evictions, "copies": sum(len(step.copies) for step in bench.steps),
            "evictions": bench.evictions,
            "compressed hits": sum(_is_first(row, bench) and row.kv_len < row.start for row in rows),
            "moved": sum(done.source[0] != done.target[0] for step in bench.steps for done in step.compressions),
        }  # fmt: skip
        totals = {name: totals.get(name, 0) + number for name, number in found.items()}
    return totals


def _is_first(row, bench: Bench) -> bool:
    """Whether the row is the first of its sequence, which begins on what the prefix cache had."""
    firsts = bench.__dict__.setdefault("firsts", {})
    return firsts.setdefault(row.sequence, row) is row and row.start > 0


def test_random_schedules_with_evictions() -> None:
    totals = walk(80)
    assert all(number > 20 for number in totals.values()), totals


def bench_of(eviction: EvictionSettings, pages: int, scheduling: SchedulerSettings) -> Bench:
    return Bench(pages, 4, settings=scheduling, eviction=eviction)


def test_tokens_do_not_depend_on_how_they_are_scheduled() -> None:
    """Chunking, prefix cache, preemption and batching on and off; chunks smaller than what is observed, too."""
    preempted = hits = 0
    for seed in range(8):
        rng = random.Random(seed)
        eviction = EvictionSettings(
            method="snapkv", budget=Budget(tokens=6), sinks=1, recent=rng.randint(1, 5), every=rng.randint(2, 6),
            when=EVERYWHERE if seed % 2 else ("prefill_end", "decode"),
        )  # fmt: skip
        requests = [((STEMS[rng.randrange(3)] * 2)[: rng.randint(1, 16)], rng.randint(1, 12)) for _ in range(8)]
        benches = scheduled_otherwise(partial(bench_of, eviction), requests, (2, 100), (200, 5))
        preempted += sum(bench.scheduler.preemptions for bench in benches)
        hits += sum(bench.pool.statistics.hits for bench in benches)
    assert preempted > 20 and hits > 20


def test_a_pool_holds_three_times_the_sequences_at_a_quarter() -> None:
    quarter = EvictionSettings(budget=Budget(tokens=112), every=16)
    assert most([448] * 48, 8 * 32, None)[0] == 8
    assert most([448] * 48, 8 * 32, quarter)[0] >= 24


def test_long_prompts_own_budget_and_chunk() -> None:
    eviction = EvictionSettings(method="keydiff", budget=Budget(tokens=512), every=512, when=EVERYWHERE)
    assert {most([length], 70, eviction)[1] for length in (2048, 16384, 65536)} == {(512 + 512) // 16}


if __name__ == "__main__":
    print(walk(int(sys.argv[1])))
