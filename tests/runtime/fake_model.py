"""A model whose logits are a function of all tokens before, read back through the pages it is given.

It keeps each token in its slot and, for each row asked for, reads the whole sequence from the cache. So whatever goes
wrong with pages, slots, copies or positions changes the tokens that come out, or meets a slot that was never written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch

from runtime.blocks import BlockPool
from runtime.engine import Engine, EngineSettings
from runtime.ops.batch import AttentionBatch
from runtime.page import PageType
from runtime.runner import Runner
from runtime.sample import Update
from runtime.scheduler import SchedulerSettings

VOCABULARY = 97
POISON = 13  # a prompt that begins with it has no usable logits


class FakeCache:
    """One token id per slot; -1 where nothing was written."""

    def __init__(self, pages: int, block_size: int) -> None:
        self.pages = pages
        self.block_size = block_size
        self.frames = None
        self.slots = np.full(pages * block_size, -1)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        pages = self.slots.reshape(self.pages, self.block_size)
        for source, target in copies:
            pages[target] = pages[source]


class FakeModel:
    """next_logits of what the pages say."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        self.config = SimpleNamespace(vocab=vocabulary)
        self.fail_at: int | None = None
        self.calls = 0
        self.most_rows = 0

    def __call__(
        self, ids_T: torch.Tensor, batch: AttentionBatch, cache: FakeCache, rows: torch.Tensor
    ) -> torch.Tensor:
        return self.logits(self.hidden(ids_T, batch, cache)[rows])

    def hidden(self, ids_T: torch.Tensor, batch: AttentionBatch, cache: FakeCache) -> torch.Tensor:
        """The number of each row."""
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the machine is on fire")
        cache.slots[batch.slot_T.numpy()] = ids_T.numpy()
        self.step = batch, cache
        return torch.arange(len(ids_T))[:, None]

    def logits(self, x_NK: torch.Tensor) -> torch.Tensor:
        self.most_rows = max(self.most_rows, len(x_NK))
        logits = [self._logits(int(row), *self.step) for row in x_NK[:, 0]]
        return torch.stack(logits) if logits else torch.zeros(0, self.config.vocab)

    def _logits(self, row: int, batch: AttentionBatch, cache: FakeCache) -> torch.Tensor:
        sequence = next(s for s, end in enumerate(batch.starts[1:]) if row < end)
        length = int(batch.position_T[row]) + 1
        assert length <= batch.kv_len[sequence]
        slots = np.arange(length)
        pages = batch.table_SP[sequence].numpy()[slots // cache.block_size]
        tokens = cache.slots[pages * cache.block_size + slots % cache.block_size]
        assert (tokens >= 0).all(), "a slot was read that was never written"
        return next_logits(tokens.tolist(), self.config.vocab)


def next_logits(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> torch.Tensor:
    return _logits_after(tuple(tokens), vocabulary)


@lru_cache(maxsize=20_000)
def _logits_after(tokens: tuple[int, ...], vocabulary: int) -> torch.Tensor:
    if tokens[0] == POISON:
        return torch.full((vocabulary,), math.nan)
    seed = int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(2 * np.random.default_rng(seed).standard_normal(vocabulary)).float()


def greedy(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """What the fake model says next, with no engine in between."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(tokens).argmax()))
    return tuple(tokens[len(prompt) :])


@dataclass
class Told:
    """All updates of one completion, put together."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple = ()
    prompt_logprobs: tuple | None = None
    finish_reason: str | None = None

    def take(self, update: Update) -> None:
        assert self.finish_reason is None, "an update after the last one"
        self.text += update.text
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        if update.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            self.prompt_logprobs = update.prompt_logprobs
        self.finish_reason = update.finish_reason


def make_engine(
    pages: int = 64,
    block_size: int = 4,
    *,
    tokenizer: object = None,
    end_tokens: tuple[int, ...] = (),
    max_length: int = 200,
    recorder: object = None,
    seed: int | None = 0,
    **scheduler: object,
) -> Engine:
    runner = Runner(FakeModel(), FakeCache(pages, block_size))
    pool = BlockPool(pages, PageType("fake", 8 * block_size, block_size))
    settings = EngineSettings(max_length, end_tokens, seed, SchedulerSettings(**scheduler))
    return Engine(runner, pool, tokenizer, settings, recorder=recorder)


def run(engine: Engine, most_steps: int = 2000) -> dict[tuple[str, int], Told]:
    """Step until nothing is left, checking after each step that nothing leaks."""
    told: dict[tuple[str, int], Told] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            break
        for update in engine.step():
            told.setdefault((update.request, update.index), Told()).take(update)
        engine.check_integrity()
    assert not engine.has_work
    statistics = engine.stats().pages
    assert statistics.owned == 0
    assert statistics.free + statistics.cached == engine.scheduler.pool.pages
    return told
