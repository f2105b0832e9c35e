"""Traces: what is recorded is replayed, and what differs is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compress.core.errors import InputError, UsageError
from kv_compress.eviction import Budget, EvictionSettings
from runtime.scheduler import Scheduler, SchedulerSettings
from runtime.trace import Recorder, TraceMismatch, replay
from tests.runtime.bench import Bench
from tests.runtime.group_bench import GroupBench

EVICTION = EvictionSettings(budget=Budget(tokens=4), sinks=1, recent=2, every=3, method="random")
UNEQUAL = EVICTION.model_copy(update={"method": "adakv"})


def record(path: Path, eviction: EvictionSettings | None = None) -> Bench:
    """A run with everything in it: two tenants, preemptions, a fork, an abort, a stop and a step that failed."""
    scheduling = SchedulerSettings(policy="vtc", tenant_weights={"a": 2.0}, token_budget=12, headroom_tokens=0)
    kind = GroupBench if eviction and eviction.is_unequal else Bench
    bench = kind(pages=6, settings=scheduling, eviction=eviction)
    points = bench.scheduler.points
    with Recorder(path) as recorder:
        bench.scheduler = Scheduler(
            bench.pool, scheduling, max_length=40, clock=lambda: 0.5, recorder=recorder, points=points
        )
        parent = bench.add([1, 2, 0, 1, 2, 2], 6, tenant="a")
        bench.step()
        bench.fork(parent, last=2)
        for tenant in "ab":
            bench.add([1, 2, 0, 1, 2, 2], 6, tenant=tenant)
        for _ in range(3):
            bench.step()
        bench.scheduler.abort(2)
        step = bench.scheduler.schedule()
        bench.scheduler.postprocess(step, replace(bench.compute(step), finished={0: "stop"}))
        bench.run()
        bench.add(3, 2)
        bench.scheduler.schedule()
        bench.scheduler.abandon()
    assert bench.evictions if eviction else bench.scheduler.preemptions
    assert eviction or any(step.copies for step in bench.steps)
    return bench


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    record(tmp_path / "trace.jsonl")
    return tmp_path / "trace.jsonl"


def rewrite(trace: Path, kind: str, **changes: object) -> int:
    """Change the last line of this kind; returns its number."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    number = max(index for index, line in enumerate(lines) if line["kind"] == kind)
    lines[number] |= changes
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return number + 1


@pytest.mark.parametrize("eviction", [None, EVICTION, UNEQUAL])
def test_a_replay_makes_the_same_steps(tmp_path: Path, eviction: EvictionSettings | None) -> None:
    bench = record(tmp_path / "trace.jsonl", eviction)
    made = list(replay(tmp_path / "trace.jsonl"))
    assert [step for _, step in made[:-1]] == bench.steps
    scheduler = made[-1][0]
    scheduler.check_integrity()
    assert scheduler.pool.statistics == bench.pool.statistics
    assert scheduler.preemptions == bench.scheduler.preemptions
    assert scheduler.meter.service == bench.scheduler.meter.service


def test_a_replay_can_be_looked_into_step_by_step(trace: Path) -> None:
    running = []
    for scheduler, _ in replay(trace):
        scheduler.check_integrity()
        running.append(len(scheduler.running))
    assert running[:2] == [1, 4]


def test_another_decision_is_named_with_its_line(trace: Path) -> None:
    number = rewrite(trace, "step", copies=[[1, 2]])
    with pytest.raises(TraceMismatch, match=rf"trace.jsonl:{number}: the replay differs: .*copies"):
        list(replay(trace))


def test_another_answer_leads_to_another_step(trace: Path) -> None:
    lines = trace.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if '"output"' in line)
    lines[first] = lines[first].replace('"tokens":[[0,', '"tokens":[[0,7')
    trace.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="does not begin like|differs"):
        list(replay(trace))


def test_a_torn_end_is_passed_over(trace: Path) -> None:
    steps = len(list(replay(trace)))
    text = trace.read_text()
    trace.write_text(text[: text.rindex('{"kind":"step"') + 30])
    assert len(list(replay(trace))) == steps - 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{}", "not understood"),
        ("nonsense", "not JSON"),
        ("[1]", "not understood"),
        ('{"kind": "add", "sequence": {}}', "not understood"),
        ('{"kind": "output", "tokens": [], "finished": []}', "cannot come here"),
        ('{"kind": "dance"}', "cannot come here"),
    ],
)
def test_a_broken_line_is_named(trace: Path, line: str, complaint: str) -> None:
    first = trace.read_text().splitlines()[0]
    trace.write_text(f"{first}\n{line}\n")
    with pytest.raises(InputError, match=rf"trace.jsonl:2: .*{complaint}"):
        list(replay(trace))


def test_a_trace_without_a_beginning_is_refused(trace: Path) -> None:
    trace.write_text(trace.read_text().split("\n", 1)[1])
    with pytest.raises(InputError, match="trace.jsonl:1: .*does not begin with"):
        list(replay(trace))


def test_another_version_is_refused(trace: Path) -> None:
    rewrite(trace, "start", version=9)
    with pytest.raises(InputError, match="version 9"):
        list(replay(trace))


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.jsonl: there is no such trace"):
        list(replay(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UsageError, match="new: there is no such folder"):
        Recorder(tmp_path / "new" / "trace.jsonl")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file: there is no such folder"):
        Recorder(tmp_path / "file" / "trace.jsonl")
