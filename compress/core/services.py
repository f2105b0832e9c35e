"""What a pass may need from its siblings, as protocols that the pipeline fills and a Job carries."""

from collections.abc import Sequence
from typing import Protocol


class Sampler(Protocol):
    """Writes continuations of token prompts with the current student."""

    def __call__(self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float) -> list[list[int]]: ...


class TeacherWriter(Protocol):
    """Writes a teacher's top logits for token batches into a folder."""

    def __call__(self, batches: Sequence[Sequence[int]], folder: str) -> None: ...
