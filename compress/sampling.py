"""Sampling: the service by which a method hears what a model says, through our own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.core.errors import InputError
from compress.core.services import Sampling

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

PREFILL_TOKENS = 512  # of prompts that a step reads at once


class RuntimeSampler:
    """A checkpoint in the runtime; see compress.core.services.Sampler."""

    def __init__(self, source: Checkpoint, sampling: Sampling, device: str) -> None:
        from runtime.llm import LLM

        self._sampling = sampling
        self._llm = LLM(
            source,
            numerics="exact",
            device=device,
            max_length=sampling.prompt_tokens + sampling.new_tokens,
            max_sequences=sampling.at_once,
            token_budget=max(PREFILL_TOKENS, sampling.at_once),
        )
        self.end_tokens = frozenset(self._llm.engine.settings.end_tokens)

    def refresh(self, source: Checkpoint) -> None:
        self._llm.refresh(source)

    def complete(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        from runtime.params import SamplingParams

        asked = self._sampling
        params = [
            SamplingParams(asked.new_tokens, temperature=asked.temperature, top_p=asked.top_p, seed=seed)
            for seed in seeds
        ]
        completions = self._llm.generate(prompts, params)
        if any(completion.finish_reason == "error" for completion in completions):
            raise InputError("the model that completes the prompts gives logits that are no numbers")
        return [list(completion.token_ids) for completion in completions]
