"""One completion in the making: what its tokens mean, whether it is finished, and what is new about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runtime.detokenizer import Detokenizer, StopStrings, TextDecoder
from runtime.logprobs import TokenLogprobs
from runtime.params import SamplingParams
from runtime.sampler import Picker

PromptLogprobs = tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True)
class Update:
    """What is new about one completion: `text` and `token_ids` continue those of earlier updates.

    finish_reason is None until the last update of the completion: "stop" (stop string, stop token, end of text),
    "length" (max_tokens, or the model's longest sequence), "abort", or "error" (the model gave no usable logits).
    logprobs has one entry per token where asked for; prompt_logprobs comes once, with the first token: one entry per
    prompt token, None where there is none (the first token, and those before `prompt_logprobs_start`).
    """

    request: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None


class PromptScores:
    """Log-probabilities of a prompt's tokens, gathered chunk by chunk; what is known is not asked for again."""

    def __init__(self, prompt: Sequence[int], first: int, top: int) -> None:
        self.prompt = prompt
        self.top = top
        self._next = min(first, len(prompt))
        self._found: list[TokenLogprobs | None] = [None] * self._next

    @property
    def first(self) -> int:
        """The first position whose logits are needed: those that foretell the next unknown token."""
        return self._next - 1

    def wanted(self, start: int, stop: int) -> range:
        """Of the positions [start, stop) that a step computes, those whose logits are needed."""
        return range(max(start, self._next - 1), min(stop, len(self.prompt) - 1))

    def targets(self, positions: range) -> list[int]:
        """The tokens that stand after `positions`."""
        return list(self.prompt[positions.start + 1 : positions.stop + 1])

    def take(self, logprobs: Iterable[TokenLogprobs]) -> bool:
        """The log-probabilities of the next tokens; False if some are no numbers."""
        found = [entry.with_top(self.top) for entry in logprobs]
        self._found += found
        self._next += len(found)
        return not any(math.isnan(entry.logprob) for entry in found)

    def result(self) -> PromptLogprobs:
        """One entry per prompt token."""
        return tuple(self._found)


class Sample:
    """The state of one completion beside its pages: settings, text, and what was not reported yet."""

    def __init__(
        self,
        request: str,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        decoder: TextDecoder | None,
        end_tokens: frozenset[int],
        seed: str,
    ) -> None:
        self.request = request
        self.index = index
        self.params = params
        self.picker = Picker(params, prompt, seed, index)
        self.scores: PromptScores | None = None
        if params.prompt_logprobs is not None:
            self.scores = PromptScores(prompt, params.prompt_logprobs_start, params.prompt_logprobs)
        self.finish_reason: str | None = None
        self._end_tokens = end_tokens.union(params.stop_token_ids)
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(params.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._reported_scores = False

    def take(self, token: int, logprobs: TokenLogprobs | None) -> str | None:
        """A generated token; "stop" if it ends the completion."""
        self._tokens.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if token in self._end_tokens:
            return "stop"
        self._text.append(self._stops.push(self._detokenizer.push(token)))
        return "stop" if self._stops.found is not None else None

    def finish(self, reason: str) -> None:
        """No token will follow: let go what was held back."""
        self.finish_reason = reason
        self._text.append(self._stops.push(self._detokenizer.flush()))
        self._text.append(self._stops.flush())

    def report(self) -> Update:
        """What is new since the last report."""
        scores = None
        if self.scores is not None and not self._reported_scores and (self._tokens or self.finish_reason):
            scores, self._reported_scores = self.scores.result(), True
        update = Update(
            self.request,
            self.index,
            "".join(self._text),
            tuple(self._tokens),
            self.finish_reason,
            tuple(self._logprobs),
            scores,
        )
        self._text, self._tokens, self._logprobs = [], [], []
        return update
