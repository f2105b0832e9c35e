"""Who computes what in the next step: one flat batch of decodes and prefill chunks, as far as tokens and pages go.

Continuous batching (Orca, OSDI'22), chunked prefill without stalls (Sarathi-Serve, arXiv 2403.02310): all decodes
first, then prefills under way, then new sequences. Pages for the whole prompt are taken at admission, those for
generated tokens as they come; when pages run out, the last in precedence gives its own back and starts over later.
Admission stops while there is still room to grow, preemption starts when there is none: no ping-pong between the two.

With `points` a row never crosses a point of eviction (kv_compress._budget), and what lies before one is never so short
that the point's queries would come from two rows. So a sequence's keys and values follow from its tokens alone. Pages
taken at admission are then as many as the prompt needs at any one time.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from compress.core.errors import UsageError
from kv_compress._budget import Points
from kv_compress._coded_pages import CodingPoints
from runtime.admission import QueueFull, RequestTooLong, require_fit, require_place
from runtime.blocks import BlockPool
from runtime.fairness import ServiceMeter
from runtime.lookup import Found
from runtime.plan import Plan
from runtime.policies import make_policy, place
from runtime.sequence import Sequence
from runtime.settings import SchedulerSettings
from runtime.step import Row, Step, StepOutput

if TYPE_CHECKING:
    from runtime.trace import Recorder

__all__ = ["QueueFull", "RequestTooLong", "Row", "Scheduler", "SchedulerSettings", "Step", "StepOutput"]


class Scheduler:
    """Sequences wait, run and finish; `schedule` and `postprocess` take turns. Time enters only as `arrival`.

    `max_length`: tokens that a sequence may have. `meter` tells each tenant's service, the largest gap and its bound.
    """

    def __init__(
        self,
        pool: BlockPool,
        settings: SchedulerSettings,
        *,
        max_length: int,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
        points: Points | CodingPoints | None = None,
    ) -> None:
        if max_length < 1:
            raise UsageError(f"max_length must be at least 1, not {max_length}")
        self.pool = pool
        self.settings = settings
        self.max_length = max_length
        self.policy = make_policy(settings.policy)
        self.meter = ServiceMeter(settings)
        self.running: list[Sequence] = []  # in order of precedence
        self.preemptions = 0
        self.recorder = recorder
        self._clock = clock
        self._page_tokens = pool.page.tokens
        self._sequences: dict[int, Sequence] = {}  # all that wait or run
        self._orders, self._indices = count(), count()
        self._in_flight: Step | None = None
        self._most_running = min(settings.max_sequences, settings.token_budget)  # each gets a token in every step
        self.points = points
        if isinstance(points, Points) and points.layers:
            pool.cut_for(points.layers, points.heads)
            self.points = replace(points, spread=pool.page.tokens - 1)
        pool.points = self.points
        shares = not (isinstance(points, Points) and points.alone)
        pool.prefix_cache = pool.prefix_cache and settings.prefix_cache and shares
        if recorder:
            recorder.started(self)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences in line; under `vtc` tenant by tenant."""
        return list(self.policy)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._sequences)

    # Sequences come and go

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence in line.

        RequestTooLong names the limit that it could never keep; QueueFull says that too many wait already.
        """
        require_fit(sequence, self.max_length, self.pool)
        require_place(len(self.policy), self.settings.max_queue)
        self._enter(sequence)
        self.policy.add(sequence)
        if self.recorder:
            self.recorder.added(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, another sample of the parent's request, share all that the parent has computed of its tokens.

        The child begins with the parent's tokens, and may already end in another last one. It runs at once where the
        parent runs and one more may; otherwise it gets in line. Not to be called while a step is in flight.
        """
        require_fit(child, self.max_length, self.pool)
        shared = min(parent.computed, len(child.tokens) - 1)  # its last token is computed in any case
        if child.tenant != parent.tenant or child.tokens[:shared] != parent.tokens[:shared]:
            raise UsageError(f"sequence {child.id} does not begin like sequence {parent.id}, its parent")
        if self._in_flight is not None:
            raise RuntimeError(f"sequence {parent.id} cannot be forked while step {self._in_flight.index} is in flight")
        self._enter(child)
        if self.recorder:
            self.recorder.forked(parent, child)
        child.charged = parent.charged  # they share one prompt
        runs = parent.status == "running" and parent.pending == 1 and len(self.running) < self._most_running
        if runs and self.pool.fork(parent, child, shared):
            self.meter.start(child.tenant, child.remaining, admitted=False)
            self._start(child)
        else:
            self.policy.add(child)

    def abort(self, id: int) -> None:
        """End a sequence at once: its pages are there for the next step. Nothing happens if it has ended already."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._finish(sequence, "abort")
            if self.recorder:
                self.recorder.aborted(sequence)

    # Steps

    def schedule(self) -> Step | None:
        """The next step, or None if nothing waits or runs. `postprocess` must follow before the next call."""
        if self._in_flight is not None:
            raise RuntimeError(f"step {self._in_flight.index} is still in flight: postprocess or abandon it first")
        if not self._sequences:
            return None
        self.meter.observe(self.policy.tenants())
        plan = Plan(self.settings.token_budget, self._page_tokens, chunked=self.settings.chunked_prefill)
        self._continue_running(plan)
        self._admit(plan)
        self.meter.observe(self.policy.tenants())
        if not plan.rows:
            raise RuntimeError(f"{len(self._sequences)} sequences are there but none can run")
        planned = tuple(plan.rows), tuple(plan.copies), tuple(plan.compressions)
        self._in_flight = Step(next(self._indices), *planned, self.pool.groups)
        if self.recorder:
            self.recorder.scheduled(self._in_flight)
        return self._in_flight

    def postprocess(self, step: Step, output: StepOutput) -> list[Sequence]:
        """Take in what came of `step`; returns the sequences that finished, whose pages are given back.

        Rows of sequences that were aborted in the meantime are passed over. "length" is decided here.
        """
        if step is not self._in_flight:
            raise RuntimeError(f"step {step.index} is not in flight")
        self._require_tokens(step, output)
        self._in_flight = None
        finished = []
        generated: dict[str, int] = {}
        known, tokens, ends = self._sequences, output.tokens, output.finished
        evictions = {done.sequence: done for done in step.compressions}
        self.pool.stored(step.rows)
        for id, _, computed, _, _, samples, _ in step.rows:
            sequence = known.get(id)
            if sequence is None:
                continue
            sequence.computed += len(computed)
            sequence.kv_len[0] += len(computed)
            is_computed = sequence.computed == len(sequence.tokens)
            if id in evictions and ends.get(id) != "error":  # pages that hold errors are to be forgotten, all of them
                self.pool.evictions.finish(sequence, evictions[id], output.counts.get(id))
            if samples and id in tokens:
                sequence.tokens.append(tokens[id])
                generated[sequence.tenant] = generated.get(sequence.tenant, 0) + 1
            reason = ends.get(id)
            if reason is None and is_computed and len(sequence.tokens) >= sequence.longest:
                reason = "length"
            if id in output.siblings:
                self._charge_siblings(sequence, output.siblings[id])
            if reason is not None:
                self._finish(sequence, reason)
                finished.append(sequence)
        for tenant, amount in generated.items():
            self.policy.charge(tenant, self.meter.serve(tenant, generated=amount))
        if self.recorder:
            self.recorder.processed(output)
        return finished

    def abandon(self) -> list[Sequence]:
        """Give up the step in flight, because the model failed; returns the sequences that it ended ("error").

        What the step should have stored may be missing, so everything that runs ends and the prefix cache is emptied.
        """
        self._in_flight = None
        ended = list(self.running)
        for sequence in ended:
            self._finish(sequence, "error")
        self.pool.forget()
        if self.recorder:
            self.recorder.abandoned()
        return ended

    def check_integrity(self) -> None:
        """RuntimeError with what is wrong, unless pool, lines and sequences agree."""
        self.pool.check_integrity(self._sequences.values())
        everybody = [*self.policy, *self.running]
        if len(everybody) != len(self._sequences) or {s.id for s in everybody} != self._sequences.keys():
            raise RuntimeError(f"{sorted(s.id for s in everybody)} wait or run, known are {sorted(self._sequences)}")
        if any(s.status != "running" for s in self.running) or any(s.status != "waiting" for s in self.policy):
            raise RuntimeError("a sequence is not in the state that its line says")
        if any(sequence.table[0] or sequence.seat >= 0 for sequence in self.policy):
            raise RuntimeError("a waiting sequence holds pages")
        if len(self.running) > self._most_running:
            raise RuntimeError(f"{len(self.running)} sequences run, more than {self._most_running}")

    # How a step is made

    def _continue_running(self, plan: Plan) -> None:
        decodes = [sequence for sequence in self.running if len(sequence.tokens) - sequence.computed == 1]
        prefills = []
        if len(decodes) < len(self.running):
            prefills = [sequence for sequence in self.running if len(sequence.tokens) - sequence.computed != 1]
        preemptions = self.preemptions
        crowded = self.pool.crowded(decodes)
        if self.points is not None:
            asking = {sequence.id for sequence in crowded}
            crowded = [sequence for sequence in decodes if sequence.id in asking or self._comes_to_point(sequence, 1)]
        for sequence in crowded:
            if sequence.status == "running":  # not preempted by one before it
                self._make_room(plan, sequence)
        if self.preemptions > preemptions:
            decodes = [sequence for sequence in decodes if sequence.status == "running"]
        for sequence in plan.add_decodes(decodes):
            if self.points is None or not self._comes_to_point(sequence, 1):  # else it may be written
                self._offer(sequence, sequence.kv_len[0] + 1)
        for sequence in prefills:
            if sequence.status == "running" and (tokens := self._chunk(plan, sequence)):
                self._plan_row(plan, sequence, tokens)

    def _make_room(self, plan: Plan, sequence: Sequence) -> None:
        """For one token of the sequence, for whose page others behind it may have to give way, or it itself."""
        # Decodes come first and in order of precedence: the last one was given nothing yet.
        while (copies := self.pool.reserve(sequence, sequence.kv_len[0] + 1)) is None:
            if self._preempt_last() is sequence:
                return
        if self.points is not None and self._comes_to_point(sequence, 1):
            while not self.pool.evictions.has_room(sequence):
                if self._preempt_last() is sequence:
                    return
            plan.compressions.append(self.pool.evictions.prepare(sequence))
        plan.copies.extend(copies)

    def _preempt_last(self) -> Sequence:
        victim = self.running[-1]
        self._preempt(victim)
        return victim

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.status = "waiting"
        sequence.preemptions += 1
        self.preemptions += 1
        self.policy.add(sequence)

    def _admit(self, plan: Plan) -> None:
        """Let sequences in as long as the next one finds tokens and pages: nobody overtakes the policy's first."""
        if not len(self.policy) or len(self.running) >= self._most_running:
            return
        growth = sum(map(self._growth, self.running))
        while plan.left > 0 and len(self.running) < self._most_running:
            sequence = self.policy.next()
            if sequence is None:
                return
            found = self.pool.lookup(sequence)
            tokens = self._chunk(plan, sequence, found)
            growth += self._growth(sequence)
            # Some pages stay with those who run, so that who comes in does not drive out another, or itself, at once.
            # Who is alone needs none: somebody always runs.
            headroom = self.pool.pages_for(growth) if self.running else 0
            slots = self._slots(sequence, found)
            if not tokens or self.pool.room_after(found, slots) < headroom:
                return
            self.policy.remove(sequence)
            self.pool.begin(sequence, found)
            self.pool.reserve(sequence, slots)
            self._charge_admission(sequence)
            self._start(sequence)
            self._plan_row(plan, sequence, tokens)

    def _growth(self, sequence: Sequence) -> int:
        """Tokens by which the sequence may grow soon."""
        return min(self.settings.headroom_tokens, sequence.remaining)

    def _slots(self, sequence: Sequence, found: Found) -> int:
        """The most slots that the sequence takes until all its tokens are stored, from what was found on."""
        if self.points is None:
            return len(sequence.tokens)
        start = sequence.stretches[found.stretch]
        return self.points.peak(start.slots, start.position, len(sequence.prompt), len(sequence.tokens))

    def _chunk(self, plan: Plan, sequence: Sequence, found: Found | None = None) -> int:
        """How many tokens there is room for, up to the next point. The last row before a point has its queries, if need
        be a few more than the budget has left."""
        computed = sequence.computed if found is None else found.computed
        pending = len(sequence.tokens) - computed
        if self.points is None:
            return plan.chunk(pending)
        point = sequence.stretches[sequence.stretch if found is None else found.stretch].point
        if point is None or point.position > len(sequence.tokens):
            return plan.chunk(pending)
        pending = point.position - computed
        tokens = plan.chunk(pending)
        return min(tokens, pending - point.queries) or pending if 0 < tokens < pending else tokens

    def _comes_to_point(self, sequence: Sequence, tokens: int) -> bool:
        """Whether an eviction follows the sequence's next `tokens` tokens."""
        point = sequence.stretches[sequence.stretch].point
        return point is not None and point.position == sequence.computed + tokens

    def _plan_row(self, plan: Plan, sequence: Sequence, tokens: int) -> None:
        """A row of a prefill, and the eviction that follows it; without pages for that it waits for another step."""
        if sequence.is_seated and self.pool.reserve(sequence, sequence.kv_len[0] + tokens) is None:
            return
        evicts = self.points is not None and self._comes_to_point(sequence, tokens)
        if evicts:
            planned = {row.sequence for row in plan.rows}
            while not self.pool.evictions.has_room(sequence):
                if self.running[-1] is sequence or self.running[-1].id in planned:
                    return
                self._preempt_last()
        plan.add(sequence, tokens)
        self._offer(sequence, sequence.kv_len[0] + tokens)
        if evicts:
            plan.compressions.append(self.pool.evictions.prepare(sequence))

    def _offer(self, sequence: Sequence, slots: int) -> None:
        if slots // self._page_tokens > sequence.registered:
            # Now, not after the step: its other rows may share what this one fills.
            self.pool.register(sequence, slots)

    # Bookkeeping

    def _enter(self, sequence: Sequence) -> None:
        if sequence.id in self._sequences or sequence.status != "waiting" or sequence.order >= 0:
            raise UsageError(f"sequence {sequence.id} is here already, or was")
        if sequence.arrival is None:
            sequence.arrival = self._clock()
        sequence.order = next(self._orders)
        self._sequences[sequence.id] = sequence

    def _start(self, sequence: Sequence) -> None:
        sequence.status = "running"
        insort(self.running, sequence, key=self.policy.precedence)

    def _stop(self, sequence: Sequence) -> None:
        del self.running[place(self.running, sequence, self.policy.precedence)]
        self.meter.stop(sequence.tenant, sequence.remaining)
        self.pool.release(sequence)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if reason == "error":  # its keys and values may be as broken as its logits
            self.pool.forget(sequence.table[0])
        if sequence.status == "running":
            self._stop(sequence)
        else:
            self.policy.remove(sequence)
            self.meter.observe(self.policy.tenants())
        del self._sequences[sequence.id]
        sequence.status = "finished"
        sequence.finish_reason = reason

    def _charge_admission(self, sequence: Sequence) -> None:
        prompt = 0 if sequence.charged else len(sequence.prompt)  # paid once: a preemption is not the tenant's doing
        sequence.charged = True
        self.meter.start(sequence.tenant, sequence.remaining, prompt=prompt)
        self.policy.charge(sequence.tenant, self.meter.serve(sequence.tenant, prompt=prompt))

    def _charge_siblings(self, sequence: Sequence, tokens: int) -> None:
        """First tokens of samples that share this prompt: paid for whether they go on, wait, or have ended already."""
        self.meter.start(sequence.tenant, tokens, admitted=False)
        self.policy.charge(sequence.tenant, self.meter.serve(sequence.tenant, generated=tokens))

    def _require_tokens(self, step: Step, output: StepOutput) -> None:
        """A row that samples must have got a token or an end; checked before anything is changed."""
        tokens = output.tokens
        for id, _, _, _, _, samples, _ in step.rows:
            if samples and id not in tokens and id not in output.finished and id in self._sequences:
                raise RuntimeError(f"step {step.index} samples for sequence {id}, but its output has no token for it")
