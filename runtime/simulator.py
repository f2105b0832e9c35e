"""The scheduler and pool on virtual time: what a step takes comes from a model of it, and no tokens are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from kv_compress._budget import Points
from kv_compress._coded_pages import CodingPoints
from runtime.blocks import BlockPool
from runtime.scheduler import Scheduler, SchedulerSettings, Step, StepOutput
from runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: a base (weights are read, kernels started), per token computed, per stored slot read."""

    base_s: float
    token_s: float = 0.0
    slot_s: float = 0.0

    def seconds(self, step: Step) -> float:
        """What this step takes."""
        tokens = sum(len(row.tokens) for row in step.rows)
        slots = sum(row.kv_len + len(row.tokens) for row in step.rows)
        return self.base_s + self.token_s * tokens + self.slot_s * slots

    def token_budget(self, decodes: int, slots: int, prompt: int, factor: float) -> int:
        """Largest budget with which a step takes at most `factor` times one of `decodes` decodes that read `slots`
        slots, while it also reads on in a prompt of `prompt` tokens."""
        decode_s = self.base_s + self.token_s * decodes + self.slot_s * slots
        return decodes + max(int(((factor - 1) * decode_s - self.slot_s * prompt) / self.token_s), 1)

    @classmethod
    def fit(cls, samples: Iterable[tuple[int, int, float]]) -> StepTime:
        """From measured (tokens, slots, seconds), by least squares of the relative error; no term below zero."""
        tokens, slots, seconds = np.array(list(samples), dtype=float).T
        terms = np.stack([np.ones_like(tokens), tokens, slots]) / seconds
        kept = np.ones(len(terms), dtype=bool)
        found = np.zeros(len(terms))
        while True:
            solved, *_ = np.linalg.lstsq(terms[kept].T, np.ones_like(seconds), rcond=None)
            if (solved >= 0).all():
                break
            kept[np.flatnonzero(kept)[solved.argmin()]] = False
        found[kept] = solved
        return cls(*found.tolist())


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes at `time`. `prompt` may be given for its own sake, to share prefixes with others."""

    time: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    priority: int = 0
    prompt: tuple[int, ...] | None = None


@dataclass(slots=True)
class Served:
    """What became of an arrival: the times at which its tokens came."""

    arrival: Arrival
    token_times: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class Simulator:
    """One scheduler, driven by arrivals. `watch(self, step)` is called after each step."""

    def __init__(
        self,
        pool: BlockPool,
        settings: SchedulerSettings,
        step_time: StepTime,
        *,
        max_length: int,
        watch: Callable[[Simulator, Step], None] | None = None,
        points: Points | CodingPoints | None = None,
    ) -> None:
        self.now = 0.0
        self.steps = 0
        self.scheduler = Scheduler(pool, settings, max_length=max_length, clock=lambda: self.now, points=points)
        self.served: list[Served] = []  # by sequence id
        self._step_time = step_time
        self._watch = watch

    def run(self, arrivals: Iterable[Arrival], until: float = float("inf")) -> list[Served]:
        """Serve all arrivals to their end, or to the first step that ends at `until` or later; returns what became of
        them. An arrival enters before the first step that begins at its time or later."""
        coming = sorted(arrivals, key=lambda arrival: arrival.time)
        first, taken = len(self.served), 0
        while self.now < until:
            while taken < len(coming) and coming[taken].time <= self.now:
                self.add(coming[taken])
                taken += 1
            if not self.step():
                if taken == len(coming):
                    break
                self.now = coming[taken].time
        return self.served[first:]

    def add(self, arrival: Arrival) -> Sequence:
        """Put a request in line; what the scheduler refuses is raised."""
        id = len(self.served)
        prompt = arrival.prompt or (id,) * arrival.prompt_tokens
        sequence = Sequence(
            id, str(id), list(prompt), arrival.output_tokens, arrival.tenant, arrival.priority, arrival.time
        )
        self.scheduler.add(sequence)
        self.served.append(Served(arrival))
        return sequence

    def step(self) -> bool:
        """One step of virtual time; False if there was nothing to do."""
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.now += self._step_time.seconds(step)
        self.steps += 1
        sampled = {row.sequence: row.sequence for row in step.rows if row.samples}
        for id in sampled:
            self.served[id].token_times.append(self.now)
        for sequence in self.scheduler.postprocess(step, StepOutput(sampled)):
            self.served[sequence.id].finish_reason = sequence.finish_reason
        if self._watch:
            self._watch(self, step)
        return True
