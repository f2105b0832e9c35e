"""Lengths: how many tokens prompts and answers have, as people write it: 128, 64-512, lognormal:256,0.8 …"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.core.errors import UsageError

MOST_TOKENS = 10_000_000
MOST_SIGMA = 5.0
_NUMBER = r"(\d+(?:\.\d+)?)"
_FORMS = "a number (128), a range (64-512), lognormal:MEAN,SIGMA or exponential:MEAN"


@dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers from 1 on: `low` to `high` evenly, or around `mean` (sigma: of the logarithm)."""

    kind: Literal["uniform", "lognormal", "exponential"]
    low: int = 1
    high: int = 1
    mean: float = 1.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str = "lengths") -> Lengths:
        """Of what a person wrote; UsageError says what `option` may be."""
        text = text.strip()
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
            low, high = int(match[1]), int(match[2] or match[1])
            if not 1 <= low <= high <= MOST_TOKENS:
                raise UsageError(f"goes from 1 to {MOST_TOKENS:,} tokens, small to large, not {text}", where=option)
            return cls("uniform", low, high)
        if match := re.fullmatch(rf"lognormal:{_NUMBER},{_NUMBER}", text):
            return cls("lognormal", mean=_mean(match[1], option), sigma=_sigma(match[2], option))
        if match := re.fullmatch(rf"exponential:{_NUMBER}", text):
            return cls("exponential", mean=_mean(match[1], option))
        raise UsageError(f"is {_FORMS}, not {text!r}", where=option)

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        """`count` lengths."""
        if self.kind == "uniform":
            values = random.integers(self.low, self.high, size=count, endpoint=True)
        elif self.kind == "lognormal":
            values = random.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, size=count)
        else:
            values = random.exponential(self.mean, size=count)
        return [min(MOST_TOKENS, max(1, round(float(value)))) for value in values]


def _mean(text: str, option: str) -> float:
    mean = float(text)
    if not 1 <= mean <= MOST_TOKENS:
        raise UsageError(f"a mean goes from 1 to {MOST_TOKENS:,} tokens, not {text}", where=option)
    return mean


def _sigma(text: str, option: str) -> float:
    sigma = float(text)
    if sigma > MOST_SIGMA:
        raise UsageError(f"sigma is that of the logarithm, at most {MOST_SIGMA:g}, not {text}", where=option)
    return sigma
