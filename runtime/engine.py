"""The engine: requests of token ids go in, updates come out, one step at a time.

Continuous batching after Orca (OSDI'22): in every step each running request is given what the scheduler allots to it.
It belongs to one thread; a server calls it from one.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.core.errors import UsageError
from runtime.blocks import BlockPool
from runtime.choice import Choice, choose
from runtime.detokenizer import TextDecoder, decoder_of
from runtime.logprobs import TokenLogprobs, token_logprobs
from runtime.page import PoolStatistics
from runtime.params import SamplingParams
from runtime.runner import Runner, StepLogits
from runtime.sample import Sample, Update
from runtime.scheduler import Row, Scheduler, SchedulerSettings, Step, StepOutput
from runtime.sequence import Sequence

if TYPE_CHECKING:
    from kv_compress._budget import Points
    from kv_compress._coded_pages import CodingPoints
    from runtime.trace import Recorder


@dataclass(frozen=True)
class EngineSettings:
    """max_length: tokens a sequence may have, prompt and completion together. end_tokens: the model's end of text.
    seed: from which requests without a seed get theirs (None: from the system's randomness)."""

    max_length: int
    end_tokens: tuple[int, ...] = ()
    seed: int | None = None
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start (steps, tokens, preemptions) and what there is now."""

    steps: int
    computed_tokens: int
    sampled_tokens: int
    preemptions: int
    waiting: int
    running: int
    pages: PoolStatistics


class Engine:
    """One model with its cache (the runner), one pool, one scheduler, and the requests that they work on."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        tokenizer: TextDecoder | None,
        settings: EngineSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
        points: Points | CodingPoints | None = None,
    ) -> None:
        self.runner = runner
        self.settings = settings
        self.scheduler = Scheduler(
            pool, settings.scheduler, max_length=settings.max_length, clock=clock, recorder=recorder, points=points
        )
        self._decoder = None if tokenizer is None else decoder_of(tokenizer)
        self._end_tokens = frozenset(settings.end_tokens)
        self._seed = secrets.randbits(62) if settings.seed is None else settings.seed
        self._ids = itertools.count()
        self._accepted = 0
        self._samples: dict[int, Sample] = {}  # of sequences that wait or run, by their id
        self._siblings: dict[int, tuple[Sequence, list[Sample]]] = {}  # wait until the first one's prompt is computed
        self._requests: dict[str, set[int]] = {}  # ids of each request's sequences
        self._news: dict[Sample, None] = {}  # in order
        self._steps = self._computed = self._sampled = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return self.scheduler.has_work or bool(self._news)

    def add(
        self,
        prompt: Listed[int],
        params: SamplingParams,
        request: str | None = None,
        *,
        tenant: str = "",
        priority: int = 0,
    ) -> str:
        """Take a request in; returns its name, which updates carry.

        UsageError: the prompt or a setting makes no sense, or the name is taken. RequestTooLong: it could never be
        served; the message has the limit. QueueFull: too many wait already.
        """
        if not isinstance(tenant, str) or not isinstance(priority, int) or isinstance(priority, bool):
            raise UsageError(f"tenant is a text and priority a whole number, not {tenant!r} and {priority!r}")
        if not isinstance(params, SamplingParams):
            raise UsageError(f"params are SamplingParams, not {params!r}")
        if request is not None and not isinstance(request, str):
            raise UsageError(f"a request's name is a text, not {request!r}")
        number = self._accepted
        name = f"request-{number}" if request is None else request
        if name in self._requests:
            raise UsageError(f"a request named {name!r} is being worked on already")
        self._check_tokens("the prompt", prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        if params.stop and self._decoder is None:
            raise UsageError("stop needs text, and there is no tokenizer", hint="use stop_token_ids")
        if not len(prompt):
            raise UsageError("the prompt holds no token")
        sequence = Sequence(
            next(self._ids),
            name,
            list(prompt),
            params.max_tokens,
            tenant=tenant,
            priority=priority,
            lookup_limit=None if params.prompt_logprobs is None else params.prompt_logprobs_start - 1,
        )
        self.scheduler.add(sequence)
        self._accepted += 1
        first, *siblings = self._new_samples(name, prompt, params, number)
        self._enter(sequence, first)
        if siblings:
            self._siblings[sequence.id] = sequence, siblings
        return name

    def abort(self, request: str) -> None:
        """End a request: its pages are free before the next step, which reports it. Nothing happens if it has ended."""
        for id in tuple(self._requests.get(request, ())):
            self.scheduler.abort(id)
            self._leave(id, "abort")

    def forget(self, request: str) -> None:
        """End a request if it has not ended, and say no more about it."""
        self.abort(request)
        self._news = {sample: None for sample in self._news if sample.request != request}

    def step(self) -> list[Update]:
        """Compute one step; what is new about each request that it touched, and about those that ended since the last.

        If the model fails, all that runs ends with "error" (the next call reports it) and the exception goes on.
        """
        step = self.scheduler.schedule()
        if step is not None:
            self._compute(step)
        news, self._news = self._news, {}
        return [sample.report() for sample in news]

    def stats(self) -> EngineStats:
        """Counts as of now."""
        return EngineStats(
            self._steps,
            self._computed,
            self._sampled,
            self.scheduler.preemptions,
            len(self.scheduler.waiting),
            len(self.scheduler.running),
            self.scheduler.pool.statistics,
        )

    def check_integrity(self) -> None:
        """RuntimeError with what is wrong, unless engine, scheduler and pool agree."""
        self.scheduler.check_integrity()
        alive = {sequence.id for sequence in (*self.scheduler.waiting, *self.scheduler.running)}
        named = set().union(*self._requests.values())
        if not alive == self._samples.keys() == named or not self._siblings.keys() <= alive:
            raise RuntimeError(f"sequences {sorted(alive)}, samples {sorted(self._samples)}, requests {sorted(named)}")

    # Requests

    def _check_tokens(self, what: str, tokens: Listed[int]) -> None:
        vocabulary = self.runner.vocabulary
        for token in tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
                raise UsageError(f"{what} holds {token!r}; token ids go from 0 to {vocabulary - 1}")

    def _new_samples(self, name: str, prompt: Listed[int], params: SamplingParams, number: int) -> list[Sample]:
        ends = frozenset(params.stop_token_ids) if params.ignore_eos else self._end_tokens.union(params.stop_token_ids)
        seed = f"{self._seed} {number}" if params.seed is None else str(params.seed)
        samples = [
            Sample(name, index, prompt, params, decoder=self._decoder, end_tokens=ends, seed=seed)
            for index in range(params.n)
        ]
        for sibling in samples[1:]:
            sibling.scores = samples[0].scores
        return samples

    def _enter(self, sequence: Sequence, sample: Sample) -> None:
        self._samples[sequence.id] = sample
        self._requests.setdefault(sequence.request, set()).add(sequence.id)

    def _leave(self, id: int, reason: str) -> None:
        """The sequence has ended, and with it what was to be forked from it."""
        first, siblings = self._samples.pop(id), self._waiting_siblings(id)
        self._siblings.pop(id, None)
        for sample in (first, *siblings):
            self._end(sample, reason)
        ids = self._requests[first.request]
        ids.remove(id)
        if not ids:
            del self._requests[first.request]

    def _end(self, sample: Sample, reason: str) -> None:
        sample.finish(reason)
        self._news[sample] = None

    # A step

    def _compute(self, step: Step) -> None:
        wanted = {row.sequence: positions for row in step.rows if (positions := self._wanted(row))}
        with ExitStack() as failure:
            failure.callback(self._abandon)
            found = self.runner.run(step, wanted)
            broken = self._score_prompts(wanted, found)
            choices = self._choose(found)
            failure.pop_all()
        self._steps += 1
        self._computed += step.tokens
        forks = [(*self._siblings.pop(id), rest) for id, (_, *rest) in choices.items() if rest]
        ended = {id: choice.reason for id, (choice, *_) in choices.items() if choice.reason}
        tokens = {id: choice.token for id, (choice, *_) in choices.items() if choice.token is not None}
        siblings = {id: sum(choice.token is not None for choice in rest) for id, (_, *rest) in choices.items() if rest}
        output = StepOutput(tokens, ended | dict.fromkeys(broken, "error"), siblings, found.counts)
        for sequence in self.scheduler.postprocess(step, output):
            self._leave(sequence.id, sequence.finish_reason or "length")
        for parent, samples, rest in forks:
            for sibling, choice in zip(samples, rest, strict=True):
                self._fork(parent, sibling, choice)

    def _abandon(self) -> None:
        for sequence in self.scheduler.abandon():
            self._leave(sequence.id, "error")

    def _wanted(self, row: Row) -> range:
        """The positions of a row whose logits foretell prompt tokens that are asked for."""
        scores = self._samples[row.sequence].scores
        return range(0) if scores is None else scores.wanted(row.start, row.start + len(row.tokens))

    def _score_prompts(self, wanted: dict[int, range], found: StepLogits) -> list[int]:
        """Take down the log-probabilities of prompt tokens; the sequences of which some are no numbers."""
        scores = {id: scores for id in wanted if (scores := self._samples[id].scores) is not None}
        if found.prompts_NK is None:
            return []
        targets = [token for id, its_scores in scores.items() for token in its_scores.targets(wanted[id])]
        top = max(its_scores.top for its_scores in scores.values())
        logprobs: list[TokenLogprobs] = []
        for logits_NV in self.runner.logits(found.prompts_NK):
            logprobs += token_logprobs(logits_NV, targets[len(logprobs) :][: len(logits_NV)], top)
        rest = iter(logprobs)
        return [id for id, its_scores in scores.items() if not its_scores.take(itertools.islice(rest, len(wanted[id])))]

    def _choose(self, found: StepLogits) -> dict[int, list[Choice]]:
        """What each sequence that samples goes on with; where siblings wait for its prompt, theirs after its own."""
        lines = {id: [self._samples[id], *self._waiting_siblings(id)] for id in found.sampled}
        samples = [sample for line in lines.values() for sample in line]
        logits_RV = found.logits_NV[: len(found.sampled)]
        if len(samples) > len(logits_RV):
            logits_RV = logits_RV[[row for row, line in enumerate(lines.values()) for _ in line]]
        self._news.update(dict.fromkeys(samples))
        self._sampled += len(samples)
        choices = iter(choose(logits_RV, samples))
        return {id: list(itertools.islice(choices, len(line))) for id, line in lines.items()}

    def _waiting_siblings(self, id: int) -> list[Sample]:
        return self._siblings[id][1] if id in self._siblings else []

    def _fork(self, parent: Sequence, sample: Sample, choice: Choice) -> None:
        """Let a sibling go its own way from its first token on."""
        if choice.reason or choice.token is None or parent.max_tokens == 1:
            self._end(sample, choice.reason or "length")
            return
        child = Sequence(
            next(self._ids),
            parent.request,
            parent.prompt,
            parent.max_tokens,
            tenant=parent.tenant,
            priority=parent.priority,
        )
        child.tokens.append(choice.token)
        self.scheduler.fork(parent, child)
        self._enter(child, sample)
