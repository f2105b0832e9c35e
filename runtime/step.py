"""What goes from the scheduler to the model and back: plain values that can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from runtime.groups import GroupPool


class Row(NamedTuple):
    """One sequence's part of a step. A named tuple, because 256 of them are made per step."""

    sequence: int  # its id
    start: int  # logical position of the first token computed in this step
    tokens: tuple[int, ...]
    kv_len: int  # slots stored before these tokens are written
    table: tuple[int, ...]  # pages that cover `kv_len + len(tokens)` slots
    samples: bool  # whether a token is to be sampled after the last one
    seat: int = -1  # of tables of each layer and head (runtime.groups); then `table` is empty and `kv_len` a mean


class Compression(NamedTuple):
    """An eviction from one sequence after its row, which ends at the point.

    Every layer and head keeps `kept` of the `slots` slots in the pages `source`; what stays moves to the first slots of
    `target`, in order. `target` is the sequence's table from then on, and shares no page with another sequence or the
    prefix cache; it may share pages with `source`, so all that moves is read before any of it is written.

    With a `seat`, `kept` is a mean: the heads of a layer keep `budgets[layer]` slots each in the mean, how many each
    comes back with the output, and what stays moves into the seat's tables. Such an eviction's source may lie in them,
    too: then `source` is empty. All layers are read before anything is written.
    """

    sequence: int  # its id
    slots: int
    kept: int
    source: tuple[int, ...]
    target: tuple[int, ...]
    queries: int  # the last ones of the row, by which slots are scored
    seed: int  # for methods that draw by lot
    seat: int = -1
    budgets: tuple[int, ...] = ()


class Recoding(NamedTuple):
    """A block of one sequence that is coded after its row, which ends at the point.

    The full pages `source` become coded ones in the frames `target`, which no other sequence and no prefix reads; they
    may be some of them, so all are read before any is written. `spare` is room for what comes.
    """

    sequence: int  # its id
    source: tuple[int, ...]
    target: tuple[int, ...]
    spare: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the model.

    First `copies` (from page, to page), in order. Then the rows as one flat batch: a row may read pages that another
    row of the same step fills (a shared prompt), so every layer stores the whole batch before it attends. In the end
    the `compressions`: evictions, layer by layer, or recodings, when all layers are done. `groups`: the tables of those
    with a seat, as they are until the step's output is taken in.
    """

    index: int
    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()
    compressions: tuple[Compression | Recoding, ...] = ()
    groups: GroupPool | None = field(default=None, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Length of the flat batch."""
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What came of a step: the sampled token of each row with `samples`, and who is done (stop, error) by id.

    A row that ends in an error needs no token. Lengths are the scheduler's matter. `siblings`: by id, how many further
    samples of its request got their first token from its row; the tenant pays for those tokens too. `counts`: by id,
    how many slots an eviction left in each layer and head; where they are missing, heads of a layer keep equal numbers.
    """

    tokens: Mapping[int, int] = field(default_factory=dict)
    finished: Mapping[int, str] = field(default_factory=dict)
    siblings: Mapping[int, int] = field(default_factory=dict)
    counts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
