"""A scheduler on the bench: a make-believe model whose memory tells what every slot really holds.

The next token is a function of what the row's pages hold, read through its table. So a page that was shared wrongly,
written too early, copied too late or given away while in use changes a token or fails at once. What an eviction keeps
is a function of all slots and of the tokens whose queries it observes; what should be there is worked out token by
token, in a list, from the policy's words alone.
"""

from __future__ import annotations

from hashlib import blake2b
from math import ceil

from kv_compress.eviction import EvictionSettings
from runtime.blocks import BlockPool
from runtime.page import PageType
from runtime.scheduler import Scheduler, SchedulerSettings, Step, StepOutput
from runtime.sequence import Sequence
from runtime.step import Compression

Slot = tuple[str, int, int]  # tenant, position, token


def settings(**given) -> SchedulerSettings:
    """Settings without headroom, so that pages run out when a test says so."""
    return SchedulerSettings(**{"headroom_tokens": 0} | given)


def shape(step) -> list[tuple[int, int, bool]]:
    """(sequence, tokens, samples) of each row."""
    return [(row.sequence, len(row.tokens), row.samples) for row in step.rows]


def is_point(eviction: EvictionSettings, position: int, prompt: int) -> bool:
    """Whether the policy evicts once the tokens before a position are stored."""
    if position < prompt:
        return "prefill_chunk" in eviction.when and position % eviction.every == 0
    if position == prompt:
        return "prefill_end" in eviction.when
    return "decode" in eviction.when and (position - prompt) % eviction.every == 0


def chosen(slots: list, count: int, queries: int) -> list:
    """Slots that stay, in order, drawn from all of them and those of the observed queries."""
    seed = repr((slots, slots[len(slots) - queries :])).encode()
    lots = [blake2b(seed + bytes([index]), digest_size=4).digest() for index in range(len(slots))]
    return [slots[index] for index in sorted(sorted(range(len(slots)), key=lots.__getitem__)[:count])]


