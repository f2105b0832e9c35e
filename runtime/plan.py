"""A step in the making."""

from __future__ import annotations

from runtime.sequence import Sequence
from runtime.step import Compression, Recoding, Row


class Plan:
    """Rows, page copies and evictions of the next step, and the tokens that are left of its budget."""

    def __init__(self, token_budget: int, page_tokens: int, *, chunked: bool) -> None:
        self.left = token_budget
        self.rows: list[Row] = []
        self.copies: list[tuple[int, int]] = []
        self.compressions: list[Compression | Recoding] = []
        self._page_tokens = page_tokens
        self._chunked = chunked
        self._has_prefill = False

    def chunk(self, pending: int) -> int:
        """How many of `pending` tokens there is room for. Unchunked, the step's first prefill may exceed the budget."""
        if self._chunked:
            return max(min(pending, self.left), 0)  # a row before a point may have taken more than there was
        return pending if pending <= self.left or not self._has_prefill else 0

    def add(self, sequence: Sequence, tokens: int) -> None:
        """A row for the sequence's next `tokens` tokens, whose pages it must have."""
        start, kv_len, table = sequence.computed, sequence.kv_len[0], sequence.table[0]
        end = start + tokens
        pages = -(-(kv_len + tokens) // self._page_tokens)
        covering = table if len(table) == pages else table[:pages]
        samples = end == len(sequence.tokens) and sequence.max_tokens > 0
        seat = -1 if table else sequence.seat
        self.rows.append(Row(sequence.id, start, tuple(sequence.tokens[start:end]), kv_len, covering, samples, seat))
        self.left -= tokens
        if tokens > 1:
            self._has_prefill = True

    def add_decodes(self, sequences: list[Sequence]) -> list[Sequence]:
        """A row for the one token that each still has to compute; those that fill a page with it.

        What `add` does, in one loop: 256 of them are made in each step.
        """
        page_tokens, rows, row_of = self._page_tokens, self.rows, Row._make
        filling = []
        for sequence in sequences:
            start, kv_len, table = sequence.computed, sequence.kv_len[0], sequence.table[0]
            pages = kv_len // page_tokens + 1
            covering = table if len(table) == pages else table[:pages]
            token, seat = sequence.tokens[start], -1 if table else sequence.seat
            rows.append(row_of((sequence.id, start, (token,), kv_len, covering, sequence.max_tokens > 0, seat)))
            if not (kv_len + 1) % page_tokens:
                filling.append(sequence)
        self.left -= len(sequences)
        return filling
