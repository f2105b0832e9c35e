"""Derive the items of the demo's evaluation tasks from its evaluation stories.

    python -m compress.demo.make_tasks [FOLDER]

writes `perplexity.jsonl`, `next_sentence.jsonl` and `word_swap.jsonl` into FOLDER (default: the bundled task folder).
Choices are made by hashing, so that every Python version writes the same bytes; the right answers take turns among the
places, so that no place is a better guess than another.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from compress.core.files import atomic_write
from compress.demo import EVALUATION, TASKS_DIR

_SENTENCE_BREAK = re.compile(r"""(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)\s+(?=["A-Z])|(?<=[.!?]")\s+(?=["A-Z])""")
_TARGETS_PER_STORY = 3
_FIRST_TARGET = 2
_DISTRACTORS = 3
_COMMON_SHARE = 0.1
_SHORTEST_TARGET_WORDS = 5
_SWAPS_PER_STORY = 4
_SHORTEST_SWAP_WORDS = 6


def sentences(story: str) -> list[str]:
    """The sentences of a story; a quotation stays with the words that say who speaks."""
    return _SENTENCE_BREAK.split(story)


def next_sentence_items(stories: list[str]) -> list[dict]:
    """Items of four story beginnings, of which one goes on with the sentence; the others have none of its rare words.

    The sentence is the same for all four, so that only what the model makes of the text before it decides.
    """
    common = _common_words(stories)
    split = [sentences(story) for story in stories]
    items = []
    for number, parts in enumerate(split):
        for position in _target_positions(parts, common):
            sentence = parts[position]
            rare = _words(sentence) - common
            others = [_beginning(other, position) for index, other in enumerate(split) if index != number]
            others = [other for other in others if not _words(other) & rare]
            label = len(items) % (_DISTRACTORS + 1)
            contexts = _shuffled(others, f"next {number} {position}")[:_DISTRACTORS]
            contexts.insert(label, _beginning(parts, position))
            items.append({"contexts": contexts, "sentence": sentence, "label": label})
    return items


def word_swap_items(stories: list[str]) -> list[dict]:
    """Items of two sentences: one as it was written, one with two neighbouring words in each other's place."""
    items = []
    for number, story in enumerate(stories):
        long_enough = [part for part in sentences(story) if len(part.split()) >= _SHORTEST_SWAP_WORDS]
        for sentence in _shuffled(long_enough, f"swap {number}")[:_SWAPS_PER_STORY]:
            label = len(items) % 2
            choices = [_swap_words(sentence)]
            choices.insert(label, sentence)
            items.append({"choices": choices, "label": label})
    return items


def write_tasks(folder: Path, stories: list[str]) -> None:
    """Write the item files of all tasks."""
    _write(folder / "perplexity.jsonl", ({"text": story} for story in stories))
    _write(folder / "next_sentence.jsonl", next_sentence_items(stories))
    _write(folder / "word_swap.jsonl", word_swap_items(stories))


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]{3,}", text.lower()))


def _common_words(stories: list[str]) -> set[str]:
    """The words that so many stories use that they say nothing about any of them."""
    counts = Counter(word for story in stories for word in _words(story))
    return {word for word, count in counts.items() if count > _COMMON_SHARE * len(stories)}


def _beginning(parts: list[str], count: int) -> str:
    return " ".join(parts[:count])


def _target_positions(parts: list[str], common: set[str]) -> list[int]:
    """Where the sentences stand that take up most of what was said before them."""

    def links(position: int) -> int:
        return len((_words(parts[position]) & _words(_beginning(parts, position))) - common)

    long_enough = [i for i in range(_FIRST_TARGET, len(parts)) if len(parts[i].split()) >= _SHORTEST_TARGET_WORDS]
    return sorted(sorted(long_enough, key=links, reverse=True)[:_TARGETS_PER_STORY])


def _swap_words(sentence: str) -> str:
    """Swap two neighbouring words inside the sentence; its first and last word keep capital letter and full stop."""
    words = sentence.split()
    places = [i for i in range(1, len(words) - 2) if words[i].isalpha() and words[i + 1].isalpha()]
    places = [i for i in places if words[i].lower() != words[i + 1].lower()] or [1]
    place = _shuffled(places, f"place {sentence}")[0]
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def _shuffled(items: list, salt: str) -> list:
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}|{item}".encode()).digest())


def _write(path: Path, rows: Iterable[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(path, "".join(lines))


def main() -> None:
    """Write the task items into the folder on the command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TASKS_DIR
    stories = [json.loads(line)["text"] for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    write_tasks(folder, stories)


if __name__ == "__main__":
    main()
