"""Pairs of answers to the same prompts: the original's, which is chosen, and the compressed model's, which is rejected.

Shape suffixes: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from compress.core.errors import InputError
from compress.core.passes import Job
from distill._batches import batch_rows
from distill._completions import written
from distill._teacher import find_teacher, require_dense_original
from distill._trainer import text_of

if TYPE_CHECKING:
    from distill.preference import Preference


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt and of both answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """What a step is trained on where the loss is a mean over pairs: their numbers. It stands where a Batch stands."""

    pairs_B: Tensor

    @property
    def scored(self) -> int:
        """How many pairs there are."""
        return len(self.pairs_B)

    def share(self, rank: int, count: int) -> PairBatch:
        """All of it: there is one process."""
        return self

    def split(self, pairs: int) -> Iterator[PairBatch]:
        """Batches of at most so many pairs."""
        return map(PairBatch, self.pairs_B.split(pairs))


def answered(settings: Preference, job: Job) -> list[Pair]:
    """A pair for each prompt that the two models answer differently. Each answers once, and that is kept."""
    require_dense_original(settings.teacher, job)
    tokens = text_of(job)
    rows = range(settings.prompts(tokens))
    theirs = written(settings, job, tokens, rows, "original", lambda: find_teacher(settings.teacher, job))
    ours = written(settings, job, tokens, rows, "compressed", lambda: job.checkpoint)
    if [prompt for prompt, _ in theirs] != [prompt for prompt, _ in ours]:
        raise InputError("the original and the compressed model end a text with different tokens")
    both = zip(theirs, ours, strict=True)
    return [Pair(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in both if chosen != rejected]


def pair_batches(settings: Preference, count: int) -> Callable[[int], PairBatch]:
    """Batches of `count` pairs, each time round in another order."""
    return lambda step: PairBatch(batch_rows(settings, count, step))


def steps_of(settings: Preference, count: int) -> int:
    """How many steps `count` pairs are."""
    return max(1, round(settings.epochs * count / settings.batch))
