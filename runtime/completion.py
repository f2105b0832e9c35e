"""Completions: what prompts became, put together from updates."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.logprobs import TokenLogprobs
from runtime.sample import PromptLogprobs, Update


@dataclass(frozen=True)
class Completion:
    """What a prompt became. `index` tells the completions of one prompt apart (n > 1); see Update for the rest."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    index: int = 0


class Drafts:
    """Completions in the making, in the order of their requests."""

    def __init__(self) -> None:
        self._updates: dict[str, list[list[Update]]] = {}  # by request, then index
        self._left: dict[str, int] = {}  # unfinished completions by request

    def __contains__(self, request: str) -> bool:
        return request in self._updates

    @property
    def open(self) -> bool:
        """Whether any is unfinished."""
        return bool(self._left)

    def unfinished(self) -> list[str]:
        """Requests that have not ended."""
        return list(self._left)

    def expect(self, request: str, samples: int) -> None:
        """A request with so many completions was added."""
        self._updates[request] = [[] for _ in range(samples)]
        self._left[request] = samples

    def take(self, updates: list[Update]) -> None:
        """News of requests that are expected."""
        for update in updates:
            self._updates[update.request][update.index].append(update)
            if update.finish_reason is not None:
                self._left[update.request] -= 1
                if not self._left[update.request]:
                    del self._left[update.request]

    def completions(self) -> list[Completion]:
        """All of them, finished or not."""
        return [_completion(updates) for samples in self._updates.values() for updates in samples]


def _completion(updates: list[Update]) -> Completion:
    return Completion(
        "".join(update.text for update in updates),
        tuple(token for update in updates for token in update.token_ids),
        updates[-1].finish_reason or "",
        tuple(entry for update in updates for entry in update.logprobs),
        next((update.prompt_logprobs for update in updates if update.prompt_logprobs is not None), None),
        updates[-1].index,
    )
