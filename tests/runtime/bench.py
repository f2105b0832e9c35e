"""A scheduler on the bench: a make-believe model whose memory tells what every slot really holds.

The next token is a function of what the row's pages hold, read through its table. So a page that was shared wrongly,
written too early, copied too late or given away while in use changes a token or fails at once.
"""

from __future__ import annotations

from hashlib import blake2b

from runtime.blocks import BlockPool, PageType
from runtime.scheduler import Scheduler, SchedulerSettings, Step, StepOutput
from runtime.sequence import Sequence

Slot = tuple[str, int, int]  # tenant, position, token


def settings(**given) -> SchedulerSettings:
    """Settings without headroom, so that pages run out when a test says so."""
    return SchedulerSettings(**{"headroom_tokens": 0} | given)


def shape(step) -> list[tuple[int, int, bool]]:
    """(sequence, tokens, samples) of each row."""
    return [(row.sequence, len(row.tokens), row.samples) for row in step.rows]


class Bench:
    """Pool, scheduler, memory, and every sequence that ever came."""

    def __init__(
        self,
        pages: int = 16,
        page_tokens: int = 4,
        *,
        max_length: int = 40,
        vocabulary: int = 3,
        settings: SchedulerSettings | None = None,
    ) -> None:
        self.pool = BlockPool(pages, PageType("float32", 64 * page_tokens, page_tokens))
        self.scheduler = Scheduler(
            self.pool, settings or SchedulerSettings(), max_length=max_length, clock=lambda: float(len(self.sequences))
        )
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
        return StepOutput({row.sequence: self._next_token(row) for row in step.rows if row.samples})

    def _next_token(self, row) -> int:
        sequence = self.sequences[row.sequence]
        slots = [slot for page in row.table for slot in self.memory[page]][: row.kv_len + len(row.tokens)]
        expected = [(sequence.tenant, position, token) for position, token in enumerate(sequence.tokens)]
        assert slots == expected[: len(slots)], f"sequence {row.sequence} reads {slots}, its tokens are {expected}"
        return blake2b(repr(slots).encode(), digest_size=4).digest()[0] % self.vocabulary

    def check(self) -> None:
        """Integrity, and that the pool's own counts add up."""
        self.scheduler.check_integrity()
        counts = self.pool.statistics
        owned = {page for sequence in self.sequences.values() for page in sequence.table[0]}
        assert counts.free + counts.cached + counts.owned == self.pool.pages
        assert counts.owned == len(owned)
