"""Text of a growing list of tokens, handed out as soon as it is certain.

Nothing is handed out that a later token could still change: no part of a character whose bytes come as several tokens,
and no text that could be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"  # what decoders put for bytes that are no character, or not yet
_MOST_HELD = 8  # tokens held back for a character; its four bytes are four tokens at most
_CHARACTER_TOKENS = 3  # tokens before the one that completes a character
_WINDOW = 24  # tokens decoded together before the window moves on


class TextDecoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool = ...) -> str:
        """Text of the ids."""
        ...


def decoder_of(tokenizer: TextDecoder) -> TextDecoder:
    """The tokenizer's fast core where it has one: the same text at a fraction of the time."""
    return getattr(tokenizer, "backend_tokenizer", None) or tokenizer


class Detokenizer:
    """Pieces of text whose concatenation is the text of all tokens.

    Tokens are decoded together with some that went before, since decoders treat the beginning of a text specially.
    """

    def __init__(self, decoder: TextDecoder | None) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text was handed out …
        self._read_text = ""  # … and that text
        self._last = 0  # where the last piece began: a border between characters

    def push(self, token: int) -> str:
        """Take a token; the text that became certain."""
        if self._decoder is None:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_BROKEN) and self._read:
            # broken bytes before may make these look broken, too
            alone = self._decode(self._window[self._read :])
            if not alone.endswith(_BROKEN):
                self._forget_before(self._read)
                text = alone
        if not text.endswith(_BROKEN):
            return self._hand_out(len(self._window), text)
        if len(self._window) - self._read > _MOST_HELD:
            end = self._read + self._broken_border()
            return self._hand_out(end, self._decode(self._window[:end]))
        return ""

    def flush(self) -> str:
        """The rest, whatever it is: no further tokens will come."""
        if self._decoder is None or self._read == len(self._window):
            return ""
        return self._hand_out(len(self._window), self._decode(self._window))

    def _decode(self, ids: list[int]) -> str:
        return "" if self._decoder is None else self._decoder.decode(ids, skip_special_tokens=True)

    def _hand_out(self, end: int, text: str) -> str:
        """Hand out the window up to `end`, which reads `text`."""
        if text.startswith(self._read_text):
            piece = text[len(self._read_text) :]
        else:  # bytes that went before read differently beside these
            piece = self._decode(self._window[self._read : end])
        if self._read_text and not piece:  # a special token: it would be no context for the next
            del self._window[self._read : end]
            return ""
        self._last, self._read, self._read_text = self._read, end, text
        if end > _WINDOW:
            self._forget_before(self._last)
            self._read_text = self._decode(self._window[: self._read])
        return piece

    def _forget_before(self, start: int) -> None:
        del self._window[:start]
        self._read, self._last, self._read_text = self._read - start, 0, ""

    def _broken_border(self) -> int:
        """How many of the held tokens cannot belong to a character to come: up to where a cut breaks the least."""
        held = self._window[self._read :]
        last = len(held) - _CHARACTER_TOKENS

        def broken(border: int) -> int:
            return (self._decode(held[:border]) + self._decode(held[border:])).count(_BROKEN)

        return min(range(last, last - _CHARACTER_TOKENS - 1, -1), key=broken)


class StopStrings:
    """Text until the first stop string, which is cut off. "First" is the one complete first, character by character,
    so that the result does not depend on how text is cut into tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take text; what of it is certain to lie before any stop string."""
        if not self._stops or self.found is not None:
            return "" if self.found is not None else piece
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
