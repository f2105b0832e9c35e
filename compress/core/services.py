"""What a pass may need from its siblings, as protocols that the pipeline fills and a Job carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Sampling:
    """How prompts are completed: at most so many tokens behind a prompt of at most so many, so many prompts at a time;
    temperature 0 takes the likeliest token."""

    prompt_tokens: int
    new_tokens: int
    temperature: float
    top_p: float
    at_once: int


class Sampler(Protocol):
    """A model in the bundled runtime, in exact numerics: a completion follows from weights, prompt and seed alone,
    whatever is completed beside it."""

    end_tokens: frozenset[int]
    """With these a completion ends; it is its last token then."""

    def refresh(self, source: Checkpoint) -> None:
        """Take the weights of a checkpoint of the same shapes."""
        ...

    def complete(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """The tokens behind each prompt. InputError if the model gives no numbers to choose by."""
        ...


class OpenSampler(Protocol):
    """Loads a checkpoint into the runtime."""

    def __call__(self, source: Checkpoint, sampling: Sampling) -> Sampler: ...
