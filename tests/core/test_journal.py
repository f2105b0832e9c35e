"""The journal keeps what it was told, cuts off a torn end, refuses other inputs and other damage."""

from pathlib import Path

import pytest

from compress.core.errors import UsageError
from compress.core.journal import Journal, differences

INPUTS = {
    "recipe": {"stages": [{"quantize": {"bits": 4}}], "model": "m"},
    "versions": {"torch": "2.13.0"},
    "threads": 2,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def filled(path: Path) -> Journal:
    journal = Journal(path, INPUTS)
    journal.add("block", {"index": 0, "name": "ü\u2028\r\n"})
    journal.add("block", {"index": 1})
    journal.add("stage", {"stage": 0})
    return journal


def test_what_was_added_is_there_after_reopening(path: Path) -> None:
    before = filled(path)
    after = Journal(path, INPUTS)
    assert after.entries == before.entries
    assert [data["index"] for data in after.of("block")] == [0, 1]
    assert after.last("block") == {"index": 1}
    assert after.last("ready") is None


def test_torn_at_every_byte_it_resumes_with_the_whole_lines(path: Path) -> None:
    filled(path)
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lines = sum(end <= length for end in ends)
        journal = Journal(path, INPUTS)
        assert len(journal.entries) == max(lines - 1, 0)
        journal.add("next", {})
        assert Journal(path, INPUTS).last("next") == {}


def test_damage_before_the_end_is_refused(path: Path) -> None:
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"index":0', b'"index":7')
    path.write_bytes(b"".join(lines))
    with pytest.raises(UsageError, match="journal.jsonl:2: the journal is damaged"):
        Journal(path, INPUTS)


def test_other_inputs_are_refused_with_what_changed(path: Path) -> None:
    filled(path)
    changed = {**INPUTS, "recipe": {"stages": [{"quantize": {"bits": 3}}], "model": "m"}, "data": "abc"}
    with pytest.raises(UsageError) as caught:
        Journal(path, changed)
    text = str(caught.value)
    assert "recipe.stages[0].quantize.bits: 4 → 3" in text
    assert "data: nothing → abc" in text
    assert "--fresh starts over" in text
    assert "torch" not in text
    assert caught.value.exit_code == 2
    assert len(Journal(path, INPUTS).entries) == 3


def test_many_differences_are_counted(path: Path) -> None:
    Journal(path, {f"key{number:02}": 0 for number in range(20)})
    with pytest.raises(UsageError, match="and 8 more"):
        Journal(path, {f"key{number:02}": 1 for number in range(20)})


def test_long_values_are_shortened() -> None:
    assert differences({"sha": "a" * 64}, {"sha": "b" * 64}) == [f"sha: {'a' * 12}…{'a' * 12} → {'b' * 12}…{'b' * 12}"]


def test_lists_of_other_length_differ_as_a_whole() -> None:
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a: [1] → [1,2]"]
