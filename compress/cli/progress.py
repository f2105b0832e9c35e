"""Live progress: one bar per stage with blocks, time left and memory, or one line per stage where nobody watches.

Time left comes from the median of the last measured units, so that blocks replayed after a resume do not flatter it.
"""

import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from compress.cli.console import Output, clean
from compress.cli.words import duration
from compress.core.events import Event, Finished, Metric, Notice, Started
from compress.core.events import Progress as Done
from compress.core.quantities import format_bytes

_STATUS = Path("/proc/self/status")


def memory_bytes() -> int | None:
    """Anonymous memory that this process holds now; None where the system does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


class LiveProgress:
    """The listener of a run at the command line: `with LiveProgress(output) as listener: run(…, listener)`."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._live = output.people.is_terminal and not output.json and not output.quiet
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[memory]}", markup=False, style="dim"),
            console=output.people,
        )
        self._tasks: dict[str, TaskID] = {}
        self._pace: dict[str, _Pace] = {}

    def __enter__(self) -> "LiveProgress":
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        if self._output.json:
            self._emit(event)
        elif isinstance(event, Notice):
            self._notice(event)
        elif isinstance(event, Metric):
            if self._output.verbose:
                self._line(f"{event.where or event.stage}: {event.name} {event.value:.4g}")
        elif not self._output.quiet:
            self._advance(event)

    def _emit(self, event: Event) -> None:
        extra = {"memory_bytes": memory_bytes()} if isinstance(event, Done) else {}
        self._output.emit(type(event).__name__.lower(), **asdict(event), **extra)

    def _notice(self, event: Notice) -> None:
        text = f"{event.where}: {event.message}" if event.where else event.message
        self._line(f"{event.level}: {text}" if event.level == "warning" else text, event.level == "warning")

    def _line(self, text: str, warning: bool = False) -> None:
        if not self._output.quiet:
            style = "yellow" if warning else "dim"
            self._output.people.print(Text(clean(text), style=style), soft_wrap=not self._live)

    def _advance(self, event: Started | Done | Finished) -> None:
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Done):
            pace = self._pace.setdefault(event.stage, _Pace())
            pace.note(event.done)
            if event.stage in self._tasks:
                left = pace.left(event.total - event.done)
                self._update(event.stage, completed=event.done, total=event.total, left=left)
        elif not self._live:
            self._line(f"{event.stage}: done{f', {event.summary}' if event.summary else ''}")
        elif event.stage in self._tasks:
            self._update(event.stage, left="done")

    def _start(self, event: Started) -> None:
        unit = event.unit if event.total == 1 else f"{event.unit}s"
        self._pace[event.stage] = _Pace()
        if self._live:
            previous = self._tasks.pop(event.stage, None)
            if previous is not None:
                self._bars.update(previous, left="done")
            self._tasks[event.stage] = self._bars.add_task(
                clean(event.stage), total=event.total, unit=unit, left="", memory=""
            )
        else:
            self._line(f"{event.stage}: {event.total} {unit}")

    def _update(self, stage: str, **fields: object) -> None:
        held = memory_bytes()
        memory = f"{format_bytes(held)} held" if held is not None else ""
        self._bars.update(self._tasks[stage], memory=memory, **fields)  # type: ignore[arg-type]


class _Pace:
    """How long units take."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._done = 0
        self._seconds: deque[float] = deque(maxlen=8)

    def note(self, done: int) -> None:
        now = time.monotonic()
        if done > self._done:
            self._seconds.append((now - self._since) / (done - self._done))
        self._since, self._done = now, done

    def left(self, units: int) -> str:
        if units <= 0 or not self._seconds:
            return ""
        return f"{duration(median(self._seconds) * units)} left"
