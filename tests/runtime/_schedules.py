"""Schedules that several policies are put through: the same requests under every way to schedule, and virtual time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TypeVar

from kv_compress.eviction import EvictionSettings
from runtime.blocks import BlockPool
from runtime.page import PageType
from runtime.scheduler import SchedulerSettings, Step
from runtime.simulator import Arrival, Simulator, StepTime
from tests.runtime.bench import Bench

AnyBench = TypeVar("AnyBench", bound=Bench)
EVERYWHERE = ("prefill_chunk", "prefill_end", "decode")


def scheduled_otherwise(
    make: Callable[[int, SchedulerSettings], AnyBench],
    requests: list[tuple[list[int], int]],
    budgets: tuple[int, int],
    pools: tuple[int, int],
) -> list[AnyBench]:
    """Asserts that (prompt, max_tokens) come out the same with chunks or none, the prefix cache on and off, many pages
    and few, all at once and one by one; gives the benches, which `make(pages, settings)` has made."""
    benches, outcomes = [], []
    for budget, prefix_cache, pages, at_once in product(budgets, (True, False), pools, (8, 1)):
        scheduling = SchedulerSettings(
            token_budget=budget, max_sequences=at_once, prefix_cache=prefix_cache, headroom_tokens=0
        )
        benches.append(bench := make(pages, scheduling))
        for prompt, max_tokens in requests:
            bench.add(prompt, max_tokens)
        outcomes.append(bench.run())
        assert bench.pool.available == pages
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return benches


def most(prompts: list[int], pages: int, eviction: EvictionSettings | None) -> tuple[int, int]:
    """The most sequences that run at a time, and the most pages they own, on virtual time."""
    pool = BlockPool(pages, PageType("float32", 16 * 512, 16), prefix_cache=False)
    running, owned = [], []

    def watch(simulator: Simulator, step: Step) -> None:
        running.append(len(simulator.scheduler.running))
        owned.append(pool.statistics.owned)

    points = None if eviction is None else eviction.points(512, layers=4, heads=2)
    simulator = Simulator(pool, SchedulerSettings(), StepTime(1.0), max_length=1 << 20, points=points, watch=watch)
    simulator.run([Arrival(0, prompt, 64) for prompt in prompts])
    return max(running), max(owned)
