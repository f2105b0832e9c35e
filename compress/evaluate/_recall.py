"""Questions about facts in long contexts, as prompts that a model has only to go on with.

passkey: Mohtashami & Jaggi 2023, https://arxiv.org/abs/2305.16300. needle and multi_key: the forms of RULER (Hsieh et
al. 2024, https://arxiv.org/abs/2404.06654). table: one row of many. All answers are numbers of five digits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.core.errors import UsageError
from compress.evaluate._haystack import Haystack, filler

if TYPE_CHECKING:
    from compress.core.calibration import Encoder
    from compress.core.recipe_sections import LongContext

KEYS = (
    "amber", "birch", "cobalt", "denim", "emerald", "falcon", "garnet", "harbor",
    "indigo", "jasmine", "kettle", "lantern", "meadow", "nickel", "orchid", "pepper",
    "quartz", "ribbon", "saffron", "tundra", "umbra", "velvet", "walnut", "xenon",
    "yarrow", "zephyr", "anchor", "basalt", "candle", "dahlia", "engine", "fossil",
)  # fmt: skip
FACTS = 4  # of multi_key
ROOM = 16  # tokens that an answer may take beyond the right one
_TOKENS_PER_ROW = 64  # of the whole prompt: a longer one holds a longer table


@dataclass(frozen=True)
class Question:
    """A prompt as a text, its right answer, and how far down the fact stands (0 first, 1 last)."""

    task: str
    length: int
    number: int
    depth: float
    text: str
    answer: str

    def ids(self, encode: Encoder) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer; a space between them goes where the tokenizer has it."""
        return encode.split(f"{self.text} ", self.answer)


def questions(asked: LongContext, haystack: Haystack, encode: Encoder, seed: int) -> list[Question]:
    """All that `asked` wants, each as long as its length allows. The same seed asks the same questions."""
    plain = filler(seed)
    return [
        _fitted(task, length, number, asked.samples, plain if task == "passkey" else haystack, encode, seed)
        for task in asked.tasks
        for length in asked.lengths
        for number in range(asked.samples)
    ]


def _fitted(
    task: str, length: int, number: int, samples: int, haystack: Haystack, encode: Encoder, seed: int
) -> Question:
    """The question with as many sentences around its fact as fit in `length` tokens, answer and room included."""
    depth = number / (samples - 1) if samples > 1 else 0.5
    drawn = random.Random(f"{seed} {task} {length} {number}")
    facts, ask, answer = _facts(task, length, drawn)
    start = drawn.randrange(len(haystack.sentences))
    places = [depth, *(drawn.random() for _ in facts[1:])]

    def built(count: int) -> Question:
        lines = haystack.from_place(start, count)
        for fact, place in sorted(zip(facts, places, strict=True), key=lambda pair: -pair[1]):
            lines.insert(round(place * count), fact)
        return Question(task, length, number, round(depth, 4), f"{' '.join(lines)}\n{ask}", answer)

    def tokens(count: int) -> int:
        return sum(map(len, built(count).ids(encode))) + ROOM

    if tokens(0) > length:
        raise UsageError(
            f"a question of {task} alone takes {tokens(0)} of the model's tokens, more than {length}",
            where="evaluate.long_context.lengths",
        )
    low, high = 0, 2
    while tokens(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return built(low)


def _facts(task: str, length: int, drawn: random.Random) -> tuple[list[str], str, str]:
    """(facts, the one that is asked first; how the question begins; its answer)."""
    count = {"passkey": 1, "needle": 1, "multi_key": FACTS, "table": min(max(length // _TOKENS_PER_ROW, 4), len(KEYS))}
    keys = drawn.sample(KEYS, count[task])
    values = [str(value) for value in drawn.sample(range(10_000, 100_000), len(keys))]
    if task == "passkey":
        return [f"The pass key is {values[0]}. Remember it."], "The pass key is", values[0]
    if task == "table":
        row = drawn.randrange(len(keys))
        rows = "\n".join(f"| {key} | {value} |" for key, value in zip(keys, values, strict=True))
        return [f"\n| name | code |\n| --- | --- |\n{rows}\n"], f"| {keys[row]} |", values[row]
    facts = [f"The code of {key} is {value}." for key, value in zip(keys, values, strict=True)]
    return facts, f"The code of {keys[0]} is", values[0]
