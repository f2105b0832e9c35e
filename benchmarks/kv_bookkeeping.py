"""What tables for each layer and head cost the scheduler: one step of decodes, on virtual time, without a model.

    python benchmarks/kv_bookkeeping.py

--sequences sequences of --layers layers with --heads key-value heads decode at once, at unequal numbers of slots (drawn
by lot within a layer's budget of --budget slots a head), pages of --page tokens. Timed: `schedule` and `postprocess` of
one step; of that, what the tables take (room for a token in each, lengths); and the same steps of sequences that keep
all, which have one table each. Beside it, the numbers that attention is given: where each new key goes, and each
table. Medians over --steps steps, which have every offset in a page; the slowest step, too. One eviction is timed
alone: what follows when a sequence comes to its first point. All is CPU time of the process.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tools

from kv_compress._budget import Points
from kv_compress.eviction import Budget, EvictionSettings
from runtime.blocks import BlockPool
from runtime.groups import GroupPool
from runtime.page import PageType
from runtime.scheduler import Scheduler, SchedulerSettings, Step, StepOutput
from runtime.sequence import Sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "kv-bookkeeping.json")
    asked = parser.parse_args()
    load = tools.describe_machine()
    eviction = EvictionSettings(method="adakv", budget=Budget(tokens=asked.budget), when=("prefill_end",))
    unequal = eviction.points(1, asked.layers, asked.heads)
    result = {
        "environment": load,
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "settings": {name: value for name, value in vars(asked).items() if name != "out"},
        "unequal": steps(asked, unequal),
        "whole_pages": steps(asked, None),
    }
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def steps(asked: argparse.Namespace, points: Points | None) -> dict:
    """Milliseconds of a step's parts."""
    prompt = 2 * asked.budget
    pages = asked.sequences * (-(-(prompt + asked.steps) // asked.page) + 2)
    pool = BlockPool(pages, PageType("none", 1, asked.page), prefix_cache=False)
    settings = SchedulerSettings(
        token_budget=prompt * asked.sequences, max_sequences=asked.sequences, max_queue=asked.sequences
    )
    scheduler = Scheduler(pool, settings, max_length=1 << 20, points=points)
    for id in range(asked.sequences):
        scheduler.add(Sequence(id, str(id), [id] * prompt, asked.steps + 1))
    rng, groups = random.Random(0), pool.groups
    first = scheduled(scheduler)
    counts = {done.sequence: drawn(rng, done.budgets, asked.heads) for done in first.compressions}
    started = time.process_time()
    scheduler.postprocess(first, output(first, counts))
    found: dict[str, list[float]] = {"schedule": [], "postprocess": []}
    evictions_ms = (time.process_time() - started) * 1e3 / asked.sequences
    if groups is not None:
        found |= {"tables": [], "attention": []}
        timed(found["tables"], groups, ("grow", "stored"))
    for _ in range(asked.steps - 1):
        if groups is not None:
            found["tables"].append(0.0)
        begin = time.process_time()
        step = scheduled(scheduler)
        middle = time.process_time()
        found["schedule"].append((middle - begin) * 1e3)
        if groups is not None:
            found["attention"].append(attention(step, groups))
        begin, answer = time.process_time(), output(step, {})
        scheduler.postprocess(step, answer)
        found["postprocess"].append((time.process_time() - begin) * 1e3)
    scheduler.check_integrity()
    both = [a + b for a, b in zip(found["schedule"], found["postprocess"], strict=True)]
    summary = {f"{name}_ms": round(statistics.median(of), 3) for name, of in found.items()}
    summary |= {"step_ms": round(statistics.median(both), 3), "slowest_step_ms": round(max(both), 3)}
    if groups is not None:
        summary["slowest_tables_ms"] = round(max(found["tables"]), 3)
        summary["first_eviction_ms"] = round(evictions_ms, 3)
    return summary


def scheduled(scheduler: Scheduler) -> Step:
    """The next step, in which everybody is."""
    step = scheduler.schedule()
    if step is None or len(step.rows) < len(scheduler.running):
        raise RuntimeError("the pool is too small for all sequences")
    return step


def output(step: Step, counts: dict[int, tuple[int, ...]]) -> StepOutput:
    """A token for everybody."""
    return StepOutput({row.sequence: 7 for row in step.rows if row.samples}, counts=counts)


def drawn(rng: random.Random, budgets: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """Slots of each head that make up each layer's budget: up to a half more or less."""
    found: list[int] = []
    for budget in budgets:
        shift = [rng.randint(-budget // 16, budget // 16) for _ in range(heads)]
        shift[-1] -= sum(shift)
        found += [budget + by for by in shift]
    return tuple(found)


def timed(into: list[float], owner: object, names: tuple[str, ...]) -> None:
    """Let methods add their milliseconds to the last number of `into`."""
    for name in names:
        setattr(owner, name, _timed(into, getattr(owner, name)))


def _timed(into: list[float], function: Callable) -> Callable:
    def run(*given: object) -> object:
        started = time.process_time()
        try:
            return function(*given)
        finally:
            into[-1] += (time.process_time() - started) * 1e3

    return run


def attention(step: Step, groups: GroupPool) -> float:
    """Milliseconds of what all layers' attention is given."""
    from runtime.ops.head_batch import Seated

    seats, counts = np.array([row.seat for row in step.rows]), np.ones(len(step.rows), dtype=np.int64)
    started = time.process_time()
    tokens = Seated(seats, counts, np.arange(len(seats)), groups, groups.page_tokens, "cpu", few=True)
    for layer in range(groups.layers):
        tokens.layer(layer)
    return (time.process_time() - started) * 1e3


if __name__ == "__main__":
    main()
