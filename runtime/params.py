"""How tokens are chosen for one request, checked when it is written down so that no bad value reaches a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from compress.core.errors import UsageError

GREEDY_BELOW = 1e-5  # a temperature under which the largest logit wins for certain in fp32
MOST_STOPS = 64
MOST_SAMPLES = 256
MOST_LOGPROBS = 1024
_SEEDS = 1 << 63
_MOST_TOKENS = 1 << 31


class SamplingSettings(TypedDict, total=False):
    """The fields of SamplingParams as keywords of a call."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    prompt_logprobs_start: int
    n: int


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request. Every value is honoured or refused (UsageError names the field); none is ignored.

    max_tokens: tokens to generate at most; 0 only reads the prompt, for its log-probabilities.
    temperature: 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token. The order is that of transformers:
        penalties, temperature, top_k, top_p (of what top_k left), min_p (relative to the likeliest token).
    repetition_penalty: over prompt and generated tokens, positive logits divided and negative ones multiplied by it
        (Keskar et al. 2019); presence_penalty is subtracted once for each token generated so far, frequency_penalty
        for each occurrence.
    stop: texts that end the request; they are cut off, also where they run across tokens. stop_token_ids: tokens that
        end it; they stay in `token_ids` and are left out of `text`. ignore_eos: the model's own do not end it.
    seed: the same seed gives the same tokens; in `exact` numerics whatever else is in the batch, in `fast` as far as
        the batch does not change a logit's last bits. None draws one.
    logprobs, prompt_logprobs: None for none, else how many of the likeliest tokens to report beside the token itself;
        of the model's own distribution, before penalties and temperature.
    prompt_logprobs_start: first prompt position that is reported; what lies before may come from the prefix cache.
    n: completions of the same prompt, which is computed once.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1
    n: int = 1

    def __post_init__(self) -> None:
        for name, low, high in _WHOLE:
            _check_whole(name, getattr(self, name), low, high)
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), *_OPTIONAL[name])
        for name, low, high in _REAL:
            object.__setattr__(self, name, _real(name, getattr(self, name), low, high))
        if self.top_p == 0.0:
            raise UsageError("top_p must be above 0 (use temperature=0 for the likeliest token)")
        if self.repetition_penalty == 0.0:
            raise UsageError("repetition_penalty must be above 0 (1 means none)")
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens seen before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> SamplingParams:
        """Params from keywords; an unknown one is refused by name."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise UsageError(f"unknown sampling setting {unknown[0]}", hint=f"known: {', '.join(known)}")
        return cls(**settings)


_WHOLE = (
    ("max_tokens", 0, _MOST_TOKENS),
    ("top_k", 0, _MOST_TOKENS),
    ("prompt_logprobs_start", 1, _MOST_TOKENS),
    ("n", 1, MOST_SAMPLES),
)
_OPTIONAL = {"seed": (0, _SEEDS), "logprobs": (0, MOST_LOGPROBS), "prompt_logprobs": (0, MOST_LOGPROBS)}
_REAL = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low} to {high}, not {value}")


def _real(name: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise UsageError(f"{name} must be a number, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low:g} to {high:g}, not {value:g}")
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"stop must be a text or a list of texts, not {value!r}")
    if "" in texts:
        raise UsageError("stop must not hold an empty text: it would end every request at once")
    if len(texts) > MOST_STOPS:
        raise UsageError(f"stop holds {len(texts)} texts; at most {MOST_STOPS} are taken")
    return tuple(texts)


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"stop_token_ids must be a list of token ids, not {value!r}")
    for token in value:
        _check_whole("stop_token_ids", token, 0, _MOST_TOKENS)
    return tuple(value)
