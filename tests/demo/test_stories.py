"""The demo's own stories: enough of them, well-formed, and no two alike."""

import json
import re
from pathlib import Path

import pytest

from compress.demo import CALIBRATION, EVALUATION


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shingles(text: str, length: int = 6) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize("path", [CALIBRATION, EVALUATION], ids=lambda path: path.stem)
def test_every_line_is_one_plain_story(path):
    rows = read(path)
    assert len(rows) >= 60
    for row in rows:
        text = row["text"]
        assert set(row) == {"text"}
        assert text == text.strip()
        assert text.isascii()
        assert text.isprintable()
        assert text[-1] in '.!?"'
        assert text.count('"') % 2 == 0
        assert 60 <= len(text.split()) <= 180


def test_no_two_stories_share_more_than_a_few_words_in_a_row():
    texts = [row["text"] for path in (CALIBRATION, EVALUATION) for row in read(path)]
    assert len(texts) >= 120
    assert len(set(texts)) == len(texts)
    parts = [shingles(text) for text in texts]
    for i, first in enumerate(parts):
        for second in parts[:i]:
            assert len(first & second) <= 3


def test_calibration_and_evaluation_have_no_story_in_common():
    calibration = {row["text"] for row in read(CALIBRATION)}
    assert calibration.isdisjoint(row["text"] for row in read(EVALUATION))
