"""Story files: reading, de-duplication and the split into training and held-out stories."""

import random
import re
from collections.abc import Iterable
from pathlib import Path

SEPARATOR = "<|endoftext|>"
# In a file without separators paragraphs are divided by empty lines, so that a single line break ends a story.
_SINGLE_LINE_BREAK = re.compile(r"(?<=\S)[ \t]*\n(?=\S)")
_SHORTEST_STORY_CHARACTERS = 150
_SHINGLE_WORDS = 8
_LARGEST_OVERLAP = 0.1


def read_stories(path: Path) -> list[str]:
    """The stories of one text file, stripped, fragments left out.

    Stories are divided by ``<|endoftext|>``; in a file without it by single line breaks.
    """
    text = path.read_text(encoding="utf-8")
    parts = text.split(SEPARATOR) if SEPARATOR in text else _SINGLE_LINE_BREAK.split(text)
    stories = [part.strip() for part in parts]
    return [story for story in stories if len(story) >= _SHORTEST_STORY_CHARACTERS]


def unique_stories(stories: Iterable[str]) -> list[str]:
    """The stories in their order without repetitions; case, space and punctuation do not make a story different."""
    return list({" ".join(_words(story)): story for story in stories}.values())


def split_stories(stories: list[str], held_out_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split whole stories at random into (training, held out).

    A training story is dropped when more than a tenth of its 8-word sequences stand in a held-out story, so that
    the held-out figure is not flattered by near copies.
    """
    shuffled = unique_stories(stories)
    random.Random(seed).shuffle(shuffled)
    held_out_count = max(1, round(held_out_share * len(shuffled)))
    held_out, training = shuffled[:held_out_count], shuffled[held_out_count:]
    held_out_shingles = set().union(*(_shingles(story) for story in held_out))
    return [story for story in training if _overlap(story, held_out_shingles) <= _LARGEST_OVERLAP], held_out


def _words(story: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", story.lower())


def _shingles(story: str) -> set[tuple[str, ...]]:
    words = _words(story)
    return {tuple(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)}


def _overlap(story: str, others: set[tuple[str, ...]]) -> float:
    shingles = _shingles(story)
    return len(shingles & others) / max(1, len(shingles))
