"""Pairs of answers to the same prompts: the original's, which is chosen, and the compressed model's, which is rejected.

Shape suffixes: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from compress.core.checkpoint import load_tokenizer
from compress.core.errors import InputError
from compress.core.passes import Job
from distill._batches import batch_rows
from distill._completions import Prompts, prompts_of, written
from distill._teacher import find_teacher, require_dense_original
from distill._trainer import text_of

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
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


def answered(settings: Preference, job: Job) -> tuple[list[Pair], int]:
    """A pair for each prompt that the two models answer differently, and how many prompts there are. Each answers
    once, and that is kept."""
    require_dense_original(settings.teacher, job)
    rows, prompts = asked(settings, job)
    theirs = written(settings, job, rows, prompts, "original", lambda: find_teacher(settings.teacher, job))
    ours = written(settings, job, rows, prompts, "compressed", lambda: job.checkpoint)
    if [prompt for prompt, _ in theirs] != [prompt for prompt, _ in ours]:
        raise InputError("the original and the compressed model end a text with different tokens")
    both = zip(theirs, ours, strict=True)
    pairs = [Pair(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in both if chosen != rejected]
    return pairs, len(rows)


def asked(settings: Preference, job: Job) -> tuple[Sequence[int], Prompts]:
    """The rows of the text that have a prompt, and these. InputError if none has."""
    tokens = text_of(job)
    rows = range(settings.prompts(tokens))
    if settings.until is None:
        return rows, lambda rows_B, end_tokens: prompts_of(tokens, rows_B, settings.prompt_tokens, end_tokens)
    mark = load_tokenizer(job.checkpoint.folder).encode(settings.until, add_special_tokens=False)
    found = {row: _up_to(mark, _begun(tokens, row, settings.prompt_tokens)) for row in rows}
    found = {row: prompt for row, prompt in found.items() if prompt}
    if not found:
        message = f"no row of the text has {settings.until!r} in its first {settings.prompt_tokens} tokens"
        raise InputError(message, where="distill.until", hint="raise prompt_tokens, or see how the text is rendered")
    return list(found), lambda rows_B, _: [found[row] for row in rows_B.tolist()]


def _begun(tokens: Tokens, row: int, most: int) -> list[int]:
    length = most if tokens.lengths is None else min(most, int(tokens.lengths[row]))
    return tokens.ids[row, :length].tolist()


def _up_to(mark: list[int], ids: list[int]) -> list[int]:
    """The ids up to the end of the first `mark` in them; empty without one."""
    places = (place for place in range(len(ids) - len(mark) + 1) if ids[place : place + len(mark)] == mark)
    return ids[: next(places, -len(mark)) + len(mark)]


def pair_batches(settings: Preference, count: int) -> Callable[[int], PairBatch]:
    """Batches of `count` pairs, each time round in another order."""
    return lambda step: PairBatch(batch_rows(settings, count, step))


def steps_of(settings: Preference, count: int) -> int:
    """How many steps `count` pairs are."""
    return max(1, round(settings.epochs * count / settings.batch))