class Bench:
    """Pool, scheduler, memory, and every sequence that ever came."""

    layers = heads = 1

    def __init__(
        self,
        pages: int = 16,
        page_tokens: int = 4,
        *,
        max_length: int = 40,
        vocabulary: int = 3,
        settings: SchedulerSettings | None = None,
        eviction: EvictionSettings | None = None,
    ) -> None:
        self.pool = BlockPool(pages, PageType("float32", 64 * page_tokens, page_tokens))
        self.eviction = eviction
        self.scheduler = Scheduler(
            self.pool,
            settings or SchedulerSettings(),
            max_length=max_length,
            clock=lambda: float(len(self.sequences)),
            points=None if eviction is None else eviction.points(64, self.layers, self.heads),
        )
        self.evictions = 0
        self.seeds: dict[tuple, int] = {}
        self.sequences: dict[int, Sequence] = {}
        self.memory: list[list[Slot | None]] = [[None] * page_tokens for _ in range(pages)]
        self.vocabulary = vocabulary
        self.steps: list[Step] = []

    def sequence(
        self,
        prompt: list[int] | int,
        max_tokens: int = 4,
        *,
        tenant: str = "",
        priority: int = 0,
        no_lookup: bool = False,
    ) -> Sequence:
        """A new sequence that is not in line yet; a number as prompt means so many tokens of its own."""
        id = len(self.sequences)
        tokens = [1000 + id] * prompt if isinstance(prompt, int) else prompt
        limit = 0 if no_lookup else None
        sequence = Sequence(id, f"request-{id}", tokens, max_tokens, tenant, priority, lookup_limit=limit)
        self.sequences[id] = sequence
        return sequence

    def add(self, prompt: list[int] | int, max_tokens: int = 4, **settings) -> Sequence:
        """A new sequence in line; settings are those of `sequence`."""
        sequence = self.sequence(prompt, max_tokens, **settings)
        self.scheduler.add(sequence)
        return sequence

    def fork(self, parent: Sequence, *, last: int | None = None, fresh: bool = False) -> Sequence:
        """Another sample of the parent's request: with its tokens, with another last one, or with the prompt alone."""
        child = self.sequence(parent.prompt, parent.max_tokens, tenant=parent.tenant, priority=parent.priority)
        child.tokens = list(child.prompt if fresh else parent.tokens)
        if last is not None:
            child.tokens[-1] = last
        self.scheduler.fork(parent, child)
        return child

    def step(self) -> Step | None:
        """Schedule, compute, take in; None if there was nothing to do."""
        step = self.scheduler.schedule()
        if step is not None:
            self.scheduler.postprocess(step, self.compute(step))
        return step

    def run(self) -> list[list[int]]:
        """Steps until nothing is left; what each sequence generated."""
        while self.step():
            self.check()
        return [sequence.generated for sequence in self.sequences.values()]

    def compute(self, step: Step) -> StepOutput:
        """The model: copies, then all stores, then all reads."""
        self.steps.append(step)
        for source, target in step.copies:
            self.memory[target] = list(self.memory[source])
        for row in step.rows:
            for offset, token in enumerate(row.tokens):
                page, slot = divmod(row.kv_len + offset, self.pool.page.tokens)
                self.memory[row.table[page]][slot] = (self.sequences[row.sequence].tenant, row.start + offset, token)
        output = StepOutput({row.sequence: self._next_token(row) for row in step.rows if row.samples})
        rows = {row.sequence: row for row in step.rows}
        for done in step.compressions:
            self._evict(done, rows[done.sequence])
        return output

    def _next_token(self, row) -> int:
        sequence = self.sequences[row.sequence]
        slots = self._read(row.table, row.kv_len + len(row.tokens))
        expected = self.stored(sequence, row.start + len(row.tokens))
        assert slots == expected, f"sequence {row.sequence} reads {slots}, its tokens are {expected}"
        return blake2b(repr(slots).encode(), digest_size=4).digest()[0] % self.vocabulary

    def _read(self, table: tuple[int, ...], count: int) -> list:
        slots = [slot for page in table for slot in self.memory[page]]
        assert len(slots) >= count
        return slots[:count]

    def _evict(self, done: Compression, row) -> None:
        """Move what stays to the front of the target, after reading all of it."""
        sequence, end = self.sequences[row.sequence], row.start + len(row.tokens)
        slots = self._read(done.source, done.slots)
        assert slots == self.stored(sequence, end) and 0 <= done.queries <= len(row.tokens)
        name = (sequence.tenant, tuple(sequence.tokens[:end]), min(len(sequence.prompt), end))
        assert self.seeds.setdefault(name, done.seed) == done.seed
        for index, slot in enumerate(chosen(slots, done.kept, done.queries)):
            page, offset = divmod(index, self.pool.page.tokens)
            self.memory[done.target[page]][offset] = slot
        self.evictions += 1

    def stored(self, sequence: Sequence, end: int) -> list[Slot]:
        """What the slots hold once the tokens before `end` are stored, and before an eviction there."""
        slots: list[Slot] = []
        prompt, last = len(sequence.prompt), 0
        for position, token in enumerate(sequence.tokens[:end]):
            if self.eviction is not None and position and is_point(self.eviction, position, prompt):
                tokens, ratio = self.eviction.budget.tokens, self.eviction.budget.ratio
                kept = tokens if tokens is not None else max(self.eviction.least, ceil((ratio or 0) * position))
                if kept < len(slots):
                    queries = min(self.eviction.recent, position - last if position <= prompt else 1)
                    slots = chosen(slots, kept, queries if self.eviction.method == "snapkv" else 0)
                    last = position
            slots.append((sequence.tenant, position, token))
        return slots

    def check(self) -> None:
        """Integrity, and that the pool's own counts add up."""
        self.scheduler.check_integrity()
        counts = self.pool.statistics
        owned = {page for sequence in self.sequences.values() for page in sequence.table[0]}
        assert counts.free + counts.cached + counts.owned == self.pool.pages
        assert counts.owned == len(owned)
