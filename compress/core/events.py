"""What a run tells the outside while it works. Progress bars, --json and the logs all consume these; nothing prints."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Started:
    """A stretch of work begins: `total` units (blocks, batches, requests) of `stage`."""

    stage: str
    total: int
    unit: str = "block"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of `stage` are finished and durable; `detail` names the last one."""

    stage: str
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured figure, e.g. name="output_error", where="model.layers.3"."""

    stage: str
    name: str
    value: float
    where: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know: a fallback, a retry, a loader that will refuse the result."""

    message: str
    where: str = ""
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True)
class Finished:
    """A stretch of work is over; `summary` is one line."""

    stage: str
    summary: str = ""


Event = Started | Progress | Metric | Notice | Finished
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that hears nothing: the default of library calls."""
