"""One sequence: its tokens, how much of it is stored, and in which pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from runtime.prefixes import Stretch

Status = Literal["waiting", "running", "finished"]


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and generated tokens of one sample of one request.

    `computed` counts logical positions whose keys and values are stored; `kv_len[group]` counts the slots that they
    take. They are equal as long as nothing is evicted; Stretch.slots_at tells one from the other. `table[group]` holds
    the pages, in slot order. There is one table group for all layers and heads, until an eviction leaves unequal
    numbers of slots: then `table` is empty, `seat` says where the tables of each layer and head are (runtime.groups),
    and `kv_len` is the mean of their slots.

    `id` is unique for the life of a scheduler; the samples of one request share `request`. A sequence with
    `max_tokens` 0 is only read (for the log-probabilities of its prompt) and finishes once it is computed.
    """

    id: int
    request: str
    prompt: list[int]
    max_tokens: int
    tenant: str = ""
    priority: int = 0  # higher goes first under the policy `priority`
    arrival: float | None = None  # seconds on the scheduler's clock, which fills it in
    lookup_limit: int | None = None  # from here on nothing is taken from the prefix cache: logits are wanted

    tokens: list[int] = field(init=False)  # prompt and generated
    status: Status = field(init=False, default="waiting")
    finish_reason: str | None = field(init=False, default=None)  # stop, length, abort or error
    computed: int = field(init=False, default=0)
    table: list[tuple[int, ...]] = field(init=False)  # tuples: a step's rows hold them as they were
    kv_len: list[int] = field(init=False)
    preemptions: int = field(init=False, default=0)

    longest: int = field(init=False)  # tokens that it may have in the end
    # Written by the scheduler and the pool alone.
    order: int = field(init=False, default=-1)  # of arrival, without ties
    charged: bool = field(init=False, default=False)  # the tenant has paid for the prompt
    registered: int = field(init=False, default=0)  # leading pages that were offered to the prefix cache
    stretches: list[Stretch] = field(init=False)  # between evictions, as far as anybody asked
    stretch: int = field(init=False, default=0)  # the one that `computed` lies in
    seat: int = field(init=False, default=-1)  # has pages there, and if `table` is empty is stored there

    def __post_init__(self) -> None:
        self.prompt = list(self.prompt)
        self.tokens = list(self.prompt)
        self.table = [()]
        self.kv_len = [0]
        self.longest = len(self.prompt) + self.max_tokens
        self.stretches = []

    @property
    def is_seated(self) -> bool:
        """Whether its slots lie in tables of each layer and head."""
        return self.seat >= 0 and not self.table[0]

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[len(self.prompt) :]

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.longest - len(self.tokens)

    @property
    def pending(self) -> int:
        """Known tokens that are not computed yet: 1 while decoding."""
        return len(self.tokens) - self.computed
