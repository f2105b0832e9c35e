"""Text comes out whole: no split characters, no stop strings, nothing lost, however it is cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime.detokenizer import Detokenizer, StopStrings, decoder_of

WORDS = ["hel", "lo", " wor", "ld", "é", "€", "😀", " 日本", "\n\n", "."]


def byte_level() -> Tokenizer:
    """256 bytes and some longer tokens; 5 tokens cut characters in odd places."""
    symbols = dict(zip(_byte_order(), _alphabet(), strict=True))
    spelled = ["".join(symbols[byte] for byte in word.encode()) for word in WORDS]
    odd = [b"\xf0\x9f", b"\x98\x80", b"a\xe2", b"\x82\xacb", b"\xac\xe2"]
    spelled += ["".join(symbols[byte] for byte in piece) for piece in odd]
    vocabulary = {token: index for index, token in enumerate([*(symbols[byte] for byte in range(256)), *spelled])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def _byte_order() -> list[int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _alphabet() -> list[str]:
    printable = [chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet = printable + [chr(256 + index) for index in range(256 - len(printable))]
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def byte_fallback() -> Tokenizer:
    """As sentencepiece models come: pieces with ▁ for a space, single bytes where no piece fits, first space cut."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁hel", "lo", "▁wor", "ld", "▁", "é", ".", "▁日本"]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decoder_of(tokenizer))
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=120))
def test_byte_level_pieces_add_up_to_the_text(ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


PIECE_IDS = st.integers(256, BYTE_FALLBACK.get_vocab_size() - 1).map(lambda token: [token])
CHARACTER_IDS = st.characters(exclude_categories=["Cs"]).map(as_bytes)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECE_IDS, CHARACTER_IDS), max_size=60))
def test_byte_fallback_pieces_add_up_to_the_text(parts: list[list[int]]) -> None:
    ids = [token for part in parts for token in part]
    assert "".join(pieces_of(BYTE_FALLBACK, ids)) == BYTE_FALLBACK.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("aé€😀 日\ufffd"), max_size=40))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
def test_no_character_is_split(tokenizer: Tokenizer, text: str) -> None:
    """A character comes out with its last byte, not before and, for whole text, not later."""
    pieces = pieces_of(tokenizer, as_bytes(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""
    assert "".join(pieces).lstrip(" ") == text.lstrip(" ")


def test_garbage_is_not_held_for_ever() -> None:
    pieces = pieces_of(BYTE_LEVEL, [0x80] * 500)
    assert "".join(pieces) == "\ufffd" * 500
    held = 0
    for piece in pieces[:-1]:
        held += 1 - len(piece)
        assert held <= 9


def test_special_tokens_are_left_out() -> None:
    end = BYTE_LEVEL.token_to_id("</s>")
    assert pieces_of(BYTE_LEVEL, [*as_bytes("ab"), end, *as_bytes("c")]) == ["a", "b", "", "c", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None)
    assert detokenizer.push(3) == detokenizer.flush() == ""


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher, text = StopStrings(stops), ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.found is not None:
            return text, matcher.found
    return text + matcher.flush(), None


def expected_stop(stops: list[str], text: str) -> tuple[str, str | None]:
    """By the definition: read on character by character until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert stopped(stops, pieces) == expected_stop(stops, "".join(pieces))


def test_a_possible_stop_string_is_held_back_and_then_let_go() -> None:
    matcher = StopStrings(["\n\nQ:"])
    assert [matcher.push(piece) for piece in ["yes", "\n", "\nQ", "ue", "en\n"]] == ["yes", "", "", "\n\nQue", "en"]
    assert matcher.flush() == "\n"


def test_a_stop_string_across_tokens_is_cut_off() -> None:
    assert stopped(["END"], ["some te", "xt E", "N", "Dless"]) == ("some text ", "END")
