"""The demo's evaluation tasks: made by the script, balanced, and readable by lm-eval."""

import json
from collections import Counter

import pytest

from compress.demo import EVALUATION, TASKS_DIR
from compress.demo.make_tasks import next_sentence_items, sentences, word_swap_items, write_tasks
from compress.evaluate.task_files import read_task_folder

ITEM_FILES = ("perplexity.jsonl", "next_sentence.jsonl", "word_swap.jsonl")


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return [json.loads(line)["text"] for line in EVALUATION.read_text(encoding="utf-8").splitlines()]


def items(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS_DIR / name).read_text(encoding="utf-8").splitlines()]


def test_the_script_writes_the_shipped_bytes(tmp_path, stories):
    write_tasks(tmp_path, stories)
    for name in ITEM_FILES:
        assert (tmp_path / name).read_bytes() == (TASKS_DIR / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "field", "choices", "least"),
    [("next_sentence.jsonl", "contexts", 4, 120), ("word_swap.jsonl", "choices", 2, 200)],
)
def test_no_place_is_a_better_guess_than_another(name, field, choices, least):
    rows = items(name)
    assert len(rows) >= least
    assert all(len(row[field]) == choices == len(set(row[field])) for row in rows)
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(range(choices))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_next_sentences_continue_one_of_their_beginnings(stories):
    for row in next_sentence_items(stories):
        continued = [f"{context} {row['sentence']}" for context in row["contexts"]]
        homes = [any(story.startswith(text) for story in stories) for text in continued]
        assert homes == [i == row["label"] for i in range(4)]
        assert all(any(story.startswith(context) for story in stories) for context in row["contexts"])


def test_swapped_sentences_have_the_same_words_in_another_order(stories):
    for row in word_swap_items(stories):
        first, second = (choice.split() for choice in row["choices"])
        assert sorted(first) == sorted(second)
        assert sum(a != b for a, b in zip(first, second, strict=True)) == 2


def test_sentences_keep_titles_and_speech_together():
    story = '"Stop!" cried Mr. Lee. He ran. "Why?" asked Ann. "Now." They left.'
    assert sentences(story) == ['"Stop!" cried Mr. Lee.', "He ran.", '"Why?" asked Ann.', '"Now."', "They left."]


def test_every_task_file_names_items_that_exist():
    tasks = read_task_folder(TASKS_DIR)
    assert set(tasks) == {"demo_perplexity", "demo_next_sentence", "demo_word_swap"}
    files = {config["dataset_kwargs"]["data_files"]["test"] for configs in tasks.values() for config in configs}
    assert {str(TASKS_DIR / name) for name in ITEM_FILES} == files
