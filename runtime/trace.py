"""Steps on file: whatever a scheduler was told and answered, one JSON line each, to be replayed without a model.

The first line says how the scheduler was built. A replay builds it again, tells it the same and requires the same
answers, so that what went wrong in production can be stepped through on any machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError, UsageError
from compress.core.files import io_errors
from kv_compress._budget import Points
from kv_compress._coded_pages import CodingPoints
from runtime.blocks import BlockPool
from runtime.page import PageType
from runtime.scheduler import Scheduler, SchedulerSettings
from runtime.sequence import Sequence
from runtime.step import Compression, Recoding, Row, Step, StepOutput

if TYPE_CHECKING:
    from types import TracebackType

VERSION = 3
_SEQUENCE_FIELDS = (
    *("id", "request", "prompt", "max_tokens", "tenant", "priority", "arrival", "lookup_limit"),
    "tokens",
)


class TraceMismatch(InputError):
    """A replay came to another step than the one that was recorded."""


def require_place(path: Path) -> None:
    """UsageError where no trace can be written, since its folder is not there."""
    if not path.absolute().parent.is_dir():
        raise UsageError("there is no such folder for the trace", where=str(path.parent), hint="make it first")


class Recorder:
    """Writes the trace of one scheduler to `path`; hand it to that scheduler and close it at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        require_place(path)
        with io_errors("write the trace", path):
            self._stream = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - while the scheduler lives

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left, and close the file."""
        with io_errors("write the trace", self._path):
            self._stream.close()

    def started(self, scheduler: Scheduler) -> None:
        """A scheduler begins, with this pool and these settings."""
        pool = scheduler.pool
        self._write(
            "start",
            version=VERSION,
            pages=pool.pages,
            page=dataclasses.asdict(pool.page),
            prefix_cache=pool.prefix_cache,
            settings=dataclasses.asdict(scheduler.settings),
            max_length=scheduler.max_length,
            points=None if scheduler.points is None else dataclasses.asdict(scheduler.points),
        )

    def added(self, sequence: Sequence) -> None:
        """A sequence got in line."""
        self._write("add", sequence=_plain(sequence))

    def forked(self, parent: Sequence, child: Sequence) -> None:
        """A sequence was forked."""
        self._write("fork", parent=parent.id, sequence=_plain(child))

    def aborted(self, sequence: Sequence) -> None:
        """A sequence was ended from outside."""
        self._write("abort", id=sequence.id)

    def scheduled(self, step: Step) -> None:
        """The scheduler answered with a step."""
        self._write("step", index=step.index, rows=step.rows, copies=step.copies, compressions=step.compressions)

    def processed(self, output: StepOutput) -> None:
        """The model's answer to the last step was taken in."""
        self._write(
            "output",
            tokens=list(output.tokens.items()),
            finished=list(output.finished.items()),
            siblings=list(output.siblings.items()),
            counts=list(output.counts.items()),
        )

    def abandoned(self) -> None:
        """The last step was given up."""
        self._write("abandon")

    def _write(self, kind: str, **data: Any) -> None:
        with io_errors("write the trace", self._path):
            self._stream.write(json.dumps({"kind": kind} | data, separators=(",", ":")) + "\n")


def replay(path: str | Path) -> Iterator[tuple[Scheduler, Step]]:
    """Tell a new scheduler all that the trace says; yields it after each step that it made, before the step's output.

    TraceMismatch names the line where it decides otherwise. A trace that ends in the middle is replayed as far as it
    goes, but for a torn last line, which is passed over.
    """
    path = Path(path)
    scheduler: Scheduler | None = None
    step: Step | None = None
    sequences: dict[int, Sequence] = {}
    for where, event in _events(path):
        try:
            if event["kind"] == "start":
                scheduler = _scheduler(event, where)
                continue
            if scheduler is None:
                raise InputError("the trace does not begin with a line of kind start", where=where)
            if event["kind"] == "step":
                step = _require_same(event, scheduler.schedule(), where)
                yield scheduler, step
            else:
                _tell(scheduler, event, sequences, step, where)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the trace's line is not understood: {error!r}", where=where) from error


