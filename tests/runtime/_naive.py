"""Drives a Decoder without engine or scheduler: pages in no order, handed out as sequences grow, never given back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtime.cache import KVCache
from runtime.loader import load
from runtime.models.decoder import Decoder
from runtime.ops.batch import AttentionBatch

BLOCK = 4


class NaiveRunner:
    """Feeds tokens of several sequences in one flat batch a step."""

    def __init__(self, model: Decoder, pages: int = 128, seed: int = 0) -> None:
        self.model = model
        self.cache = KVCache(model.config, pages, BLOCK, dtype=model.dtype, policy=model.kv_policy)
        self._free = list(range(pages))
        random.Random(seed).shuffle(self._free)
        self._tables: dict[int, list[int]] = {}
        self._stored: dict[int, int] = {}

    def step(self, fed: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Logits of all the tokens fed, by sequence."""
        stored = [self._stored.get(sequence, 0) for sequence in fed]
        counts = [len(tokens) for tokens in fed.values()]
        for sequence, before, count in zip(fed, stored, counts, strict=True):
            table = self._tables.setdefault(sequence, [])
            while len(table) * BLOCK < before + count:
                table.append(self._free.pop())
            self._stored[sequence] = before + count
        tables = [self._tables[sequence] for sequence in fed]
        batch = AttentionBatch.build(stored, counts, stored, tables, block_size=BLOCK)
        ids_T = torch.tensor([token for tokens in fed.values() for token in tokens])
        logits_TV = self.model(ids_T, batch, self.cache, None)
        return dict(zip(fed, logits_TV.split(counts), strict=True))

    def feed(self, prompts: Sequence[Sequence[int]], schedule: Sequence[Mapping[int, int]]) -> list[Tensor]:
        """All logits of each prompt, fed as the schedule says: how many tokens of which prompt in each step. What a
        schedule leaves over goes in one last step."""
        found: list[list[Tensor]] = [[] for _ in prompts]
        at = [0] * len(prompts)
        rest = {index: len(prompt) for index, prompt in enumerate(prompts)}
        for wanted in [*schedule, rest]:
            fed = {}
            for index, count in wanted.items():
                tokens = prompts[index][at[index] : at[index] + count]
                if tokens:
                    fed[index] = tokens
                    at[index] += len(tokens)
            if fed:
                for index, logits in self.step(fed).items():
                    found[index].append(logits)
        return [torch.cat(parts) for parts in found]

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`count` tokens after each prompt, all sequences in one batch."""
        fed: dict[int, Sequence[int]] = dict(enumerate(prompts))
        answers: list[list[int]] = [[] for _ in prompts]
        for _ in range(count):
            for index, logits in self.step(fed).items():
                answers[index].append(int(logits[-1].argmax()))
            fed = {index: answer[-1:] for index, answer in enumerate(answers)}
        return answers


def exact(folder: Path) -> NaiveRunner:
    """The model of a folder in exact numerics, with an empty cache."""
    return NaiveRunner(load(folder, numerics="exact"))


def prompts_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
