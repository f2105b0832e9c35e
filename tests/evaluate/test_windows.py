"""Windows: every token is scored once, with as much context as the protocol gives."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from compress.core.recipe import Perplexity
from compress.evaluate.windows import _cut, read_windows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(2, 12), st.integers(1, 12))
def test_every_token_is_scored_once_except_those_without_context(lengths, window, stride):
    stride = min(stride, window)
    encoded, next_token = [], 0
    for length in lengths:
        encoded.append(list(range(next_token, next_token + length)))
        next_token += length
    rows, score_from, unit = _cut(encoded, window, stride, by_row=False)
    scored = [token for row, first in zip(rows, score_from, strict=True) for token in row[first:]]
    assert len(scored) == len(set(scored))
    assert all(len(row) <= window and 1 <= first < len(row) for row, first in zip(rows, score_from, strict=True))
    unscored = set(range(next_token)) - set(scored)
    starts = {ids[start] for ids in encoded for start in range(0, len(ids), stride)} if stride == window else set()
    assert unscored == starts | {ids[0] for ids in encoded if ids}
    assert len(unit) == len(rows)


def test_a_stride_gives_later_tokens_the_context_before_them():
    rows, score_from, _ = _cut([list(range(10))], window=6, stride=2, by_row=True)
    assert rows == [list(range(start, start + 6)) for start in (0, 2, 4)]
    assert score_from.tolist() == [1, 4, 4]


def perplexity(tmp_path: Path, text: str, **fields) -> Perplexity:
    (tmp_path / "t.txt").write_text(text)
    return Perplexity(dataset="t.txt", **{"window": 8, **fields})


def test_documents_by_themselves_and_bits_per_byte_count_the_text_only(tmp_path, tiny_models):
    checkpoint = Checkpoint.open(tiny_models[0])
    windows = read_windows(perplexity(tmp_path, "a b c\n\nd e", documents=True), checkpoint, tmp_path)
    assert windows.tokens.ids.tolist() == [[1, 3, 4, 5], [1, 6, 7, 0]]
    assert windows.lengths.tolist() == [4, 3]
    assert windows.unit.tolist() == [0, 1]
    assert (windows.scored, windows.text_tokens, windows.text_bytes) == (5, 5, 8)


def test_end_to_end_text_is_encoded_once_and_units_are_windows(tmp_path, tiny_models):
    checkpoint = Checkpoint.open(tiny_models[0])
    windows = read_windows(perplexity(tmp_path, "a b c d e f\n\ng h i j k l"), checkpoint, tmp_path)
    assert windows.tokens.ids[0].tolist() == [1, 3, 4, 5, 6, 7, 8, 9]
    assert windows.unit.tolist() == [0, 1]
    assert (windows.scored, windows.text_tokens, windows.text_bytes) == (11, 12, 24)


def test_a_prefix_starts_each_document_of_end_to_end_text(tmp_path, tiny_models):
    checkpoint = Checkpoint.open(tiny_models[0])
    asked = perplexity(tmp_path, "a b\n\nc d", prefix="</s> ", special_tokens=False)
    windows = read_windows(asked, checkpoint, tmp_path)
    assert windows.tokens.ids.tolist() == [[2, 3, 4, 2, 5, 6]]
    assert windows.text_tokens == 4


def test_the_protocol_says_how_it_was_measured_and_names_no_folder(tmp_path, tiny_models):
    asked = perplexity(tmp_path, "a b c\n\nd e", documents=True)
    asked = asked.model_copy(update={"dataset": str(tmp_path / "t.txt")})
    protocol = read_windows(asked, Checkpoint.open(tiny_models[0]), None).protocol
    assert str(tmp_path) not in str(protocol)
    assert protocol["text"] == "t.txt"
    assert (protocol["window"], protocol["stride"], protocol["tokens_scored"], protocol["windows"]) == (8, 8, 5, 2)


def test_refused(tmp_path, tiny_models):
    checkpoint = Checkpoint.open(tiny_models[0])
    with pytest.raises(UsageError, match="stride 9 skips text"):
        read_windows(perplexity(tmp_path, "a b", stride=9), checkpoint, tmp_path)
    with pytest.raises(UsageError, match="more than the model's 64 positions"):
        read_windows(perplexity(tmp_path, "a b", window=65), checkpoint, tmp_path)
    with pytest.raises(InputError, match="no token to score"):
        read_windows(perplexity(tmp_path, "a\n\nb", special_tokens=False, documents=True), checkpoint, tmp_path)
