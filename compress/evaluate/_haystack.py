"""The text that facts are hidden in: sentences of a data set, or filler of our own that says nothing.

Consecutive sentences from a place drawn with the seed; a text that is too short begins again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.documents import read_documents
from compress.core.errors import InputError

if TYPE_CHECKING:
    from compress.core.recipe_sections import LongContext

_WHO = ("The old boat", "A quiet river", "The north wind", "Every lamp", "The long road", "A grey cat", "The garden")
_DOES = ("waits for", "passes by", "knows nothing of", "turns towards", "rests beside", "remembers", "looks over")
_WHAT = ("the empty house", "the green hill", "a wooden bridge", "the market square", "the first snow", "an open gate")
_WHEN = ("in the morning", "at noon", "before the rain", "when nobody is there", "day after day", "without a sound")
_MOST_CHARACTERS = 1 << 23


@dataclass(frozen=True)
class Haystack:
    """Sentences in order, and the text that they came from (None: filler)."""

    sentences: tuple[str, ...]
    text: str | None = None

    def from_place(self, number: int, count: int) -> list[str]:
        """`count` sentences, beginning with one of any number."""
        return [self.sentences[(number + step) % len(self.sentences)] for step in range(count)]


def filler(seed: int) -> Haystack:
    """Plain sentences with nothing in them to remember, all different ones in an order drawn with the seed."""
    parts = [(who, does, what, when) for who in _WHO for does in _DOES for what in _WHAT for when in _WHEN]
    random.Random(seed).shuffle(parts)
    return Haystack(tuple(" ".join(part) + "." for part in parts))


def read_haystack(asked: LongContext, base_folder: Path | str | None, *, offline: bool, seed: int) -> Haystack:
    """The sentences of the data set that `asked` names, or filler. InputError for a data set without text."""
    if asked.dataset is None:
        return filler(seed)
    documents = read_documents(
        asked.dataset, field=asked.field, split=asked.split, base_folder=base_folder, offline=offline
    )
    text = "\n\n".join(document for document in documents if isinstance(document, str))[:_MOST_CHARACTERS]
    sentences = tuple(_sentences(text))
    if not sentences:
        raise InputError("the dataset holds no sentence to hide a fact among", where=asked.dataset)
    return Haystack(sentences, text)


def _sentences(text: str) -> Sequence[str]:
    return [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]
