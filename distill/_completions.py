"""Completions: prompts are the beginnings of calibration rows, and what follows was generated.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core.errors import UsageError
from compress.core.events import Finished, Progress, Started
from compress.core.passes import Job
from compress.core.services import Sampler
from distill._batches import NO_TARGET, Batch, Batches, batch_rows
from distill._settings_completing import MOST_AT_ONCE
from distill._teacher import find_teacher

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.services import Sampling
    from distill._settings_completing import Completing

STAGE = "generate"

Prompts = Callable[[Tensor, frozenset[int]], list[list[int]]]
"""The token ids that rows [B] begin with, given the tokens that end a text."""


def number_of(*parts: object) -> int:
    """A number below 2^62 that looks random, and follows from these alone: a seed, or a draw."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def prompts_of(tokens: Tokens, rows_B: Tensor, most: int, end_tokens: frozenset[int]) -> list[list[int]]:
    """The beginnings of rows: at most `most` tokens, no padding, and nothing from an end of text on, where another text
    begins; but for the first token, which begins every prompt."""
    prompts = []
    for row in rows_B.tolist():
        length = most if tokens.lengths is None else min(most, int(tokens.lengths[row]))
        ids = tokens.ids[row, : max(length, 1)].tolist()
        ends = (place for place, token in enumerate(ids) if place and token in end_tokens)
        prompts.append(ids[: next(ends, len(ids))])
    return prompts


def completed(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Batch:
    """Prompts with their completions, padded on the right: only generated tokens are targets."""
    rows = [[*prompt, *new] for prompt, new in zip(prompts, completions, strict=True)]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    target_BT = torch.full_like(ids_BT, NO_TARGET)
    for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        target_BT[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(ids[len(prompt) :])
    return Batch(ids_BT, target_BT)


def sampler_of(job: Job, source: Checkpoint, sampling: Sampling) -> Sampler:
    """The job's service; UsageError if it brings none."""
    if job.open_sampler is None:
        raise UsageError("text cannot be generated here: this job brings no runtime")
    return job.open_sampler(source, sampling)


def teacher_batches(settings: Completing, job: Job, tokens: Tokens) -> Batches:
    """Batches of what the teacher says behind the beginning of each row, generated once, by the main process; the
    others get each batch from that one."""
    rows, teacher = range(len(tokens.ids)), find_teacher(settings.teacher, job)
    if not job.processes.is_main:
        return _made_by_main

    def prompts(rows_B: Tensor, end_tokens: frozenset[int]) -> list[list[int]]:
        return prompts_of(tokens, rows_B, settings.prompt_tokens, end_tokens)

    texts = written(settings, job, rows, prompts, "teacher", lambda: teacher)

    def batch(step: int) -> Batch:
        chosen = [texts[row] for row in batch_rows(settings, len(texts), step).tolist()]
        return completed([prompt for prompt, _ in chosen], [new for _, new in chosen])

    return batch


def _made_by_main(step: int) -> Batch:
    raise RuntimeError(f"a process beside the main one was about to make the batch of step {step}")


def written(
    settings: Completing,
    job: Job,
    rows: Sequence[int],
    prompts: Prompts,
    writer: str,
    source: Callable[[], Checkpoint],
) -> list[tuple[list[int], list[int]]]:
    """The prompts of `rows`, and what the model called `writer` says behind them. It is generated once and kept, a
    number of rows at a time: a run that was killed goes on with the next ones. A row has the same seed whoever
    writes, so that two models differ by their weights alone."""
    texts: list[tuple[list[int], list[int]]] = []
    sampler: Sampler | None = None
    kept = "completions" if writer == "teacher" else f"{writer}-completions"
    job.events(Started(STAGE, len(rows), "prompt"))
    for start in range(0, len(rows), MOST_AT_ONCE):
        rows_B = torch.tensor(rows[start : start + MOST_AT_ONCE])

        def of_rows(rows_B: Tensor = rows_B) -> dict[str, Tensor]:
            nonlocal sampler
            if sampler is None:
                sampler = sampler_of(job, source(), settings.sampling(MOST_AT_ONCE))
            begun = prompts(rows_B, sampler.end_tokens)
            seeds = [number_of("teacher", settings.seed, row) for row in rows_B.tolist()]
            return _packed(begun, sampler.complete(begun, seeds))

        texts += _unpacked(job.keep(f"{kept}-{start:08d}", of_rows))
        job.events(Progress(STAGE, len(texts), len(rows)))
    job.events(Finished(STAGE, f"{sum(len(new) for _, new in texts):,} tokens by the {writer}"))
    return texts


def _packed(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    rows = [[*prompt, *new] for prompt, new in zip(prompts, completions, strict=True)]
    return {
        "ids": torch.tensor([token for row in rows for token in row]),
        "prompt_tokens": torch.tensor([len(prompt) for prompt in prompts]),
        "new_tokens": torch.tensor([len(new) for new in completions]),
    }


def _unpacked(tensors: Mapping[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    ids, start, found = tensors["ids"].tolist(), 0, []
    for prompt, new in zip(tensors["prompt_tokens"].tolist(), tensors["new_tokens"].tolist(), strict=True):
        found.append((ids[start : start + prompt], ids[start + prompt : start + prompt + new]))
        start += prompt + new
    return found