def _tell(
    scheduler: Scheduler, event: dict[str, Any], sequences: dict[int, Sequence], step: Step | None, where: str
) -> None:
    kind = event["kind"]
    if kind in ("add", "fork"):
        sequence = _sequence(event["sequence"])
        sequences[sequence.id] = sequence
        if kind == "add":
            scheduler.add(sequence)
        else:
            scheduler.fork(sequences[event["parent"]], sequence)
    elif kind == "abort":
        scheduler.abort(event["id"])
    elif kind == "output" and step is not None:
        output = StepOutput(*(dict(event[name]) for name in ("tokens", "finished", "siblings", "counts")))
        scheduler.postprocess(step, output)
    elif kind == "abandon":
        scheduler.abandon()
    else:
        raise InputError(f"a line of kind {kind!r} cannot come here", where=where)


def _events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UsageError("there is no such trace", where=str(path))
    with io_errors("read the trace", path), open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{path}:{number}"
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                if line.endswith("\n"):
                    raise InputError(f"the trace's line is not JSON: {error}", where=where) from error
                return
            yield where, event


def _scheduler(event: dict[str, Any], where: str) -> Scheduler:
    if event["version"] != VERSION:
        raise InputError(f"the trace has version {event['version']}, this program reads {VERSION}", where=where)
    try:
        settings = SchedulerSettings(**event["settings"])
        pool = BlockPool(event["pages"], PageType(**event["page"]), prefix_cache=event["prefix_cache"])
        return Scheduler(pool, settings, max_length=event["max_length"], points=_points(event["points"]))
    except UsageError as error:
        raise InputError(f"the trace's scheduler cannot be built: {error}", where=where) from error


def _points(data: dict[str, Any] | None) -> Points | CodingPoints | None:
    if data is None:
        return None
    return CodingPoints(**data) if "page_tokens" in data else Points(**data)


def _plain(sequence: Sequence) -> dict[str, Any]:
    return {name: getattr(sequence, name) for name in _SEQUENCE_FIELDS}


def _sequence(data: dict[str, Any]) -> Sequence:
    tokens = data.pop("tokens")
    sequence = Sequence(**data)
    sequence.tokens = tokens
    return sequence


def _require_same(event: dict[str, Any], made: Step | None, where: str) -> Step:
    recorded = Step(
        event["index"],
        tuple(Row(id, start, tuple(tokens), kv_len, tuple(table), samples, seat)
              for id, start, tokens, kv_len, table, samples, seat in event["rows"]),
        tuple((source, target) for source, target in event["copies"]),
        tuple(map(_compression, event["compressions"])),
    )  # fmt: skip
    if made is None or made != recorded:
        raise TraceMismatch(f"the replay differs: {_difference(recorded, made)}", where=where)
    return made


def _compression(fields: list[Any]) -> Compression | Recoding:
    if len(fields) == len(Recoding._fields):
        id, *pages = fields
        return Recoding(id, *map(tuple, pages))
    id, slots, kept, source, target, queries, seed, seat, budgets = fields
    return Compression(id, slots, kept, tuple(source), tuple(target), queries, seed, seat, tuple(budgets))


def _difference(recorded: Step, made: Step | None) -> str:
    if made is None:
        return f"recorded was step {recorded.index}, but nothing is to be done"
    for before, now in zip(recorded.rows, made.rows, strict=False):
        if before != now:
            return f"recorded was {before}, now it is {now}"
    for before, now in zip(recorded.compressions, made.compressions, strict=False):
        if before != now:
            return f"recorded was {before}, now it is {now}"
    return f"recorded were {_summary(recorded)}, now {_summary(made)}"


def _summary(step: Step) -> str:
    return f"{len(step.rows)} rows, copies {step.copies} and {len(step.compressions)} evictions"
