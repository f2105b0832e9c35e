"""Random schedules where whole pages are coded: no frame is lost, and every row reads just what its position says.

`python -m tests.runtime.test_coded_frame_schedules 400` walks further than a test has time for.
"""

from __future__ import annotations

import random
import sys
from dataclasses import astuple
from functools import partial
from hashlib import blake2b

from kv_compress._coded_pages import CodingPoints
from runtime.policies import POLICIES
from runtime.scheduler import Scheduler, SchedulerSettings, Step, StepOutput
from runtime.step import Recoding
from tests.runtime._schedules import scheduled_otherwise
from tests.runtime.bench import Bench
from tests.runtime.test_random_schedules import STEMS, drive

EACH = 250


class CodedBench(Bench):
    """Frames hold a list of slots, or a coded block, which is a tuple of them."""

    def __init__(self, pages: int, points: CodingPoints, max_length: int, settings: SchedulerSettings) -> None:
        super().__init__(pages, points.block, max_length=max_length, settings=settings)
        self.points, self.recodings = points, 0
        self.scheduler = Scheduler(
            self.pool, settings, max_length=max_length, clock=lambda: float(len(self.sequences)), points=points
        )

    def compute(self, step: Step) -> StepOutput:
        done = [each for each in step.compressions if isinstance(each, Recoding)]
        for source, _ in step.copies:
            assert isinstance(self.memory[source], list)
        for row in step.rows:  # what was a coded page may be a full one now
            for frame in row.table[row.kv_len // self.points.block :]:
                if isinstance(self.memory[frame], tuple):
                    self.memory[frame] = [None] * self.points.block
        output = super().compute(step if not done else Step(step.index, step.rows, step.copies))
        self.steps[-1] = step
        rows = {row.sequence: row for row in step.rows}
        for each in done:
            row = rows[each.sequence]
            sequence, end = self.sequences[row.sequence], row.start + len(row.tokens)
            last = end - self.points.recent
            block = tuple((sequence.tenant, at, sequence.tokens[at]) for at in range(last - self.points.every, last))
            assert tuple(slot for frame in each.source for slot in self.memory[frame]) == block
            size = self.points.page_tokens
            for index, frame in enumerate(each.target):
                self.memory[frame] = block[index * size : (index + 1) * size]
            assert len(each.target) * size == len(block)
            self.recodings += 1
        return output

    def _next_token(self, row) -> int:
        """As many blocks are coded as had `recent` tokens behind them when the row began."""
        sequence, (block, page, sinks, recent, _, together) = self.sequences[row.sequence], astuple(self.points)
        coded = 0
        while sinks + (coded + together) * page + recent <= row.start:
            coded += together
        end = row.start + len(row.tokens)
        tokens = [(sequence.tenant, at, token) for at, token in enumerate(sequence.tokens[:end])]
        wanted: list = [tokens[at : at + block] for at in range(0, min(sinks, end), block)]
        wanted += [tuple(tokens[sinks + at * page : sinks + (at + 1) * page]) for at in range(coded)]
        if end > sinks:
            wanted += [tokens[at : at + block] for at in range(sinks + coded * page, end, block)]
        frames = [self.memory[frame] for frame in row.table]
        assert [frame[: len(each)] for frame, each in zip(frames, wanted, strict=True)] == wanted
        return blake2b(repr(tokens).encode(), digest_size=4).digest()[0] % self.vocabulary


def some_points(rng: random.Random) -> CodingPoints:
    block = rng.choice([1, 2, 3])
    sinks, recent = block * rng.randint(0, 2), rng.randint(0, 4)
    if block == 2 and rng.random() < 0.5:
        return CodingPoints(2, 3, sinks, recent, "salt", 2)
    return CodingPoints(block, block * rng.randint(2, 3), sinks, recent, "salt")


def walk(rounds: int) -> dict[str, int]:
    """Rounds of random operations, each with its own settings."""
    totals: dict[str, int] = {}
    for seed in range(rounds):
        rng = random.Random(seed)
        points = some_points(rng)
        scheduling = SchedulerSettings(
            token_budget=rng.randint(4, 12), max_sequences=rng.randint(1, 6), max_queue=5,
            policy=rng.choice(POLICIES), chunked_prefill=rng.random() < 0.7, prefix_cache=rng.random() < 0.7,
            headroom_tokens=rng.randrange(5),
        )  # fmt: skip
        bench = CodedBench(rng.choice([14, 18, 26]) // points.block, points, 26, scheduling)
        driver = drive(EACH, seed, bench)
        counts = bench.pool.statistics
        firsts = {row.sequence: row for step in reversed(bench.steps) for row in step.rows}
        found = driver.counts | {
            "operations": EACH, "preemptions": bench.scheduler.preemptions, "hits": counts.hits,
            "pool evictions": counts.evictions, "copies": sum(len(step.copies) for step in bench.steps),
            "recodings": bench.recodings,
            "coded hits": sum(row.start > points.position(1) for row in firsts.values()),
            "in place": sum(
                not {*done.source}.isdisjoint(done.target) for step in bench.steps for done in step.compressions
            ),
        }  # fmt: skip
        totals = {name: totals.get(name, 0) + number for name, number in found.items()}
    return totals


def test_random_schedules_with_coded_pages() -> None:
    totals = walk(40)
    assert all(number > 20 for number in totals.values()), totals


def bench_of(points: CodingPoints, pages: int, scheduling: SchedulerSettings) -> CodedBench:
    return CodedBench(pages, points, 40, scheduling)


def test_tokens_do_not_depend_on_how_they_are_scheduled() -> None:
    """Chunking, prefix cache, preemption and batching on and off."""
    preempted = hits = recoded = 0
    for seed in range(4):
        rng = random.Random(seed)
        size, together = rng.choice([(4, 1), (6, 1), (3, 2)])
        points = CodingPoints(2, size, 2 * rng.randint(0, 1), rng.randint(0, 3), "salt", together)
        requests = [((STEMS[rng.randrange(3)] * 2)[: rng.randint(1, 16)], rng.randint(1, 12)) for _ in range(8)]
        benches = scheduled_otherwise(partial(bench_of, points), requests, (3, 100), (200, 11))
        preempted += sum(bench.scheduler.preemptions for bench in benches)
        hits += sum(bench.pool.statistics.hits for bench in benches)
        recoded += sum(bench.recodings for bench in benches)
    assert preempted > 20 and hits > 20 and recoded > 200


if __name__ == "__main__":
    print(walk(int(sys.argv[1])))
