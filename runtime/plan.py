"""A step in the making."""

from __future__ import annotations

from runtime.sequence import Sequence
from runtime.step import Row


class Plan:
    """Rows and page copies of the next step, and the tokens that are left of its budget."""

    def __init__(self, token_budget: int, page_tokens: int, *, chunked: bool) -> None:
        self.left = token_budget
        self.rows: list[Row] = []
        self.copies: list[tuple[int, int]] = []
        self._page_tokens = page_tokens
        self._chunked = chunked
        self._has_prefill = False

    def chunk(self, pending: int) -> int:
        """How many of `pending` tokens there is room for. Unchunked, the step's first prefill may exceed the budget."""
        if self._chunked:
            return min(pending, self.left)
        return pending if pending <= self.left or not self._has_prefill else 0

    def add(self, sequence: Sequence, tokens: int) -> None:
        """A row for the sequence's next `tokens` tokens, whose pages it must have."""
        start, kv_len, table = sequence.computed, sequence.kv_len[0], sequence.table[0]
        end = start + tokens
        pages = -(-(kv_len + tokens) // self._page_tokens)
        covering = table if len(table) == pages else table[:pages]
        known = sequence.tokens
        samples = end == len(known) and sequence.max_tokens > 0
        chunk = (known[start],) if tokens == 1 else tuple(known[start:end])
        self.rows.append(Row(sequence.id, start, chunk, kv_len, covering, samples))
        self.left -= tokens
        if tokens > 1:
            self._has_prefill = True
