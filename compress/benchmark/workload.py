"""Workload: the requests of a benchmark, drawn with a seed or taken from a trace, cut to what the model can take.

Prompts are random token ids: the runtime's speed depends on their number, not on what they say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.benchmark.lengths import Lengths
from compress.benchmark.traces import BLOCK_TOKENS, Shape, read_trace
from compress.core.errors import UsageError

MOST_REQUESTS = 1_000_000
_SEEDS = 1 << 63
_PROMPT, _OUTPUT = "256", "64"
_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(x?)")


@dataclass(frozen=True)
class Asked:
    """What to send. prompt_tokens, output_tokens: see Lengths; a trace brings its own. rate: None sends all at once,
    "2" is two requests a second on average, "0.5x" half the trace's own pace."""

    requests: int = 32
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    trace: Path | None = None
    rate: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """Token ids that arrive after so many seconds, and how many tokens are to be generated."""

    arrival_seconds: float
    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival, and what there is to say about them."""

    requests: tuple[Request, ...]
    description: dict[str, Any]
    notices: tuple[str, ...] = ()

    @property
    def longest_tokens(self) -> int:
        """Of the longest request, prompt and answer together."""
        return max(len(request.prompt) + request.output_tokens for request in self.requests)


def make_workload(asked: Asked, *, max_length: int, vocabulary: int) -> Workload:
    """Requests for a model that takes `max_length` tokens. UsageError: makes no sense; InputError: a bad trace."""
    if not 1 <= asked.requests <= MOST_REQUESTS:
        raise UsageError(f"goes from 1 to {MOST_REQUESTS:,}, not {asked.requests}", where="--requests")
    if not 0 <= asked.seed < _SEEDS:
        raise UsageError(f"goes from 0 to {_SEEDS - 1}, not {asked.seed}", where="--seed")
    shapes, source = _from_trace(asked) if asked.trace else _synthetic(asked)
    paced, pace = _paced(shapes, asked)
    fitting = [_cut(shape, max_length) for shape in paced]
    requests = tuple(
        Request(shape.arrival_seconds, _prompt(shape, asked.seed, number, vocabulary), shape.output_tokens)
        for number, shape in enumerate(fitting)
    )
    description = {
        "source": source,
        "requests": len(requests),
        "prompt_tokens": sum(shape.prompt_tokens for shape in fitting),
        "output_tokens": sum(shape.output_tokens for shape in fitting),
        "longest_tokens": max(shape.prompt_tokens + shape.output_tokens for shape in fitting),
        "arrivals": pace,
        "seed": asked.seed,
    }
    return Workload(requests, description, tuple(_notices(asked, shapes, fitting, max_length)))


def _synthetic(asked: Asked) -> tuple[list[Shape], str]:
    prompt, output = asked.prompt_tokens or _PROMPT, asked.output_tokens or _OUTPUT
    random = np.random.default_rng([asked.seed, 0])
    prompts = Lengths.parse(prompt, "--prompt-tokens").draw(asked.requests, random)
    outputs = Lengths.parse(output, "--output-tokens").draw(asked.requests, random)
    shapes = [Shape(0.0, *lengths) for lengths in zip(prompts, outputs, strict=True)]
    return shapes, f"drawn: prompts of {prompt} tokens, answers of {output}"


def _from_trace(asked: Asked) -> tuple[list[Shape], str]:
    for option, value in (("--prompt-tokens", asked.prompt_tokens), ("--output-tokens", asked.output_tokens)):
        if value is not None:
            raise UsageError("a trace brings its own lengths: leave this out, or --trace", where=option)
    path = Path(str(asked.trace))
    return read_trace(path, asked.requests), f"trace {path.name}"


def _paced(shapes: Sequence[Shape], asked: Asked) -> tuple[list[Shape], str]:
    """When requests arrive, and that in words."""
    if asked.rate is None:
        return [replace(shape, arrival_seconds=0.0) for shape in shapes], "all at once"
    match = _RATE.fullmatch(asked.rate.strip())
    if match is None or not 1e-4 <= float(match[1]) <= 1e6:
        raise UsageError(
            f"is requests a second (2) or a multiple of the trace's own pace (0.5x), not {asked.rate!r}", where="--rate"
        )
    rate = float(match[1])
    if asked.trace is None:
        if match[2]:
            raise UsageError("only a trace has a pace of its own: give requests a second", where="--rate")
        gaps = np.random.default_rng([asked.seed, 1]).exponential(1 / rate, size=len(shapes))
        times = np.cumsum(gaps) - gaps[0]
        paced = [replace(shape, arrival_seconds=float(time)) for shape, time in zip(shapes, times, strict=True)]
        return paced, f"at random (Poisson), {rate:g} a second on average"
    last = shapes[-1].arrival_seconds
    if match[2]:
        factor, words = 1 / rate, f"at {rate:g} × the trace's own pace"
    else:
        factor, words = _stretch(shapes, rate), f"as in the trace, {rate:g} a second on average"
    if last == 0 and len(shapes) > 1:
        words += " (these arrived together)"
    return [replace(shape, arrival_seconds=shape.arrival_seconds * factor) for shape in shapes], words


def _stretch(shapes: Sequence[Shape], rate: float) -> float:
    last = shapes[-1].arrival_seconds
    return (len(shapes) - 1) / rate / last if last else 1.0


def _cut(shape: Shape, max_length: int) -> Shape:
    """The request within the model's limit: the answer keeps its length up to half of it, the prompt gives way."""
    if shape.prompt_tokens + shape.output_tokens <= max_length:
        return shape
    output = min(shape.output_tokens, max(1, max_length - shape.prompt_tokens, max_length // 2))
    prompt = max(1, min(shape.prompt_tokens, max_length - output))
    return replace(shape, prompt_tokens=prompt, output_tokens=output)


def _prompt(shape: Shape, seed: int, number: int, vocabulary: int) -> list[int]:
    if not shape.blocks:
        return np.random.default_rng([seed, 2, number]).integers(vocabulary, size=shape.prompt_tokens).tolist()
    needed = shape.blocks[: -(-shape.prompt_tokens // BLOCK_TOKENS)]
    parts = [np.random.default_rng([seed, 3, block]).integers(vocabulary, size=BLOCK_TOKENS) for block in needed]
    return np.concatenate(parts)[: shape.prompt_tokens].tolist()


def _notices(asked: Asked, shapes: Sequence[Shape], fitting: Sequence[Shape], max_length: int) -> list[str]:
    notices = []
    lengths = [
        (before.prompt_tokens + before.output_tokens, after.prompt_tokens + after.output_tokens)
        for before, after in zip(shapes, fitting, strict=True)
    ]
    cut = sum(before != after for before, after in lengths)
    if cut:
        share = sum(after for _, after in lengths) / sum(before for before, _ in lengths)
        notices.append(
            f"{cut} of {len(shapes)} requests were cut to the model's limit of {max_length:,} tokens; "
            f"{100 * share:.0f} % of all tokens are left"
        )
    if len(shapes) < asked.requests:
        notices.append(f"the trace holds {len(shapes)} requests, not {asked.requests}")
    return notices
