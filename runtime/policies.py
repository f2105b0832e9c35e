"""Who is admitted next: first come, highest priority, or the tenant that has been served least."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from compress.core.errors import UsageError
from runtime.sequence import Sequence

POLICIES = ("fcfs", "priority", "vtc")

Key = tuple[int, int]


class Policy(Protocol):
    """The waiting sequences, and the order in which they are admitted."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on: it is new, or was preempted."""

    def remove(self, sequence: Sequence) -> None:
        """The sequence waits no longer: it was admitted or aborted."""

    def next(self) -> Sequence | None:
        """The sequence to admit next; it stays in line until it is removed."""

    def charge(self, tenant: str, amount: float) -> None:
        """The tenant has got so much service."""

    def precedence(self, sequence: Sequence, /) -> Key:
        """Running sequences are served in ascending order of this, and preempted in descending order."""
        ...

    def tenants(self) -> set[str]:
        """Tenants with a sequence waiting."""
        ...


def make_policy(name: str) -> Policy:
    """The policy of that name; UsageError names those that there are."""
    if name == "vtc":
        return VirtualTokenCounter()
    if name == "fcfs":
        return Ordered(by_arrival)
    if name == "priority":
        return Ordered(by_priority)
    raise UsageError(f"there is no scheduling policy {name!r}", hint=f"choose one of {', '.join(POLICIES)}")


def by_arrival(sequence: Sequence) -> Key:
    """First come, first served; one that was preempted keeps its place."""
    return 0, sequence.order


def by_priority(sequence: Sequence) -> Key:
    """The higher `priority` goes first, and among equals who came first."""
    return -sequence.priority, sequence.order


class Ordered:
    """One line for everybody, in ascending order of a key."""

    def __init__(self, key: Callable[[Sequence], Key]) -> None:
        self.precedence = key
        self._line: list[Sequence] = []
        self._waiting: dict[str, int] = {}  # sequences in line per tenant

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def add(self, sequence: Sequence) -> None:
        insort(self._line, sequence, key=self.precedence)
        self._waiting[sequence.tenant] = self._waiting.get(sequence.tenant, 0) + 1

    def remove(self, sequence: Sequence) -> None:
        del self._line[place(self._line, sequence, self.precedence)]
        self._waiting[sequence.tenant] -= 1
        if not self._waiting[sequence.tenant]:
            del self._waiting[sequence.tenant]

    def next(self) -> Sequence | None:
        return self._line[0] if self._line else None

    def charge(self, tenant: str, amount: float) -> None:
        """Nobody counts."""

    def tenants(self) -> set[str]:
        return set(self._waiting)


class VirtualTokenCounter:
    """VTC (arXiv 2401.00588, algorithm 2): the waiting tenant with the smallest counter goes first.

    A counter grows with the service that the tenant gets, divided by its weight. Who comes back to the line is lifted
    to the smallest counter in it: being away earns nothing. Never idles while somebody could be served.
    """

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self._lines: dict[str, list[Sequence]] = {}  # of tenants with somebody waiting, each in order of arrival
        self._last: str | None = None  # the tenant that emptied its line last
        self._length = 0

    @staticmethod
    def precedence(sequence: Sequence) -> Key:
        return by_arrival(sequence)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        if tenant not in self._lines:
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), self._floor())
            self._lines[tenant] = []
        insort(self._lines[tenant], sequence, key=by_arrival)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        line = self._lines[sequence.tenant]
        del line[place(line, sequence, by_arrival)]
        self._length -= 1
        if not line:
            del self._lines[sequence.tenant]
            self._last = sequence.tenant

    def next(self) -> Sequence | None:
        if not self._lines:
            return None
        # Equal counters: who has waited longest.
        tenant = min(self._lines, key=lambda name: (self.counters[name], self._lines[name][0].order))
        return self._lines[tenant][0]

    def charge(self, tenant: str, amount: float) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0.0) + amount

    def tenants(self) -> set[str]:
        return set(self._lines)

    def _floor(self) -> float:
        if self._lines:
            return min(self.counters[tenant] for tenant in self._lines)
        return self.counters[self._last] if self._last is not None else 0.0


def place(line: list[Sequence], sequence: Sequence, key: Callable[[Sequence], Key]) -> int:
    """Where `sequence` is in a line that is ordered by `key`, which has no ties; RuntimeError if it is not there."""
    index = bisect_left(line, key(sequence), key=key)
    if index == len(line) or line[index] is not sequence:
        raise RuntimeError(f"sequence {sequence.id} is not in this line")
    return index


def check_weights(weights: Mapping[str, float]) -> None:
    """UsageError unless every tenant's weight is a positive number."""
    if not isinstance(weights, Mapping):
        raise UsageError(f"tenant_weights are a mapping from tenants to numbers, not {weights!r}")
    for tenant, weight in weights.items():
        if not is_number(weight) or not 0 < weight < float("inf"):
            raise UsageError(f"tenant {tenant!r} needs a weight above 0, not {weight!r}", where="tenant_weights")


def is_number(value: object) -> bool:
    """Whether it can be counted with: true and false cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)
