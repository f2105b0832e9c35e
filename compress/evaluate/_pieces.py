"""lm-eval's requests in pieces, with progress as events instead of bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.core.events import Finished, Listener, Progress, Started

_REQUESTS = 128


def in_pieces(answer: Callable[..., list], requests: list, stage: str, events: Listener, size: int = _REQUESTS) -> list:
    """The answers to all requests, `size` at a time."""
    answers: list[Any] = []
    events(Started(stage, len(requests), "request"))
    for start in range(0, len(requests), size):
        answers += answer(requests[start : start + size], disable_tqdm=True)
        events(Progress(stage, len(answers), len(requests)))
    events(Finished(stage, f"{len(answers):,} requests"))
    return answers
